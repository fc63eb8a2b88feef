"""The jobs that have no answer yet: held back, or outstanding at the broker."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scorer_client.jobs import Job
from scorer_client.results import Result


@dataclass(frozen=True, eq=False)
class Pending:
    job: Job
    since: float
    timeout_s: float

    def overdue(self, now: float) -> bool:
        return now - self.since >= self.timeout_s


class Backlog:
    """Jobs keep their order among those of one model version; a version without workers holds up no other."""

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

    def released(self, room: Callable[[int | None], int]) -> Iterator[Pending]:
        """Held jobs that there is room for. Each must be `sent` or `dropped` before the next is asked for."""
        for version, queue in list(self._held.items()):
            while queue and room(version) > 0:
                yield queue[0]
            if not queue:
                del self._held[version]

    def sent(self, pending: Pending) -> None:
        self._held[pending.job.model_version].remove(pending)
        self._outstanding[pending.job.submission_id] = pending

    def drop(self, pending: Pending) -> None:
        """Answered, timed out or refused; it is no longer ours."""
        self._ids.discard(pending.job.submission_id)
        if self._outstanding.pop(pending.job.submission_id, None) is None:
            self._held[pending.job.model_version].remove(pending)

    def asked_for(self, result: Result) -> Pending | None:
        """Whose result it is. A result of the same name but for another version is an earlier run's."""
        pending = self._outstanding.get(result.submission_id)
        if pending is None or pending.job.kind != result.kind:
            return None
        return pending if pending.job.model_version in (None, result.model_version) else None

    def overdue(self, now: float) -> list[Pending]:
        every = [*self._outstanding.values(), *(pending for queue in self._held.values() for pending in queue)]
        return [pending for pending in every if pending.overdue(now)]

    def is_outstanding(self, pending: Pending) -> bool:
        return pending.job.submission_id in self._outstanding
