"""Merges: a job that asks what candidates are worth together, and what its result says of each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scorer_client.console import counted
from scorer_client.fields import Fields, Malformed
from scorer_client.jobs import NAME, Candidate, Encoding, Job, check_name, check_priority, encoded, without_none
from scorer_client.refusals import Refusal

OnRejected = Literal["drop", "fail"]
Status = Literal["scored", "rejected", "failed"]

LEAST = 2  # Members of a merge.


@dataclass(frozen=True)
class Member:
    """A candidate of a merge. Its change is multiplied by `weight`; None is one by the number of members as sent."""

    id: str
    candidate: Candidate
    weight: float | None = None

    def __post_init__(self) -> None:
        check_name("id of a member", self.id)
        if self.weight is not None and (not math.isfinite(self.weight) or self.weight == 0):
            raise ValueError(f"weight {self.weight} of the member {self.id} must be finite and not 0.")

    def fields(self) -> dict[str, Any]:
        """As sent."""
        weight = None if self.weight is None else float(self.weight)
        return without_none({"id": self.id, "candidate": self.candidate.fields(), "weight": weight})


@dataclass(frozen=True)
class Merge:
    """A merge job: what its members are worth together, and each in the company of the others.

    A member that is refused is left out and named, and the others keep the weights that they have; with `on_rejected`
    "fail", the merge is refused with it. The workers bound the members: 64 of them, and their sizes together, by default.
    The job is held back until every live worker of the model knows merges.

    To run a job again, use another submission_id: workers answer a repeated one with the stored result.
    """

    submission_id: str
    model_version: int
    members: Sequence[Member]
    on_rejected: OnRejected = "drop"
    nonce: str = ""
    shards: Sequence[int] | None = None
    deadline_ms: int | None = None
    context: Mapping[str, Any] | None = None
    priority: int | None = None
    """As in a Job."""

    def __post_init__(self) -> None:
        check_name("submission_id", self.submission_id)
        check_priority(self.priority)
        if len(self.members) < LEAST:
            raise ValueError(f"Merge {self.submission_id} has {counted(len(self.members), 'member')}: it needs at least {LEAST}.")
        if (twice := _twice(member.id for member in self.members)) is not None:
            raise ValueError(f"Merge {self.submission_id} has two members called {twice}: each needs an id of its own.")
        if self.on_rejected not in ("drop", "fail"):
            raise ValueError(f"on_rejected {self.on_rejected!r:.60} of the merge {self.submission_id} must be drop or fail.")

    @property
    def kind(self) -> Literal["merge"]:
        return "merge"

    @property
    def needs(self) -> frozenset[str]:
        """The words that a worker's `accepts` must list for it to know this job."""
        return frozenset({self.kind})

    def body(self, model: str, encoding: Encoding) -> bytes:
        """The message for the model's workers. Raises ValueError if the encoding cannot hold it."""
        validation = {"nonce": self.nonce, "shards": self.shards and list(self.shards)}
        fields = {
            "v": 1,
            "kind": self.kind,
            "submission_id": self.submission_id,
            "model": model,
            "model_version": self.model_version,
            "members": [member.fields() for member in self.members],
            "on_rejected": self.on_rejected,
            "validation": without_none(validation),
            "deadline_ms": self.deadline_ms,
            "context": self.context,
        }
        return encoded(without_none(fields), encoding)


AnyJob = Job | Merge


@dataclass(frozen=True)
class Joint:
    """What all members change together. `stderr` and `ci95` are None below two windows, here as in the other parts."""

    delta: float
    stderr: float | None
    ci95: tuple[float, float] | None
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Change:
    """A change of the loss; above 0 it falls."""

    delta: float
    stderr: float | None


@dataclass(frozen=True)
class Contribution:
    """The mean of `alone` and `last`. For two members, and wherever the loss is quadratic, it is the Shapley value."""

    value: float
    stderr: float | None
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Gap:
    """The joint delta minus the sum of the contributions. Where it is `large`, they are a guide, not a measure."""

    value: float
    stderr: float | None
    large: bool


