"""Jobs, as the schema score_job.v1 has them."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgpack  # type: ignore[import-untyped]

Format = Literal["binary_v2", "safetensors", "pt_chunks"]
Semantics = Literal["gradient", "param_diff"]
Encoding = Literal["application/msgpack", "application/json"]

NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True)
class Candidate:
    """An update: its bytes, or a URL that the workers may read, then with digest and size."""

    format: Format
    semantics: Semantics
    learning_rate: float | None = None
    data: bytes | None = None
    url: str | None = None
    sha256: str | None = None
    size: int | None = None
    compression: Literal["zstd"] | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.url is None):
            raise ValueError("A candidate has either data or a url: give exactly one of them.")

    def fields(self) -> dict[str, Any]:
        """With the digest of inline data, so that what is damaged on the way is not scored."""
        fields = _without_nothing(vars(self))
        if self.data is not None:
            fields.setdefault("sha256", hashlib.sha256(self.data).hexdigest())
            fields.setdefault("size", len(self.data))
        return fields


@dataclass(frozen=True)
class Job:
    """A score job; without a candidate a validate job, which measures the model as it is.

    Whoever wants a job done again gives it another submission_id: the answer to this one is remembered and comes again.
    """

    submission_id: str
    model_version: int | None = None
    candidate: Candidate | None = None
    nonce: str = ""
    shards: Sequence[int] | None = None
    deadline_ms: int | None = None
    context: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.submission_id):
            raise ValueError(f"submission_id {self.submission_id!r:.140} is not 1 to 128 of A-Z a-z 0-9 . _ : -")
        if self.candidate is not None and self.model_version is None:
            raise ValueError(f"Job {self.submission_id} has a candidate: say with model_version what it was made from.")

    @property
    def kind(self) -> Literal["score", "validate"]:
        return "validate" if self.candidate is None else "score"

    def body(self, model: str, encoding: Encoding) -> bytes:
        fields = self._fields(model)
        try:
            if encoding == "application/msgpack":
                packed: bytes = msgpack.packb(fields)
                return packed
            return json.dumps(fields, allow_nan=False, default=_base64).encode()
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"Job {self.submission_id} cannot be written as {encoding}: {error}.") from error

    def _fields(self, model: str) -> dict[str, Any]:
        validation = _without_nothing({"nonce": self.nonce, "shards": self.shards and list(self.shards)})
        own = {
            "v": 1,
            "kind": self.kind,
            "submission_id": self.submission_id,
            "model": model,
            "model_version": self.model_version,
            "candidate": self.candidate and self.candidate.fields(),
            "validation": validation,
            "deadline_ms": self.deadline_ms,
            "context": self.context,
        }
        return _without_nothing(own)


def _without_nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _base64(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} is nothing that JSON holds")
