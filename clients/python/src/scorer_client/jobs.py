"""Jobs: messages of the schema score_job.v1."""

import base64
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgpack  # type: ignore[import-untyped]

from scorer_client.stops import Stop

Format = Literal["binary_v2", "safetensors", "pt_chunks"]
Semantics = Literal["gradient", "param_diff"]
Compression = Literal["zstd"]
Encoding = Literal["application/msgpack", "application/json"]

NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True)
class Candidate:
    """An update to score: its bytes, or a URL that the workers are allowed to read together with its SHA-256 and size."""

    format: Format
    semantics: Semantics
    learning_rate: float | None = None
    data: bytes | None = None
    url: str | None = None
    sha256: str | None = None
    size: int | None = None
    compression: Compression | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.url is None):
            raise ValueError("A candidate needs either data or url: give exactly one.")
        check_known("format of a candidate", self.format, get_args(Format))
        check_known("semantics of a candidate", self.semantics, get_args(Semantics))
        if self.compression is not None:
            check_known("compression of a candidate", self.compression, get_args(Compression))

    def fields(self) -> dict[str, Any]:
        """As sent. Inline data gets its SHA-256 and size, so that a worker detects damage."""
        fields = without_none(vars(self))
        if self.data is not None:
            fields.setdefault("sha256", hashlib.sha256(self.data).hexdigest())
            fields.setdefault("size", len(self.data))
        return fields


@dataclass(frozen=True)
class Job:
    """A score job, or without a candidate a validate job, which measures the loss of the current model.

    To run a job again, use another submission_id: workers answer a repeated one with the stored result.
    """

    submission_id: str
    model_version: int | None = None
    candidate: Candidate | None = None
    nonce: str = ""
    shards: Sequence[int] | None = None
    deadline_ms: int | None = None
    context: Mapping[str, Any] | None = None
    priority: int | None = None
    """Of the message, 0 to 255: from RabbitMQ 4.0 on, higher ones are delivered first; 4 is what a job has without one."""
    stop: Stop | None = None
    """Of score jobs: lets the evaluation end early. The job is held back until every live worker of the model knows it."""

    def __post_init__(self) -> None:
        check_name("submission_id", self.submission_id)
        check_priority(self.priority)
        if self.candidate is not None and self.model_version is None:
            raise ValueError(f"Job {self.submission_id} has a candidate: set model_version to the version it was made from.")
        if self.candidate is None and self.stop is not None:
            raise ValueError(f"Job {self.submission_id} has a stop and no candidate: only score jobs can be stopped early.")

    @property
    def kind(self) -> Literal["score", "validate"]:
        return "validate" if self.candidate is None else "score"

    @property
    def needs(self) -> frozenset[str]:
        """The words that a worker's `accepts` must list for it to know this job."""
        return frozenset({self.kind} if self.stop is None else {self.kind, "stop"})

    def body(self, model: str, encoding: Encoding) -> bytes:
        """The message for the model's workers. Raises ValueError if the encoding cannot hold it."""
        validation = {
            "nonce": self.nonce,
            "shards": self.shards and list(self.shards),
            "stop": self.stop and self.stop.fields(),
        }
        fields = {
            "v": 1,
            "kind": self.kind,
            "submission_id": self.submission_id,
            "model": model,
            "model_version": self.model_version,
            "candidate": self.candidate and self.candidate.fields(),
            "validation": without_none(validation),
            "deadline_ms": self.deadline_ms,
            "context": self.context,
        }
        return encoded(without_none(fields), encoding)


def check_name(field: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{field} {name!r:.140} must be 1 to 128 characters of A-Z a-z 0-9 . _ : -")


def check_priority(priority: int | None) -> None:
    if priority is not None and not 0 <= priority <= 255:
        raise ValueError(f"priority {priority} must be from 0 to 255.")


def check_known(what: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        meant = "".join(f" Did you mean {close}?" for close in difflib.get_close_matches(str(word), known, 1))
        raise ValueError(f"The {what} must be {' or '.join(known)}, not {word!r:.60}.{meant}")


def encoded(job: Mapping[str, Any], encoding: Encoding) -> bytes:
    """Raises ValueError if the encoding cannot hold the job."""
    try:
        if encoding == "application/msgpack":
            packed: bytes = msgpack.packb(job)
            return packed
        return json.dumps(job, allow_nan=False, default=_base64).encode()
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"Job {job['submission_id']} cannot be encoded as {encoding}: {error}.") from error


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _base64(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
