"""Submits jobs when there is somebody to take them, and hands every answer to the caller once."""

import logging
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from scorer_client.backlog import Backlog, Pending
from scorer_client.broker import Broker, BrokerAway, Delivery, PublishRefused
from scorer_client.fields import Malformed
from scorer_client.fleet import Fleet
from scorer_client.jobs import Job
from scorer_client.memory import Memory
from scorer_client.outcomes import Answer, Outcome, TimedOut, Unreadable
from scorer_client.results import Result
from scorer_client.roster import Roster
from scorer_client.settings import Settings

log = logging.getLogger(__name__)

Handler = Callable[[Outcome], None]


class TopologyMissing(Exception):
    """Jobs could go out, and yet there is no queue to read their results from."""


class Aggregator:
    """One thread and one connection; nothing happens but inside `collect` and `step`.

    - A job is held back while no worker of its version is ready, and while Redis does not tell (see Settings).
    - A job is submitted when the broker has confirmed it. If the connection is lost before, it is published again, so
      the broker may have it twice; its answer is handed over once.
    - A result is acknowledged after the handler has returned. If the handler raises, the same result comes again.
    - A handler that takes longer than the AMQP heartbeat (60 s, or `?heartbeat=` of the URL) costs the connection,
      and nothing else.
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
        self._roster = Roster(fleet, self._settings, clock)
        self._backlog = Backlog()
        self._inbox: deque[tuple[Delivery, Result | Malformed]] = deque()
        self._message_ids = Memory(self._settings.remembered)
        self._answered = Memory(self._settings.remembered)
        self._backoff_s = self._settings.reconnect_first_s
        self._connect_at = self._swept_at = self._listen_at = float("-inf")
        self._missing_since: float | None = None

    def __enter__(self) -> "Aggregator":
        """Raises BrokerAway if the first connection fails; later losses are waited out."""
        self._broker.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._broker.close()

    def __len__(self) -> int:
        """Jobs without an answer."""
        return len(self._backlog)

    @property
    def held(self) -> int:
        """Those of them that have not gone out yet."""
        return self._backlog.held

    def submit(self, job: Job, timeout_s: float | None = None) -> None:
        """Takes the job over. It goes out in `collect`, and ends there in an Answer or a TimedOut."""
        if job.submission_id in self._backlog or _name(job.submission_id, job.model_version) in self._answered:
            raise ValueError(f"Job {job.submission_id} was submitted already: to have it done again, give it another name.")
        timeout_s = self._settings.timeout_s if timeout_s is None else timeout_s
        self._backlog.add(Pending(job, self._clock(), timeout_s))

    def collect(self, handler: Handler) -> None:
        """Returns when every job has its outcome. What `step` raises leaves all other jobs as they are: call it again."""
        while self._backlog:
            self.step(handler)

    def step(self, handler: Handler) -> None:
        """One turn of the loop, of about a tick. Raises PublishRefused, whose job is given back; TopologyMissing."""
        try:
            if self._connected():
                self._listen()
                self._send()
                self._receive()
                self._hand_over(handler)
        except BrokerAway as away:
            self._lost(away)
        self._sweep(handler)

    def _connected(self) -> bool:
        if self._broker.connected:
            return True
        missing_s = self._connect_at - self._clock()
        if missing_s > 0:
            self._wait(min(missing_s, self._settings.tick_s))
            return False
        self._broker.connect()
        log.warning("RabbitMQ is there again.")
        self._backoff_s = self._settings.reconnect_first_s
        return True

    def _lost(self, away: BrokerAway) -> None:
        if self._backoff_s == self._settings.reconnect_first_s:
            log.warning("%s Connecting again for as long as it takes.", away)
        self._inbox.clear()  # What was not acknowledged comes again.
        self._connect_at = self._clock() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._settings.reconnect_most_s)

    def _listen(self) -> None:
        """The queue comes with the first worker, so that it is not there is a fault only when one is ready."""
        if self._broker.listening or self._clock() < self._listen_at:
            return
        if self._broker.listen():
            self._missing_since = None
        self._listen_at = self._clock() + self._settings.look_every_s

    def _send(self) -> None:
        if not self._backlog.held:
            return
        self._roster.look()
        for pending in self._backlog.released(self._room):
            if not self._broker.listening:
                return self._complain_in_time()
            self._publish(pending)

    def _room(self, model_version: int | None) -> int:
        return self._roster.room(model_version, self._backlog.outstanding(model_version))

    def _publish(self, pending: Pending) -> None:
        job, encoding = pending.job, self._settings.encoding
        try:
            self._broker.publish(job.submission_id, encoding, job.body(self._broker.model, encoding))
        except PublishRefused:
            self._backlog.drop(pending)
            raise
        self._backlog.sent(pending)
        self._roster.sent()

    def _complain_in_time(self) -> None:
        if self._missing_since is None:
            self._missing_since = self._clock()
        if self._clock() - self._missing_since >= self._settings.missing_for_s:
            self._missing_since = None
            raise TopologyMissing(self._broker.missing())

    def _receive(self) -> None:
        for delivery in self._broker.receive(0 if self._inbox else self._settings.tick_s):
            self._inbox.append((delivery, _read(delivery, self._broker.model)))

    def _hand_over(self, handler: Handler) -> None:
        """One result a turn, so that the connection is looked after between two."""
        if not self._inbox:
            return
        delivery, result = self._inbox[0]
        if isinstance(result, Malformed):
            handler(Unreadable(str(result), delivery.message_id, delivery.body))
        elif not self._known(delivery, result):
            self._answer(delivery, result, handler)
        self._inbox.popleft()
        self._broker.acknowledge(delivery)

    def _known(self, delivery: Delivery, result: Result) -> bool:
        """A second copy; or a second answer, such as `failed` to a copy of a job that is scored."""
        if _name(result.submission_id, result.model_version) in self._answered:
            return True
        # A job that timed out and was submitted again may get the very answer that came too late the first time.
        return self._backlog.asked_for(result) is None and (delivery.message_id or "") in self._message_ids

    def _answer(self, delivery: Delivery, result: Result, handler: Handler) -> None:
        pending = self._backlog.asked_for(result)
        handler(Answer(pending.job if pending else None, result))
        if delivery.message_id:
            self._message_ids.add(delivery.message_id)
        if pending is not None:
            for version in (pending.job.model_version, result.model_version):
                self._answered.add(_name(result.submission_id, version))
            self._backlog.drop(pending)

    def _sweep(self, handler: Handler) -> None:
        """Times out what is overdue, but not what is answered by a result that waits for the handler."""
        now = self._clock()
        if now - self._swept_at < self._settings.tick_s:
            return
        self._swept_at = now
        here = {result.submission_id for _, result in self._inbox if isinstance(result, Result)}
        for pending in self._backlog.overdue(now):
            if pending.job.submission_id not in here:
                handler(TimedOut(pending.job, now - pending.since, self._backlog.is_outstanding(pending)))
                self._backlog.drop(pending)


def _name(submission_id: str, model_version: int | None) -> str:
    """An answer's, as the broker's message ids begin."""
    return f"{submission_id}:{model_version}"


def _read(delivery: Delivery, model: str) -> Result | Malformed:
    try:
        result = Result.read(delivery.body, delivery.content_type)
    except Malformed as problem:
        return problem
    if result.model != model:
        return Malformed(f"The result of {result.submission_id} is of the model {result.model!r:.80}, not of {model}.")
    return result
