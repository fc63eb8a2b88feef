"""Submits jobs when workers are ready to take them, and hands every answer to a handler once."""

import logging
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from scorer_client.backlog import Backlog, Pending
from scorer_client.bounded_set import BoundedSet
from scorer_client.broker import Broker, BrokerUnavailable, Delivery, PublishRefused
from scorer_client.fields import Malformed
from scorer_client.fleet import Fleet
from scorer_client.flow_control import FlowControl
from scorer_client.jobs import Job
from scorer_client.outcomes import Answer, Outcome, TimedOut, Unreadable
from scorer_client.results import Result
from scorer_client.settings import Settings

log = logging.getLogger(__name__)

Handler = Callable[[Outcome], None]


class TopologyMissing(Exception):
    """Workers are ready, but there is no queue to read results from."""


class Client:
    """Uses one thread and one connection. All work is done inside `collect` and `step`.

    - A job is held back while no worker of its version is ready, or while Redis is unavailable (see Settings).
    - A job is sent when the broker confirms it. If the connection is lost first, it is published again, so the broker
      may have it twice; its answer is still handed over once.
    - A result is acknowledged when the handler returns. If the handler raises, it is handed over again.
    - A handler that runs longer than the AMQP heartbeat (60 s, or `?heartbeat=` in the URL) loses the connection, but
      no job and no result.
    """

    def __init__(
        self,
        broker: Broker,
        fleet: Fleet,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._broker = broker
        self._settings = settings or Settings()
        self._clock = clock
        self._wait = wait
        self._flow = FlowControl(fleet, self._settings, clock)
        self._backlog = Backlog()
        self._inbox: deque[tuple[Delivery, Result | Malformed]] = deque()
        self._message_ids = BoundedSet(self._settings.remembered_answers)
        self._answered = BoundedSet(self._settings.remembered_answers)
        self._backoff_s = self._settings.reconnect_min_s
        self._connect_at = self._swept_at = self._consume_at = float("-inf")
        self._missing_since: float | None = None

    def __enter__(self) -> "Client":
        """Connects. Raises BrokerUnavailable if that fails; a connection lost later is restored for as long as it takes."""
        self._broker.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._broker.close()

    def __len__(self) -> int:
        """How many jobs have no outcome yet."""
        return len(self._backlog)

    @property
    def held(self) -> int:
        """How many of those have not been sent yet."""
        return self._backlog.held

    def submit(self, job: Job, timeout_s: float | None = None) -> None:
        """Accepts a job, which `collect` sends. It ends with an Answer or a TimedOut. Raises ValueError for a repeated name."""
        if job.submission_id in self._backlog or _answer_key(job.submission_id, job.model_version) in self._answered:
            raise ValueError(f"Job {job.submission_id} was already submitted: to run it again, use another submission_id.")
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        self._backlog.add(Pending(job, self._clock(), timeout_s))

    def collect(self, handler: Handler) -> None:
        """Returns when every job has its outcome. After an exception from `step`, call it again: the other jobs are kept."""
        while self._backlog:
            self.step(handler)

    def step(self, handler: Handler) -> None:
        """One turn of the loop, about `tick_s` long. Raises PublishRefused, whose job is dropped, or TopologyMissing."""
        try:
            if self._connected():
                self._consume()
                self._send()
                self._receive()
                self._hand_over(handler)
        except BrokerUnavailable as error:
            self._disconnected(error)
        self._sweep(handler)

    def _connected(self) -> bool:
        if self._broker.connected:
            return True
        wait_s = self._connect_at - self._clock()
        if wait_s > 0:
            self._wait(min(wait_s, self._settings.tick_s))
            return False
        self._broker.connect()
        log.warning("RabbitMQ is available again.")
        self._backoff_s = self._settings.reconnect_min_s
        return True

    def _disconnected(self, error: BrokerUnavailable) -> None:
        if self._backoff_s == self._settings.reconnect_min_s:
            log.warning("%s Reconnecting until it is back.", error)
        self._inbox.clear()  # Results that were not acknowledged are delivered again.
        self._connect_at = self._clock() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._settings.reconnect_max_s)

    def _consume(self) -> None:
        """The first worker declares the queue, so a missing queue is an error only once a worker is ready."""
        if self._broker.consuming or self._clock() < self._consume_at:
            return
        if self._broker.consume():
            self._missing_since = None
        self._consume_at = self._clock() + self._settings.poll_interval_s

    def _send(self) -> None:
        if not self._backlog.held:
            return
        self._flow.refresh()
        for pending in self._backlog.sendable(self._room):
            if not self._broker.consuming:
                return self._check_missing_queue()
            self._publish(pending)

    def _room(self, model_version: int | None) -> int:
        return self._flow.room(model_version, self._backlog.outstanding(model_version))

    def _publish(self, pending: Pending) -> None:
        job, encoding = pending.job, self._settings.encoding
        try:
            self._broker.publish(job.submission_id, encoding, job.body(self._broker.model, encoding))
        except PublishRefused:
            self._backlog.drop(pending)
            raise
        self._backlog.sent(pending)
        self._flow.sent()

    def _check_missing_queue(self) -> None:
        if self._missing_since is None:
            self._missing_since = self._clock()
        if self._clock() - self._missing_since >= self._settings.missing_queue_timeout_s:
            self._missing_since = None
            raise TopologyMissing(self._broker.missing_queue())

    def _receive(self) -> None:
        for delivery in self._broker.receive(0 if self._inbox else self._settings.tick_s):
            self._inbox.append((delivery, _read(delivery, self._broker.model)))

    def _hand_over(self, handler: Handler) -> None:
        """One result per turn, so that the connection is served between two results."""
        if not self._inbox:
            return
        delivery, result = self._inbox[0]
        if isinstance(result, Malformed):
            handler(Unreadable(str(result), delivery.message_id, delivery.body))
        elif not self._is_duplicate(delivery, result):
            self._answer(delivery, result, handler)
        self._inbox.popleft()
        self._broker.acknowledge(delivery)

    def _is_duplicate(self, delivery: Delivery, result: Result) -> bool:
        """Also true for a second answer, such as `failed` for a copy of a job that was scored."""
        if _answer_key(result.submission_id, result.model_version) in self._answered:
            return True
        # A job that was submitted again after it timed out may get the same message that was late the first time.
        return self._backlog.match(result) is None and (delivery.message_id or "") in self._message_ids

    def _answer(self, delivery: Delivery, result: Result, handler: Handler) -> None:
        pending = self._backlog.match(result)
        handler(Answer(pending.job if pending else None, result))
        if delivery.message_id:
            self._message_ids.add(delivery.message_id)
        if pending is not None:
            for version in (pending.job.model_version, result.model_version):
                self._answered.add(_answer_key(result.submission_id, version))
            self._backlog.drop(pending)

    def _sweep(self, handler: Handler) -> None:
        """Times out overdue jobs, except those whose result is waiting for the handler."""
        now = self._clock()
        if now - self._swept_at < self._settings.tick_s:
            return
        self._swept_at = now
        arrived = {result.submission_id for _, result in self._inbox if isinstance(result, Result)}
        for pending in self._backlog.overdue(now):
            if pending.job.submission_id not in arrived:
                handler(TimedOut(pending.job, now - pending.since, self._backlog.is_outstanding(pending)))
                self._backlog.drop(pending)


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
