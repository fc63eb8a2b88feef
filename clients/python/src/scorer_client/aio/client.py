"""The client for asyncio. What it decides is in `scorer_client.ledger`, as for the blocking client."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from scorer_client.aio.broker import Broker
from scorer_client.aio.fleet import Fleet
from scorer_client.backlog import Pending
from scorer_client.errors import BrokerUnavailable, PublishRefused
from scorer_client.jobs import Candidate, Job
from scorer_client.ledger import Ledger, Turn
from scorer_client.merges import AnyJob, Member, Merge, OnRejected
from scorer_client.metrics import Metrics
from scorer_client.outcomes import Outcome
from scorer_client.promises import TaskPromise
from scorer_client.results import Result
from scorer_client.settings import Settings
from scorer_client.stops import Stop
from scorer_client.workers import FleetUnknown

Handler = Callable[[Outcome], Awaitable[None]]


async def ignore(outcome: Outcome) -> None:
    """The handler of a program that looks at results only."""


class Client:
    """Works in two tasks, from entering `async with` until leaving it.

    - A job is held back while no worker of its version is ready, while a live worker of the model does not accept such
      a job, or while Redis is unavailable (see Settings).
    - A job is sent when the broker confirms it. If the connection is lost first, it is published again, so the broker
      may have it twice; its answer is still handed over once.
    - A result is acknowledged when the handler returns, which is called with one outcome at a time. If it raises, the
      client stops: futures fail with Stopped, leaving `async with` raises what the handler raised, and the result stays
      in its queue.
    """

    def __init__(
        self,
        broker: Broker,
        fleet: Fleet,
        settings: Settings | None = None,
        handler: Handler = ignore,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._fleet = fleet
        self._settings = settings or Settings()
        self._handler = handler
        self._ledger = Ledger(broker.endpoint, self._settings, metrics or Metrics(), clock)
        self._sending = asyncio.Event()  # There may be something to send, or to connect.
        self._handing = asyncio.Event()  # There may be something to hand over.
        self._gate = asyncio.Lock()  # Only the first in the queue of those that submit waits for room.
        self._room = asyncio.Event()
        self._empty = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._careful = 0  # How many jobs are to be published one by one: RabbitMQ may have meant one of them.
        self._failure: BaseException | None = None

    async def __aenter__(self) -> "Client":
        """Connects. Raises BrokerUnavailable if that fails; a connection lost later is restored for as long as it takes."""
        self._broker.listen(self._arrived, self._sending.set)
        await self._broker.connect()
        self._tasks = [asyncio.create_task(self._send_all()), asyncio.create_task(self._hand_all())]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Futures without a result fail with Stopped. Raises what the handler raised."""
        self._closing = True
        self._ledger.stop("The client was closed.")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._notify()
        await self._broker.close()
        await self._fleet.close()
        if self._failure is not None and error is None:
            raise self._failure

    def __len__(self) -> int:
        """How many jobs have no outcome yet."""
        return len(self._ledger)

    @property
    def held(self) -> int:
        """How many of those have not been sent yet."""
        return self._ledger.held

    async def submit(self, job: AnyJob, timeout_s: float | None = None) -> asyncio.Future[Result]:
        """Accepts a job. Its future has the result, or raises NoResult, PublishRefused or Stopped.

        Beyond `Settings.max_jobs` jobs it waits; in the handler, which makes room, it raises BacklogFull instead. Raises
        ValueError for a submission_id that was used before. To cancel the future withdraws the job if it was not sent
        yet; else its result goes to the handler only.
        """
        if asyncio.current_task() in self._tasks:
            return self._add(job, timeout_s)
        async with self._gate:
            while self._ledger.full and not self._ledger.stopped:
                self._room.clear()
                await self._room.wait()
            return self._add(job, timeout_s)

    async def score(
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
    ) -> Result:
        """The result of a score job: see Job and `submit`."""
        job = Job(submission_id, model_version, candidate, nonce, shards, deadline_ms, context, stop=stop)
        return await self._result(job, timeout_s)

    async def validate(
        self,
        submission_id: str,
        model_version: int | None = None,
        *,
        nonce: str = "",
        shards: Sequence[int] | None = None,
        deadline_ms: int | None = None,
        context: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Result:
        """The result of a validate job: see Job and `submit`."""
        job = Job(submission_id, model_version, None, nonce, shards, deadline_ms, context)
        return await self._result(job, timeout_s)

    async def merge(
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
    ) -> Result:
        """The result of a merge job: see Merge and `submit`."""
        merge = Merge(submission_id, model_version, members, on_rejected, nonce, shards, deadline_ms, context)
        return await self._result(merge, timeout_s)

    async def collect(self, jobs: Iterable[AnyJob] | AsyncIterable[AnyJob] = ()) -> None:
        """Returns when every job has its outcome. Takes each of `jobs` when there is room for it. Raises Stopped."""
        if isinstance(jobs, AsyncIterable):
            async for job in jobs:
                await self.submit(job)
        else:
            for job in jobs:
                await self.submit(job)
        await self.join()

    async def join(self) -> None:
        """Returns when every job has its outcome. Raises Stopped."""
        while len(self._ledger):
            await self._empty.wait()
        self._ledger.check_running()

    async def _result(self, job: AnyJob, timeout_s: float | None) -> Result:
        if asyncio.current_task() in self._tasks:
            raise RuntimeError("A handler cannot wait for a result, which is handed over after it returns: use `submit`.")
        return await (await self.submit(job, timeout_s))

    def _add(self, job: AnyJob, timeout_s: float | None) -> asyncio.Future[Result]:
        promise = TaskPromise()
        self._ledger.add(job, timeout_s, promise)
        self._empty.clear()
        self._sending.set()
        return promise.future

    # One task keeps the connection and sends jobs.

    async def _send_all(self) -> None:
        while True:
            self._sending.clear()
            try:
                await self._connect()
                await self._consume()
                await self._send()
            except BrokerUnavailable as error:
                self._ledger.disconnected(error)
            else:
                await self._wait(self._sending)

    async def _connect(self) -> None:
        await self._broker.check()
        if self._broker.connected:
            return
        await asyncio.sleep(self._ledger.reconnect_in())
        await self._broker.connect()
        self._ledger.reconnected()

    async def _consume(self) -> None:
        if not self._broker.consuming and self._ledger.consume_due():
            self._ledger.consume_tried(await self._broker.consume())

    async def _send(self) -> None:
        if self._ledger.fleet_due():
            try:
                self._ledger.learn(await self._fleet.workers())
            except FleetUnknown as unknown:
                self._ledger.learn(unknown)
        if not self._broker.consuming:
            self._ledger.no_queue()
            self._handing.set()
            return
        while batch := self._batch():
            await self._publish_all(batch)

    def _batch(self) -> list[tuple[Pending, bytes]]:
        """All jobs that may be sent now. Their confirms are waited for together."""
        taken = iter(self._ledger.take, None)
        if self._careful == 0:
            return list(taken)
        self._careful -= 1
        return list(itertools.islice(taken, 1))

    async def _publish_all(self, batch: list[tuple[Pending, bytes]]) -> None:
        alone = len(batch) == 1
        try:
            publishing = (self._publish(pending, body, alone) for pending, body in batch)
            outcomes = await asyncio.gather(*publishing, return_exceptions=True)
        finally:
            # From the last to the first, so that they go out again in their order.
            for pending, _ in reversed(batch):
                self._ledger.unconfirmed(pending)
        for outcome in outcomes:
            if outcome is not None:
                self._careful = self._careful if alone else len(batch)
                raise outcome

    async def _publish(self, pending: Pending, body: bytes, alone: bool) -> None:
        try:
            await self._broker.publish(pending.job.submission_id, self._settings.encoding, body, alone, pending.job.priority)
        except PublishRefused as error:
            self._ledger.refused(pending, error)
            self._handing.set()
            if not self._broker.connected:  # It refused the job by closing the channel.
                raise BrokerUnavailable(str(error)) from error
        else:
            self._ledger.confirmed(pending)

    # The other hands over what there is, one outcome at a time.

    async def _hand_all(self) -> None:
        while True:
            self._handing.clear()
            while (turn := self._ledger.turn()) is not None:
                await self._hand_over(turn)
            self._notify()  # A cancelled job makes room, too.
            await self._wait(self._handing)

    async def _hand_over(self, turn: Turn) -> None:
        if turn.outcome is not None:
            await self._handler(turn.outcome)
        self._ledger.done(turn)
        self._notify()
        self._sending.set()
        if turn.delivery is not None:
            await self._broker.acknowledge(turn.delivery)

    def _arrived(self, delivery: Any) -> None:
        self._ledger.arrived(delivery)
        self._handing.set()

    def _notify(self) -> None:
        if self._ledger.stopped or not self._ledger.full:
            self._room.set()
        if not len(self._ledger):
            self._empty.set()

    async def _wait(self, event: asyncio.Event) -> None:
        """Until something happens, or a tick has passed."""
        try:
            async with asyncio.timeout(self._settings.tick_s):
                await event.wait()
        except TimeoutError:
            pass

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task ends by being cancelled when the client is left, or because the handler has raised."""
        if self._closing or self._failure is not None:
            return
        self._failure = RuntimeError("The handler was cancelled.") if task.cancelled() else task.exception()
        for other in self._tasks:
            other.cancel()
        self._ledger.stop("The client has stopped after an exception.", self._failure)
        self._notify()
