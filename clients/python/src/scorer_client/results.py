"""Results: messages of the schema score_result.v1. They are checked field by field, because anyone may have published them."""

import codecs
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import msgpack  # type: ignore[import-untyped]

from scorer_client.fields import Fields, Malformed
from scorer_client.merges import Merged
from scorer_client.refusals import Refusal
from scorer_client.sketches import PLACES, Sketch
from scorer_client.stops import StoppedEarly


@dataclass(frozen=True)
class Score:
    """A candidate's effect on the held-out loss. `stderr` and `ci95`, the 95 % interval of `delta`, are None below two windows.

    Where the evaluation was `stopped`, `windows`, `delta` and the losses are those of the windows that ran. Their mean is
    biased: such a delta is no measurement, and belongs in no mean, ranking or comparison. `score` is then 0, and `stderr`
    and `ci95` are None.
    """

    score: float
    delta: float
    stderr: float | None
    loss_before: float
    loss_after: float
    windows: int
    plan: str
    sketch: Sketch | None = field(repr=False)
    stopped: StoppedEarly | None = None
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Loss:
    """The loss that a validate job measured."""

    loss: float
    windows: int
    plan: str


Verdict = Score | Loss | Merged | Refusal


@dataclass(frozen=True)
class Result:
    """A result. `fields` holds the whole message, including the fields that have no attribute here."""

    submission_id: str
    kind: str
    status: str
    model: str
    model_version: int
    worker_id: str
    verdict: Verdict
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def code(self) -> str | None:
        """The error code, or None if the job was scored."""
        return self.verdict.code if isinstance(self.verdict, Refusal) else None

    @classmethod
    def read(cls, body: bytes, content_type: str | None) -> "Result":
        fields = Fields.read("the result", _decoded(body, content_type))
        if fields.values.get("v") != 1:
            raise fields.wrong("v", "1, the only supported version")
        fields = Fields(f"the result of {fields.text('submission_id'):.128}", fields.values)
        status = fields.text("status")
        if status not in ("scored", "rejected", "failed"):
            raise fields.wrong("status", "scored, rejected or failed")
        return cls(
            submission_id=fields.text("submission_id"),
            kind=fields.text("kind"),
            status=status,
            model=fields.text("model"),
            model_version=fields.whole("model_version"),
            worker_id=fields.text("worker_id"),
            verdict=_verdict(fields, status),
            fields=fields.values,
        )


def _decoded(body: bytes, content_type: str | None) -> Any:
    try:
        if is_json(content_type):
            return json.loads(body.removeprefix(codecs.BOM_UTF8), parse_constant=_reject_constant, parse_float=_exact_number)
        # Keys of a context may be of any type.
        return msgpack.unpackb(body, strict_map_key=False)
    # msgpack raises ValueError, except for deep nesting, a truncated body, and a key that is not hashable.
    except (ValueError, RecursionError, TypeError, msgpack.UnpackException) as error:
        raise Malformed(f"A result cannot be decoded as {content_type or 'MessagePack'}: {error!r:.200}.") from error


def is_json(content_type: str | None) -> bool:
    """By the workers' own rule; anything else is MessagePack."""
    essence = (content_type or "").partition(";")[0].strip().lower()
    return essence in ("application/json", "text/json") or ("/" in essence and essence.endswith("+json"))


def _exact_number(digits: str) -> float | Decimal:
    """A number that a float cannot hold stays a Decimal, so that a context comes back unchanged."""
    number = float(digits)
    if not math.isfinite(number) or Decimal(repr(number)) != Decimal(digits):
        return Decimal(digits)
    return number


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _verdict(fields: Fields, status: str) -> Verdict:
    if status != "scored":
        return Refusal.read(fields.part("error"))
    match fields.text("kind"):
        case "validate":
            return Loss(fields.number("loss"), fields.whole("windows"), fields.digest("plan"))
        case "score":
            return _score(fields)
        case "merge":
            return Merged.read(fields)
    raise fields.wrong("kind", "score, validate or merge")


def _score(fields: Fields) -> Score:
    score = Score(
        score=fields.number("score"),
        delta=fields.number("delta"),
        stderr=fields.number_or_none("stderr"),
        loss_before=fields.number("loss_before"),
        loss_after=fields.number("loss_after"),
        windows=fields.whole("windows"),
        plan=fields.digest("plan"),
        sketch=_sketch(fields.part("candidate")),
        stopped=StoppedEarly.read(fields.part("stopped")) if fields.has("stopped") else None,
        ci95=fields.interval_or_none("ci95"),
    )
    if score.stopped is not None and score.score != 0:
        raise fields.wrong("score", "0, because the evaluation was stopped")
    for key in ("stderr", "ci95"):
        if score.stopped is not None and fields.has(key):
            raise fields.wrong(key, "null, because the evaluation was stopped")
    return score


def _sketch(candidate: Fields) -> Sketch | None:
    if not candidate.has("sketch"):
        return None
    sketch = candidate.values["sketch"]
    if not isinstance(sketch, list) or len(sketch) != PLACES:
        raise candidate.wrong("sketch", f"a list of {PLACES} integers or nulls")
    places = Fields("the sketch", {str(place): number for place, number in enumerate(sketch)})
    return [places.whole(place) if places.has(place) else None for place in places.values]
