"""Refusals: why there is no score."""

from dataclasses import dataclass

from scorer_client.fields import Fields


@dataclass(frozen=True)
class Refusal:
    """Why there is no score. A rejected job or its candidate is invalid; a failed job may be `retryable`."""

    code: str
    message: str
    retryable: bool

    @classmethod
    def read(cls, error: Fields) -> "Refusal":
        return cls(error.text("code"), error.text("message"), error.flag("retryable"))
