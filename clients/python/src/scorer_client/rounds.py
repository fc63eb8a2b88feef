"""A round: from the scores of its candidates to one merge of those that help, and to what each is paid.

Without any input or output, so it is the same for both clients:

    round = Round("epoch-12:merge", answers)
    while (merge := round.next_merge()) is not None:
        round.add(client.submit(merge).result())  # asyncio: round.add(await (await client.submit(merge)))
    payments = round.settle().payments()
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scorer_client.jobs import Candidate, Job, check_name
from scorer_client.merges import LEAST, Gap, Member, Merge, Merged
from scorer_client.outcomes import Answer
from scorer_client.refusals import Refusal
from scorer_client.results import Result, Score

MAX_MEMBERS = 64  # the default of candidates.max_members


class Unsettled(Exception):
    """Nobody can be paid: a merge has no result yet or was refused, or nothing has measured the candidate that is left."""


@dataclass(frozen=True)
class Settlement:
    """What is paid for: the members that were measured, their weights in the merge, and what they change together.

    Where the `gap` is `large`, the contributions are a guide, not a measure.
    """

    contributions: Mapping[str, float]
    weights: Mapping[str, float]
    joint_delta: float
    gap: Gap

    def payments(self, *, with_gap: bool = False) -> dict[str, float]:
        """In units of the loss. Who is not in it is paid nothing.

        A member is paid its contribution, or 0 if that is below 0. `with_gap`, it is paid its contribution plus an equal
        share of the gap: these sum to `joint_delta`, and one may be below 0.
        """
        if not with_gap:
            return {id: max(value, 0.0) for id, value in self.contributions.items()}
        return {id: value + self.gap.value / len(self.contributions) for id, value in self.contributions.items()}


@dataclass(frozen=True)
class _Entry:
    """A candidate of the round that was scored."""

    job: Job
    candidate: Candidate
    model_version: int
    score: Score

    @property
    def helps(self) -> bool:
        """Its whole interval is above 0. A score that was stopped has none, nor has one of a single window."""
        return self.score.stopped is None and self.score.ci95 is not None and self.score.ci95[0] > 0


class Round:
    """Merges the candidates of a round whose whole 95 % interval is above 0, to pay them for what they add to the others.

    `answers` are those of its score jobs; answers without a job, and those of other jobs, are passed over. All scores must
    be of one model version and one plan. The members of the merge are named by the submission_ids of their score jobs.
    What is wrong with any of this raises ValueError.

    Beyond `max_members`, which must not exceed the workers' candidates.max_members, the best by delta are chosen.
    `weights` has the weight of each candidate by its submission_id; without it, each is one by the number of members. The
    windows are those of the scores, unless `nonce` chooses others: on the windows that they were chosen by, candidates
    look a little better than they are.

    With `leave_out_negative`, members whose contribution is below 0 are left out, and the others are merged again, as
    SUBMISSION_ID:2, :3 and so on, until no contribution is below 0 or fewer than two members are left. There is no merge
    of fewer than two: the one that is left is worth what it changes by itself.
    """

    def __init__(
        self,
        submission_id: str,
        answers: Iterable[Answer],
        *,
        weights: Mapping[str, float] | None = None,
        nonce: str | None = None,
        leave_out_negative: bool = False,
        max_members: int = MAX_MEMBERS,
    ) -> None:
        if max_members < LEAST:
            raise ValueError(f"max_members {max_members} must be at least {LEAST}.")
        self._submission_id = submission_id
        self._weights = weights
        self._nonce = nonce
        self._leave_out_negative = leave_out_negative
        self._entries = _scored(answers)
        helping = [id for id, entry in self._entries.items() if entry.helps]
        best = sorted(helping, key=lambda id: (-self._entries[id].score.delta, id))
        self.chosen = best[:max_members]
        """The submission_ids of those to merge, the best by delta first."""
        self.crowded_out = best[max_members:]
        """Those for which there was no room."""
        self.negative: list[str] = []
        """Those that were left out because their contribution was below 0."""
        self.refused: dict[str, Refusal] = {}
        """Those that were refused within a merge, and why. The others kept their weights."""
        self.merged: Merged | None = None
        """What the latest merge measured."""
        self.refusal: Refusal | None = None
        """Why a whole merge was refused, which ends the round."""
        self._left = self.chosen
        self._stands = False  # The latest merge has nobody to leave out.
        self._number = 1  # Of the next merge.
        self._check()

    def next_merge(self) -> Merge | None:
        """The merge to submit, or None if there is none left. It is the same one until `add` has its result."""
        if self._stands or self.refusal is not None or len(self._left) < LEAST:
            return None
        first = self._entries[self._left[0]]
        weights = {} if self._weights is None else self._weights
        members = [Member(id, self._entries[id].candidate, weights.get(id)) for id in self._left]
        nonce = first.job.nonce if self._nonce is None else self._nonce
        return Merge(self._name(self._number), first.model_version, members, nonce=nonce, shards=first.job.shards)

    def add(self, result: Result) -> None:
        """The result of that merge. Raises ValueError for any other."""
        merge = self.next_merge()
        if merge is None or result.submission_id != merge.submission_id:
            raise ValueError(f"The result of {result.submission_id} answers no merge that this round waits for.")
        match result.verdict:
            case Refusal() as refusal:
                self.refusal = refusal
            case Merged() as merged:
                self._check_result(merge, result.model_version, merged)
                self._learn(merged)
            case other:
                raise ValueError(f"The result of {result.submission_id} is a {type(other).__name__}, not that of a merge.")

    def settle(self) -> Settlement:
        """What is paid for. Raises Unsettled."""
        if self.refusal is not None:
            raise Unsettled(f"The merge {self._name(self._number)} was refused: {self.refusal.code}: {self.refusal.message}")
        if self.next_merge() is not None:
            raise Unsettled(f"The merge {self._name(self._number)} has no result yet.")
        if self.merged is None or not self._stands:
            return self._alone()
        worths = self.merged.worths
        return Settlement(
            contributions={id: worth.contribution.value for id, worth in worths.items()},
            weights={member.id: member.weight for member in self.merged.members if member.id in worths},
            joint_delta=self.merged.joint.delta,
            gap=self.merged.gap,
        )

    def _alone(self) -> Settlement:
        """Of one candidate, or of none."""
        weights = {id: 1.0 if self._weights is None else self._weights[id] for id in self._left}
        worths = {id: self._worth_alone(id, weight) for id, weight in weights.items()}
        return Settlement(worths, weights, sum(worths.values(), 0.0), Gap(0.0, None, False))

    def _worth_alone(self, id: str, weight: float) -> float:
        """By its score, where its weight was 1, or by a merge in which it had this weight."""
        if weight == 1:
            return self._entries[id].score.delta
        if self.merged is not None:
            return self.merged.worths[id].alone.delta
        raise Unsettled(f"{id} was chosen alone, and nothing has measured it with its weight of {weight}.")

    def _learn(self, merged: Merged) -> None:
        self.merged = merged
        self.refused |= merged.refusals
        self._number += 1
        worths = merged.worths
        negative = [id for id in self._left if id in worths and worths[id].contribution.value < 0]
        self._stands = not (self._leave_out_negative and negative)
        if not self._stands:
            self.negative += negative
            self._left = [id for id in self._left if id in worths and id not in negative]

    def _check(self) -> None:
        """Makes the first merge, and the longest name, so that what is wrong with them is said now."""
        check_name("submission_id", self._name(max(len(self.chosen), LEAST)))
        if self._weights is not None:
            for id in self.chosen:
                if id not in self._weights:
                    raise ValueError(f"weights has none for {id}, which was chosen.")
        self.next_merge()

    def _check_result(self, merge: Merge, model_version: int, merged: Merged) -> None:
        """That it answers this merge, and that its numbers belong together: people pay by them."""
        if model_version != merge.model_version:
            raise ValueError(f"The result of {merge.submission_id} is of model version {model_version}.")
        equal = 1 / len(merge.members)
        asked = {member.id: equal if member.weight is None else member.weight for member in merge.members}
        if {member.id: member.weight for member in merged.members} != asked:
            raise ValueError(f"The result of {merge.submission_id} has other members than its merge, or other weights.")
        if self._nonce is None and merged.plan != self._entries[self._left[0]].score.plan:
            raise ValueError(f"The result of {merge.submission_id} has another plan than the scores.")
        parts = [worth.contribution.value for worth in merged.worths.values()] + [merged.gap.value]
        if not math.isclose(math.fsum(parts), merged.joint.delta, rel_tol=1e-6, abs_tol=1e-9 * max(map(abs, parts))):
            raise ValueError(f"The result of {merge.submission_id} contradicts itself: contributions and gap are not joint.delta.")

    def _name(self, number: int) -> str:
        return self._submission_id if number == 1 else f"{self._submission_id}:{number}"


def _scored(answers: Iterable[Answer]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for answer in answers:
        match answer:
            case Answer(Job(candidate=Candidate() as candidate) as job, Result(verdict=Score() as score) as result):
                if job.submission_id in entries:
                    raise ValueError(f"Job {job.submission_id} has two answers in one round.")
                entries[job.submission_id] = _Entry(job, candidate, result.model_version, score)
    for what, found in (
        ("model versions", {entry.model_version for entry in entries.values()}),
        ("plans", {entry.score.plan for entry in entries.values()}),
    ):
        if len(found) > 1:
            raise ValueError(f"The scores of a round are of {len(found)} {what}: they can only be compared within one.")
    return entries
