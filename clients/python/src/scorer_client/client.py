"""Submits jobs when workers are ready to take them, and hands every outcome to a handler, a future, or both, once."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from scorer_client.broker import Broker
from scorer_client.errors import BrokerUnavailable, PublishRefused
from scorer_client.fleet import Fleet
from scorer_client.jobs import Candidate, Job
from scorer_client.ledger import Ledger
from scorer_client.merges import AnyJob, Member, Merge, OnRejected
from scorer_client.metrics import Metrics
from scorer_client.outcomes import Outcome
from scorer_client.promises import ThreadPromise
from scorer_client.results import Result
from scorer_client.settings import Settings
from scorer_client.stops import Stop
from scorer_client.workers import FleetUnknown

Handler = Callable[[Outcome], None]


def ignore(outcome: Outcome) -> None:
    """The handler of a program that looks at futures only."""


class Client:
    """Works inside `collect` and `step`, in your thread; or, after `start`, in a thread of its own.

    - A job is held back while no worker of its version is ready, while a live worker of the model does not accept such
      a job, or while Redis is unavailable (see Settings).
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
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._settings = settings or Settings()
        self._wait = wait
        self._ledger = Ledger(broker.endpoint, self._settings, metrics or Metrics(), clock)
        self._changed = threading.Condition(self._ledger.lock)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._closing = False

    def __enter__(self) -> "Client":
        """Connects. Raises BrokerUnavailable if that fails; a connection lost later is restored for as long as it takes."""
        self._broker.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Futures without a result fail with Stopped. Raises what the handler raised in the thread that `start` made."""
        self._closing = True
        if self._thread is not None:
            self._broker.wake()
            self._thread.join()
        self._broker.close()
        self._ledger.stop("The client was closed.")
        if self._failure is not None and error is None:
            raise self._failure

    def __len__(self) -> int:
        """How many jobs have no outcome yet."""
        return len(self._ledger)

    @property
    def held(self) -> int:
        """How many of those have not been sent yet."""
        return self._ledger.held

    def submit(self, job: AnyJob, timeout_s: float | None = None) -> Future[Result]:
        """Accepts a job. Its future has the result, or raises NoResult, PublishRefused or Stopped.

        Beyond `Settings.max_jobs` jobs it waits, or raises BacklogFull where waiting could not help: without `start`,
        and in the handler. Raises ValueError for a submission_id that was used before. A future can be cancelled until
        its job is sent.
        """
        promise = ThreadPromise()
        with self._changed:
            if self._thread is not None and threading.current_thread() is not self._thread:
                self._changed.wait_for(lambda: self._ledger.stopped or not self._ledger.full)
            self._ledger.add(job, timeout_s, promise)
        if self._thread is not None:
            self._broker.wake()
        return promise.future

    def score(
        self,
        submission_id: str,
        model_version: int,
        candidate: Candidate,
        *,
        nonce: str = "",
        shards: Sequence[int] | None = None,
        deadline_ms: int | None = None,
        context: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        stop: Stop | None = None,
    ) -> Future[Result]:
        """Submits a score job: see Job and `submit`."""
        job = Job(submission_id, model_version, candidate, nonce, shards, deadline_ms, context, stop=stop)
        return self.submit(job, timeout_s)

    def validate(
        self,
        submission_id: str,
        model_version: int | None = None,
        *,
        nonce: str = "",
        shards: Sequence[int] | None = None,
        deadline_ms: int | None = None,
        context: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Future[Result]:
        """Submits a validate job: see Job and `submit`."""
        return self.submit(Job(submission_id, model_version, None, nonce, shards, deadline_ms, context), timeout_s)

    def merge(
        self,
        submission_id: str,
        model_version: int,
        members: Sequence[Member],
        *,
        on_rejected: OnRejected = "drop",
        nonce: str = "",
        shards: Sequence[int] | None = None,
        deadline_ms: int | None = None,
        context: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Future[Result]:
        """Submits a merge job: see Merge and `submit`."""
        merge = Merge(submission_id, model_version, members, on_rejected, nonce, shards, deadline_ms, context)
        return self.submit(merge, timeout_s)

    def collect(self, handler: Handler = ignore, jobs: Iterable[AnyJob] = ()) -> None:
        """Returns when every job has its outcome. Takes each of `jobs` when there is room for it.

        After an exception from the handler, call it again: the jobs are kept. Give it an iterator, to go on with `jobs`.
        """
        self._check_no_thread()
        coming = iter(jobs)
        while self._fill(coming):
            self.step(handler)

    def step(self, handler: Handler = ignore) -> None:
        """One turn of the loop, about `tick_s` long."""
        self._check_no_thread()
        self._step(handler)

    def start(self, handler: Handler = ignore) -> None:
        """From now on the client works in a thread of its own, which calls the handler too.

        If the handler raises, the client stops: futures fail, and leaving the `with` block raises what the handler raised.
        """
        self._check_no_thread()
        self._thread = threading.Thread(target=self._run, args=(handler,), name="scorer-client", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """After `start`: returns when every job has its outcome. Raises Stopped."""
        if self._thread is None:
            raise RuntimeError("The client has no thread of its own: use `collect`, or call `start` first.")
        with self._changed:
            self._changed.wait_for(lambda: self._ledger.stopped or not len(self._ledger))
            self._ledger.check_running()

    def _check_no_thread(self) -> None:
        if self._thread is not None:
            raise RuntimeError("The client works in its own thread since `start`: use futures, its handler and `join`.")

    def _fill(self, coming: Iterator[AnyJob]) -> bool:
        """False when there is nothing left to do."""
        while not self._ledger.full:
            job = next(coming, None)
            if job is None:
                break
            self.submit(job)
        return len(self._ledger) > 0

    def _run(self, handler: Handler) -> None:
        try:
            while not self._closing:
                self._step(handler)
        except Exception as error:
            self._failure = error
            self._broker.close()
            self._ledger.stop("The client has stopped after an exception.", error)
            self._notify()

    def _step(self, handler: Handler) -> None:
        try:
            if self._connected():
                self._consume()
                self._send()
                self._receive()
        except BrokerUnavailable as error:
            self._ledger.disconnected(error)
        self._hand_over(handler)

    def _connected(self) -> bool:
        if self._broker.connected:
            return True
        wait_s = self._ledger.reconnect_in()
        if wait_s > 0:
            if not self._ledger.busy:
                self._wait(min(wait_s, self._settings.tick_s))
            return False
        self._broker.connect()
        self._ledger.reconnected()
        return True

    def _consume(self) -> None:
        if not self._broker.consuming and self._ledger.consume_due():
            self._ledger.consume_tried(self._broker.consume())

    def _send(self) -> None:
        if self._ledger.fleet_due():
            try:
                self._ledger.learn(self._fleet.workers())
            except FleetUnknown as unknown:
                self._ledger.learn(unknown)
        if not self._broker.consuming:
            return self._ledger.no_queue()
        while (taken := self._ledger.take()) is not None:
            pending, body = taken
            try:
                self._broker.publish(pending.job.submission_id, self._settings.encoding, body, pending.job.priority)
            except PublishRefused as error:
                self._ledger.refused(pending, error)
                self._check_channel(error)
            except BrokerUnavailable:
                self._ledger.unconfirmed(pending)
                raise
            else:
                self._ledger.confirmed(pending)
        return None

    def _check_channel(self, error: PublishRefused) -> None:
        """RabbitMQ refuses some jobs by closing the channel."""
        if not self._broker.connected:
            raise BrokerUnavailable(str(error)) from error

    def _receive(self) -> None:
        for delivery in self._broker.receive(0 if self._ledger.busy else self._settings.tick_s):
            self._ledger.arrived(delivery)

    def _hand_over(self, handler: Handler) -> None:
        """One outcome per turn, so that the connection is served between two."""
        turn = self._ledger.turn()
        if turn is None:
            return
        if turn.outcome is not None:
            handler(turn.outcome)
        self._ledger.done(turn)
        self._notify()
        if turn.delivery is None:
            return
        try:
            self._broker.acknowledge(turn.delivery)
        except BrokerUnavailable as error:
            self._ledger.disconnected(error)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
