"""The jobs without an outcome: held back here, or outstanding at the broker."""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from scorer_client.errors import PublishRefused
from scorer_client.merges import AnyJob
from scorer_client.promises import Promise
from scorer_client.results import Result


class Stage(Enum):
    HELD = auto()
    SENDING = auto()  # Published, not confirmed yet.
    SENT = auto()
    REFUSED = auto()  # Waits for the handler to hear of it.
    ENDED = auto()


@dataclass(frozen=True)
class Lane:
    """Jobs that the same workers take. They keep their order; a lane without workers does not block the others."""

    model_version: int | None
    needs: frozenset[str]


Room = Callable[[Lane, int], int]  # How many more jobs may be sent, given how many are outstanding.


@dataclass(eq=False)
class Pending:
    """A job that waits for its outcome, and since when. `published`: RabbitMQ may have it, confirmed or not."""

    job: AnyJob
    since: float
    timeout_s: float
    promise: Promise
    stage: Stage = Stage.HELD
    published: bool = False
    error: PublishRefused | None = None

    @property
    def lane(self) -> Lane:
        return Lane(self.job.model_version, self.job.needs)

    @property
    def outstanding(self) -> bool:
        return self.stage in (Stage.SENDING, Stage.SENT)


class Backlog:
    """Finds jobs by submission_id, which is unique among them."""

    def __init__(self) -> None:
        self._jobs: dict[str, Pending] = {}
        self._held: dict[Lane, deque[Pending]] = {}
        self._outstanding: Counter[Lane] = Counter()

    def __contains__(self, submission_id: str) -> bool:
        return submission_id in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def held(self) -> int:
        return sum(map(len, self._held.values()))

    @property
    def outstanding(self) -> int:
        return self._outstanding.total()

    def add(self, pending: Pending) -> None:
        self._jobs[pending.job.submission_id] = pending
        self._held.setdefault(pending.lane, deque()).append(pending)

    def has_room(self, room: Room) -> bool:
        """Is there a held job that may be sent?"""
        return any(room(lane, self._outstanding[lane]) > 0 for lane in self._held)

    def take(self, room: Room) -> Pending | None:
        """The next held job that may be sent. It is outstanding from now on. A job whose caller has cancelled it is dropped."""
        for lane in list(self._held):
            while lane in self._held and room(lane, self._outstanding[lane]) > 0:
                pending = self._held[lane][0]
                if not pending.published and not pending.promise.claim():
                    self.drop(pending)
                    continue
                self._unhold(pending)
                self._move(pending, Stage.SENDING)
                pending.published = True
                return pending
        return None

    def confirmed(self, pending: Pending) -> None:
        """The job may have ended meanwhile: its result can be faster."""
        if pending.stage is Stage.SENDING:
            self._move(pending, Stage.SENT)

    def put_back(self, pending: Pending) -> None:
        """To the front of its lane, because it was not confirmed."""
        if pending.stage is Stage.SENDING:
            self._move(pending, Stage.HELD)
            self._held.setdefault(pending.lane, deque()).appendleft(pending)

    def refuse(self, pending: Pending, error: PublishRefused) -> bool:
        """False if the job has ended meanwhile."""
        if pending.stage is not Stage.SENDING:
            return False
        pending.error = error
        self._move(pending, Stage.REFUSED)
        return True

    def drop(self, pending: Pending) -> None:
        """Forgets a job that has its outcome."""
        if pending.stage is Stage.HELD:
            self._unhold(pending)
        if pending.stage is not Stage.ENDED:
            del self._jobs[pending.job.submission_id]
        self._move(pending, Stage.ENDED)

    def match(self, result: Result) -> Pending | None:
        """The job that the result answers. A result with the same name for another version is from an earlier run."""
        pending = self._jobs.get(result.submission_id)
        if pending is None or not pending.published or pending.error is not None or pending.job.kind != result.kind:
            return None
        return pending if pending.job.model_version in (None, result.model_version) else None

    def cancelled(self) -> list[Pending]:
        """Held jobs that nobody waits for any more. One that RabbitMQ may have stays, so that its result is known."""
        held = (pending for lane in self._held.values() for pending in lane)
        return [pending for pending in held if not pending.published and pending.promise.cancelled()]

    def overdue(self, now: float) -> list[Pending]:
        waiting = (pending for pending in self._jobs.values() if pending.error is None)
        return [pending for pending in waiting if now - pending.since >= pending.timeout_s]

    def every(self) -> list[Pending]:
        return list(self._jobs.values())

    def _unhold(self, pending: Pending) -> None:
        lane = self._held[pending.lane]
        lane.remove(pending)
        if not lane:
            del self._held[pending.lane]

    def _move(self, pending: Pending, stage: Stage) -> None:
        was_outstanding, pending.stage = pending.outstanding, stage
        self._outstanding[pending.lane] += pending.outstanding - was_outstanding
        if not self._outstanding[pending.lane]:
            del self._outstanding[pending.lane]
