"""The jobs without an answer: held back here, or outstanding at the broker."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scorer_client.jobs import Job
from scorer_client.results import Result


@dataclass(frozen=True, eq=False)
class Pending:
    """A job that waits for its answer, and since when."""

    job: Job
    since: float
    timeout_s: float

    def overdue(self, now: float) -> bool:
        return now - self.since >= self.timeout_s


class Backlog:
    """Jobs of one model version keep their order. A version without workers does not block the others."""

    def __init__(self) -> None:
        self._held: dict[int | None, deque[Pending]] = {}
        self._outstanding: dict[str, Pending] = {}
        self._ids: set[str] = set()

    def __contains__(self, submission_id: str) -> bool:
        return submission_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def held(self) -> int:
        return len(self._ids) - len(self._outstanding)

    def add(self, pending: Pending) -> None:
        self._ids.add(pending.job.submission_id)
        self._held.setdefault(pending.job.model_version, deque()).append(pending)

    def outstanding(self, model_version: int | None) -> int:
        return sum(pending.job.model_version == model_version for pending in self._outstanding.values())

    def sendable(self, room: Callable[[int | None], int]) -> Iterator[Pending]:
        """Held jobs that there is room for. Call `sent` or `drop` for each before asking for the next."""
        for version, queue in list(self._held.items()):
            while queue and room(version) > 0:
                yield queue[0]
            if not queue:
                del self._held[version]

    def sent(self, pending: Pending) -> None:
        self._held[pending.job.model_version].remove(pending)
        self._outstanding[pending.job.submission_id] = pending

    def drop(self, pending: Pending) -> None:
        """Forgets a job that was answered, timed out or was refused."""
        self._ids.discard(pending.job.submission_id)
        if self._outstanding.pop(pending.job.submission_id, None) is None:
            self._held[pending.job.model_version].remove(pending)

    def match(self, result: Result) -> Pending | None:
        """The job that the result answers. A result with the same name for another version is from an earlier run."""
        pending = self._outstanding.get(result.submission_id)
        if pending is None or pending.job.kind != result.kind:
            return None
        return pending if pending.job.model_version in (None, result.model_version) else None

    def overdue(self, now: float) -> list[Pending]:
        every = [*self._outstanding.values(), *(pending for queue in self._held.values() for pending in queue)]
        return [pending for pending in every if pending.overdue(now)]

    def is_outstanding(self, pending: Pending) -> bool:
        return pending.job.submission_id in self._outstanding