@dataclass(frozen=True)
class Facts:
    """What a candidate's bytes hold. `effective_entries` are those that change a weight, by this member alone."""

    sha256: str
    tensors: int
    entries: int
    effective_entries: int
    l2_norm: float

    @classmethod
    def read(cls, fields: Fields) -> "Facts":
        return cls(
            sha256=fields.digest("sha256"),
            tensors=fields.whole("tensors"),
            entries=fields.whole("entries"),
            effective_entries=fields.whole("effective_entries"),
            l2_norm=fields.number("l2_norm"),
        )


@dataclass(frozen=True)
class Worth:
    """What a member was measured to be worth: by itself, as the last to join, and the mean of both."""

    candidate: Facts
    alone: Change
    last: Change
    contribution: Contribution

    @classmethod
    def read(cls, member: Fields) -> "Worth":
        contribution = member.part("contribution")
        return cls(
            candidate=Facts.read(member.part("candidate")),
            alone=_change(member.part("alone")),
            last=_change(member.part("last")),
            contribution=Contribution(
                contribution.number("value"), contribution.number_or_none("stderr"), contribution.interval_or_none("ci95")
            ),
        )


@dataclass(frozen=True)
class MergedMember:
    """A member, and its worth if it was `scored`; else it was left out, and the worth is the Refusal that says why."""

    id: str
    status: Status
    weight: float
    worth: Worth | Refusal

    @classmethod
    def read(cls, merge: str, member: Any) -> "MergedMember":
        fields = Fields.read(f"a member of {merge}", member)
        id = fields.text("id")
        if not NAME.fullmatch(id):
            raise fields.wrong("id", "1 to 128 characters of A-Z a-z 0-9 . _ : -")
        fields = Fields(f"the member {id} of {merge}", fields.values)
        status = _status(fields)
        worth = Worth.read(fields) if status == "scored" else Refusal.read(fields.part("error"))
        return cls(id, status, fields.number("weight"), worth)


@dataclass(frozen=True)
class Merged:
    """What a merge job measured. `passes` are those over the windows, without that of the unchanged model."""

    joint: Joint
    members: Sequence[MergedMember]
    gap: Gap
    windows: int
    tokens: int
    plan: str
    passes: int

    @property
    def worths(self) -> dict[str, Worth]:
        """By id, of the members that were measured."""
        return {member.id: member.worth for member in self.members if isinstance(member.worth, Worth)}

    @property
    def refusals(self) -> dict[str, Refusal]:
        """By id, of the members that were left out."""
        return {member.id: member.worth for member in self.members if isinstance(member.worth, Refusal)}

    @classmethod
    def read(cls, fields: Fields) -> "Merged":
        joint, gap = fields.part("joint"), fields.part("gap")
        return cls(
            joint=Joint(
                delta=joint.number("delta"),
                stderr=joint.number_or_none("stderr"),
                ci95=joint.interval_or_none("ci95"),
                loss_before=joint.number("loss_before"),
                loss_after=joint.number("loss_after"),
            ),
            members=_members(fields),
            gap=Gap(gap.number("value"), gap.number_or_none("stderr"), gap.flag("large")),
            windows=fields.whole("windows"),
            tokens=fields.whole("tokens"),
            plan=fields.digest("plan"),
            passes=fields.whole("passes"),
        )


def _members(fields: Fields) -> tuple[MergedMember, ...]:
    entries = fields.values.get("members")
    if not isinstance(entries, list):
        raise fields.wrong("members", "a list")
    members = tuple(MergedMember.read(fields.name, entry) for entry in entries)
    if (twice := _twice(member.id for member in members)) is not None:
        raise Malformed(f"members of {fields.name} has {twice} twice.")
    if not any(isinstance(member.worth, Worth) for member in members):
        raise Malformed(f"members of {fields.name} has none that was scored.")
    return members


def _change(fields: Fields) -> Change:
    return Change(fields.number("delta"), fields.number_or_none("stderr"))


def _status(fields: Fields) -> Status:
    match fields.text("status"):
        case "scored":
            return "scored"
        case "rejected":
            return "rejected"
        case "failed":
            return "failed"
    raise fields.wrong("status", "scored, rejected or failed")


def _twice(ids: Iterable[str]) -> str | None:
    """The first id that comes again."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None
