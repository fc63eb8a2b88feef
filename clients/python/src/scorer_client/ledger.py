"""Everything that a client decides, without any input or output: what is sent when, and which outcome a job has."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scorer_client.backlog import Backlog, Lane, Pending
from scorer_client.bounded_set import BoundedSet
from scorer_client.console import counted
from scorer_client.endpoint import Delivery, Endpoint
from scorer_client.errors import BacklogFull, BrokerUnavailable, NoResult, PublishRefused, Stopped, Unencodable
from scorer_client.fields import Malformed
from scorer_client.flow_control import FlowControl
from scorer_client.merges import AnyJob
from scorer_client.metrics import Metrics, call
from scorer_client.outcomes import Answer, NotSent, Outcome, TimedOut, Unreadable
from scorer_client.promises import Promise
from scorer_client.results import Result
from scorer_client.settings import Settings
from scorer_client.workers import FleetUnknown, Worker

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Turn:
    """What the handler hears next (nothing, for a duplicate), the message to acknowledge then, and the job that ends."""

    outcome: Outcome | None
    delivery: Delivery | None = None
    pending: Pending | None = None
    result: Result | None = None


class Ledger:
    """One thread or task does what it says and reports what became of it; any thread may add jobs.

    Futures are completed without `lock`, because their callbacks may do anything.
    """

    def __init__(self, endpoint: Endpoint, settings: Settings, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self._endpoint = endpoint
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._flow = FlowControl(settings, clock)
        self._backlog = Backlog()
        self._inbox: deque[tuple[Delivery, Result | Malformed]] = deque()
        self._ending: deque[Pending] = deque()  # Refused or overdue.
        self._handing = False  # A job's outcome is with the handler.
        self._message_ids = BoundedSet(settings.remembered_answers)
        self._answered = BoundedSet(settings.remembered_answers)
        self._backoff_s = settings.reconnect_min_s
        self._connect_at = self._swept_at = self._consume_at = float("-inf")
        self._missing_since: float | None = None
        self._stopped: tuple[str, BaseException | None] | None = None
        self._load = (0, 0)

    # Jobs

    def __len__(self) -> int:
        return len(self._backlog)

    @property
    def held(self) -> int:
        with self.lock:
            return self._backlog.held

    @property
    def stopped(self) -> bool:
        return self._stopped is not None

    @property
    def full(self) -> bool:
        """The job whose outcome is with the handler does not count, so that the handler can submit another one."""
        return len(self._backlog) - self._handing >= self._settings.max_jobs

    def add(self, job: AnyJob, timeout_s: float | None, promise: Promise) -> None:
        """Raises Stopped, BacklogFull, or ValueError for a name that was used before."""
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        with self.lock:
            self.check_running()
            if job.submission_id in self._backlog or _answer_key(job.submission_id, job.model_version) in self._answered:
                raise ValueError(f"Job {job.submission_id} was already submitted: to run it again, use another submission_id.")
            if self.full:
                allowed = counted(self._settings.max_jobs, "job")
                raise BacklogFull(f"Job {job.submission_id} must wait: Settings.max_jobs allows {allowed} without an outcome.")
            self._backlog.add(Pending(job, self._clock(), timeout_s, promise))
        call(self._metrics.submitted, job)
        self._report_load()

    def check_running(self) -> None:
        """Raises Stopped."""
        if self._stopped is not None:
            why, cause = self._stopped
            raise Stopped(why) from cause

    def stop(self, why: str, cause: BaseException | None = None) -> None:
        """Every future fails, and no job is accepted any more."""
        with self.lock:
            if self._stopped is not None:
                return
            self._stopped = (why, cause)
            left = self._backlog.every()
            for pending in left:
                self._backlog.drop(pending)
        for pending in left:
            stopped = Stopped(why)
            stopped.__cause__ = cause
            pending.promise.fail(stopped)
        self._report_load()

    # The connection

    def reconnect_in(self) -> float:
        """Seconds until the next attempt to connect."""
        return max(0.0, self._connect_at - self._clock())

    def reconnected(self) -> None:
        log.warning("RabbitMQ is available again.")
        self._backoff_s = self._settings.reconnect_min_s
        call(self._metrics.reconnected)

    def disconnected(self, error: BrokerUnavailable) -> None:
        if self._backoff_s == self._settings.reconnect_min_s:
            log.warning("%s Reconnecting until it is back.", error)
        self._inbox.clear()  # Results that were not acknowledged are delivered again.
        self._consume_at = float("-inf")
        self._connect_at = self._clock() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._settings.reconnect_max_s)
        call(self._metrics.disconnected, error)

    def consume_due(self) -> bool:
        """Is it time to look for the results queue again?"""
        return self._clock() >= self._consume_at

    def consume_tried(self, consuming: bool) -> None:
        if consuming:
            self._missing_since = None
        self._consume_at = self._clock() + self._settings.poll_interval_s

    # Sending

    def fleet_due(self) -> bool:
        """Should the heartbeats be read?"""
        return self._backlog.held > 0 and self._flow.due

    def learn(self, workers: Iterable[Worker] | FleetUnknown) -> None:
        self._flow.learn(workers)

    def take(self) -> tuple[Pending, bytes] | None:
        """The next job to publish, and its message. Report `confirmed`, `unconfirmed` or `refused` for it."""
        while True:
            with self.lock:
                pending = self._backlog.take(self._room)
            if pending is None:
                return None
            self._flow.take()
            self._report_load()
            try:
                return pending, pending.job.body(self._endpoint.model, self._settings.encoding)
            except ValueError as error:
                self.refused(pending, Unencodable(pending.job.submission_id, str(error)))

    def confirmed(self, pending: Pending) -> None:
        with self.lock:
            self._backlog.confirmed(pending)
        call(self._metrics.confirmed, pending.job, self._clock() - pending.since)

    def unconfirmed(self, pending: Pending) -> None:
        """The connection was lost: the job is published again."""
        with self.lock:
            self._backlog.put_back(pending)
        self._report_load()

    def refused(self, pending: Pending, error: PublishRefused) -> None:
        with self.lock:
            if self._backlog.refuse(pending, error):
                self._ending.append(pending)
        self._report_load()

    def no_queue(self) -> None:
        """Results cannot be consumed, so nothing is sent.

        The first worker declares the queue, so a missing queue is an error only once a worker has been ready for a while.
        """
        if not self._backlog.has_room(self._room):
            return
        if self._missing_since is None:
            self._missing_since = self._clock()
        if self._clock() - self._missing_since < self._settings.missing_queue_timeout_s:
            return
        self._missing_since = None
        while (taken := self.take()) is not None:
            self.refused(taken[0], self._endpoint.topology_missing(taken[0].job.submission_id))

    # Results

    def arrived(self, delivery: Delivery) -> None:
        self._inbox.append((delivery, _read(delivery, self._endpoint.model)))

    def turn(self) -> Turn | None:
        """What to hand over next. Call `done` after that; if the handler raises, it is handed over again."""
        with self.lock:
            self._sweep()
            turn = self._next_ending() or self._next_result()
            self._handing = turn is not None and turn.pending is not None
        return turn

    @property
    def busy(self) -> bool:
        """Is there anything to hand over?"""
        return bool(self._inbox or self._ending)

    def done(self, turn: Turn) -> None:
        """The handler has returned."""
        with self.lock:
            self._handing = False
            if self._ending and self._ending[0] is turn.pending:
                self._ending.popleft()
            if self._inbox and self._inbox[0][0] is turn.delivery:
                self._inbox.popleft()
            if turn.pending is not None:
                self._backlog.drop(turn.pending)
            self._remember(turn)
        self._settle(turn)
        self._report_load()

    def _sweep(self) -> None:
        """Finds overdue jobs, except those whose result is waiting for the handler, and drops cancelled ones."""
        now = self._clock()
        if now - self._swept_at < self._settings.tick_s:
            return
        self._swept_at = now
        for pending in self._backlog.cancelled():
            pending.promise.claim()
            self._backlog.drop(pending)
        arrived = {result.submission_id for _, result in self._inbox if isinstance(result, Result)}
        for pending in self._backlog.overdue(now):
            if pending.job.submission_id not in arrived and pending not in self._ending:
                self._ending.append(pending)

    def _next_ending(self) -> Turn | None:
        if not self._ending:
            return None
        pending = self._ending[0]
        if pending.error is not None:
            return Turn(NotSent(pending.job, pending.error), pending=pending)
        model, job = self._endpoint.model, pending.job
        why = "" if pending.published else self._flow.held_back(model, job.model_version, job.needs)
        return Turn(TimedOut(pending.job, self._clock() - pending.since, pending.outstanding, why), pending=pending)

    def _next_result(self) -> Turn | None:
        if not self._inbox:
            return None
        delivery, result = self._inbox[0]
        if isinstance(result, Malformed):
            return Turn(Unreadable(str(result), delivery.message_id, delivery.body), delivery)
        if self._is_duplicate(delivery, result):
            return Turn(None, delivery, result=result)
        pending = self._backlog.match(result)
        return Turn(Answer(pending.job if pending else None, result), delivery, pending, result)

    def _is_duplicate(self, delivery: Delivery, result: Result) -> bool:
        """Also true for a second answer, such as `failed` for a copy of a job that was scored."""
        if _answer_key(result.submission_id, result.model_version) in self._answered:
            return True
        # A job that was submitted again after it timed out may get the same message that was late the first time.
        return self._backlog.match(result) is None and (delivery.message_id or "") in self._message_ids

    def _remember(self, turn: Turn) -> None:
        if turn.outcome is None or turn.delivery is None or turn.result is None:
            return
        if turn.delivery.message_id:
            self._message_ids.add(turn.delivery.message_id)
        if turn.pending is not None:
            for version in (turn.pending.job.model_version, turn.result.model_version):
                self._answered.add(_answer_key(turn.result.submission_id, version))

    def _settle(self, turn: Turn) -> None:
        """Completes the future, and counts."""
        match turn.outcome, turn.pending:
            case Answer(result=result), Pending(job=job) as pending:
                pending.promise.keep(result)
                call(self._metrics.answered, job, result, self._clock() - pending.since)
            case TimedOut(job=job) as outcome, Pending() as pending:
                pending.promise.fail(NoResult(str(outcome)))
                call(self._metrics.timed_out, job)
            case NotSent(job=job, error=error), Pending() as pending:
                pending.promise.fail(error)
                call(self._metrics.not_sent, job, error)
            case None, None if turn.result is not None:
                call(self._metrics.duplicate, turn.result)

    def _room(self, lane: Lane, outstanding: int) -> int:
        return self._flow.room(lane.model_version, lane.needs, outstanding)

    def _report_load(self) -> None:
        with self.lock:
            load = (self._backlog.held, self._backlog.outstanding)
        if load != self._load:
            self._load = load
            call(self._metrics.load, *load)


def _answer_key(submission_id: str, model_version: int | None) -> str:
    """Identifies an answer, in the form in which the workers' message ids begin."""
    return f"{submission_id}:{model_version}"


def _read(delivery: Delivery, model: str) -> Result | Malformed:
    try:
        result = Result.read(delivery.body, delivery.content_type)
    except Malformed as problem:
        return problem
    if result.model != model:
        return Malformed(f"The result of {result.submission_id} is for the model {result.model!r:.80}, not for {model}.")
    return result
