"""The Python client for asyncio against real services and a real worker, which are killed meanwhile.

    WORKER_BINARY=target/debug/scorer python3 tests/python_aio_client_live.py

Starts its own RabbitMQ and Redis, and needs what tests/python_client_live.py needs, whose jobs it submits.
"""

import asyncio
import contextlib
import logging
import time
import unittest
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable

import aio_pika
from python_client_live import (
    DENIED,
    REFUSED_BY_REDIS,
    cases,
    demo_jobs,
    demo_table,
    honest,
    job_of,
    redis_with_a_password,
)
from scorer_client import (
    Answer,
    BrokerUnavailable,
    Candidate,
    FleetUnknown,
    Job,
    Loss,
    Metrics,
    Nacked,
    NoResult,
    NotSent,
    Outcome,
    Refusal,
    Result,
    Settings,
    Stop,
    Stopped,
    Unroutable,
)
from scorer_client.aio import Broker, Client, Fleet
from scorer_client.workers import ready

from live_stack import CASES, DEAD_NODE, MODEL, SOON_S, VERSION, Binary, Services

services: Services
binary: Binary


def setUpModule() -> None:
    global services, binary
    for name in ("aio_pika", "aiormq", "asyncio", "scorer_client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    services = Services()
    unittest.addModuleCleanup(services.stop)
    unittest.addModuleCleanup(services.kill_rabbitmq)  # There is nothing to keep, and an orderly end takes its time.
    binary = Binary(services)


async def until(what: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain: {what}")
        await asyncio.sleep(0.05)


class Counted(Metrics):
    """Counts what the hooks are called with."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.now = (0, 0)

    def submitted(self, job: Job) -> None:
        self.counts["submitted"] += 1

    def answered(self, job: Job, result: Result, seconds: float) -> None:
        self.counts[f"{result.status} {result.code}"] += 1

    def load(self, held: int, outstanding: int) -> None:
        self.now = (held, outstanding)

    def reconnected(self) -> None:
        self.counts["reconnected"] += 1


class Live(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.namespace = f"aio-{uuid.uuid4().hex[:8]}"
        self.worker = binary.worker(self.namespace)
        self.addCleanup(self.worker.kill)
        self.outcomes: list[Outcome] = []
        self.metrics = Counted()

    async def ready_worker(self) -> None:
        self.worker.start()
        fleet = self.fleet()
        deadline = time.monotonic() + SOON_S
        while not ready(await fleet.workers()):
            self.assertLess(time.monotonic(), deadline, f"no worker is ready; its log ends with:\n{self.worker.last_words()}")
            await asyncio.sleep(0.05)
        await fleet.close()

    def fleet(self) -> Fleet:
        return Fleet(services.redis, MODEL, self.namespace)

    def broker(self, **options: str | float) -> Broker:
        return Broker(services.amqp, MODEL, self.namespace, **options)

    @contextlib.asynccontextmanager
    async def client(self, broker: Broker | None = None, handler=None, **settings: float) -> AsyncIterator[Client]:
        settings = {"timeout_s": SOON_S} | settings
        client = Client(
            broker or self.broker(), self.fleet(), Settings(**settings), handler or self.handler, metrics=self.metrics
        )
        async with client:
            yield client

    async def handler(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def names(self) -> list[str]:
        return sorted(outcome.job.submission_id for outcome in self.outcomes if isinstance(outcome, Answer) and outcome.job)

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
        async with await aio_pika.connect(services.amqp) as connection:
            yield await connection.channel()


class Answers(Live):
    async def test_scores_are_the_expected_ones(self) -> None:
        await self.ready_worker()
        usable = [case for case in cases.values() if demo_jobs.usable(case, VERSION)]
        async with self.client() as client:
            loss = client.validate("loss")
            scores = (await client.submit(job_of(case)) for case in usable)
            *results, measured = await asyncio.gather(*[future async for future in scores], loss)
            self.assertEqual(len(client), 0)
        for case, result in zip(usable, results, strict=True):
            agrees, gap = demo_table.judge(result.fields, case)
            self.assertTrue(agrees, f"{result.submission_id}: {result.verdict}, off by {gap}")
        self.assertIsInstance(measured.verdict, Loss)
        self.assertEqual(self.metrics.counts["submitted"], len(usable) + 1)

    async def test_a_job_waits_for_the_first_worker_unless_it_is_cancelled(self) -> None:
        async with self.client() as client:
            waits, withdrawn = (asyncio.create_task(client.validate(name)) for name in ("waits", "withdrawn"))
            await until("both are held", lambda: client.held == 2)
            withdrawn.cancel()
            await until("one is held", lambda: len(client) == 1)
            self.worker.start()
            self.assertIsInstance((await waits).verdict, Loss)
        self.assertEqual((self.names, self.metrics.counts["scored None"]), (["waits"], 1))

    async def test_a_failed_job_is_a_result_with_its_code(self) -> None:
        await self.ready_worker()
        candidate = Candidate("binary_v2", "param_diff", url=(CASES.parent / "nothing").as_uri(), sha256="0" * 64, size=1)
        async with self.client() as client:
            result = await client.score("nowhere", VERSION, candidate, stop=Stop(proven=True), context={"miner": 7})
        self.assertEqual((result.status, result.code, result.fields["context"]), ("failed", "candidate_unavailable", {"miner": 7}))
        self.assertIsInstance(result.verdict, Refusal)
        self.assertEqual(self.metrics.counts["failed candidate_unavailable"], 1)

    async def test_a_handler_that_raises_stops_the_client_and_leaves_the_result_in_its_queue(self) -> None:
        await self.ready_worker()

        async def failing(outcome: Outcome) -> None:
            raise OSError("the disk is full")

        with self.assertRaisesRegex(OSError, "the disk is full"):
            async with self.client(handler=failing) as client:
                future = await client.submit(Job("loss"))
                with self.assertRaises(Stopped):
                    await future
                with self.assertRaises(Stopped):
                    await client.submit(Job("another"))
        async with self.client():  # Another process, which knows of no job.
            await until("the result comes again", lambda: self.outcomes)
        (answer,) = self.outcomes
        self.assertEqual((answer.job, answer.result.submission_id), (None, "loss"))

    async def test_a_queue_that_is_deleted_is_consumed_again(self) -> None:
        await self.ready_worker()
        broker = self.broker(own_queue=f"{self.namespace}.own")
        async with self.client(broker) as client, self.channel() as channel:
            await until("results are consumed", lambda: broker.consuming)
            await channel.queue_delete(f"{self.namespace}.own")
            await until("the loss is noticed and mended", lambda: not broker.consuming)
            self.assertIsInstance((await client.validate("loss")).verdict, Loss)
            await broker.delete_own_queue()


class BadDays(Live):
    """Every job has one outcome, whatever dies."""

    async def every_job_once(self, client: Client, jobs: list[Job], break_it) -> None:
        """Breaks something while there are jobs at the broker, jobs held back, and jobs that wait for room."""
        futures = []

        async def submit_all() -> None:
            for job in jobs:
                futures.append(await client.submit(job))
                self.assertLessEqual(len(client), 20)

        submitting = asyncio.create_task(submit_all())
        await until("some are answered", lambda: len(self.outcomes) >= 5)
        self.assertLess(len(self.outcomes), len(jobs) - 5, "the middle has passed")
        await break_it()
        await submitting
        await client.join()
        names = sorted(job.submission_id for job in jobs)
        self.assertEqual(self.names, names)
        self.assertEqual(len(self.outcomes), len(jobs))
        results = await asyncio.gather(*futures)
        self.assertEqual(sorted(result.submission_id for result in results), names)
        self.assertEqual(self.metrics.counts["scored None"], len(jobs))
        self.assertEqual(self.metrics.now, (0, 0))

    async def test_rabbitmq_is_killed(self) -> None:
        await self.ready_worker()
        queues = [f"{self.namespace}.{kind}.{MODEL}" for kind in ("dead", "jobs", "results")]
        await asyncio.to_thread(services.remembers, queues)
        broker = self.broker()

        async def kill() -> None:
            await asyncio.to_thread(services.kill_rabbitmq)
            await until("the loss is noticed", lambda: not broker.connected)
            services.start_rabbitmq()

        async with self.client(broker, max_jobs=20) as client:
            await self.every_job_once(client, honest(range(40)), kill)
        self.assertEqual(self.metrics.counts["reconnected"], 1)

    async def test_connections_are_closed_by_force_and_the_next_node_is_dead(self) -> None:
        await self.ready_worker()
        names: list[str] = []
        broker = Broker([services.amqp, DEAD_NODE], MODEL, self.namespace)
        async with self.client(broker) as client:
            services.close_connections()
            while not self.metrics.counts["reconnected"]:  # However long it takes, it happens amid jobs.
                jobs = honest(range(len(names), len(names) + 4))
                names += [job.submission_id for job in jobs]
                await asyncio.gather(*[await client.submit(job) for job in jobs])
            self.assertEqual(broker.node, Broker(services.amqp, MODEL).endpoint.address)
        self.assertEqual(self.names, sorted(names))
        self.assertEqual(len(self.outcomes), len(names))

    async def test_rabbitmq_is_frozen(self) -> None:
        await self.ready_worker()
        broker = self.broker(reply_timeout_s=1.0)
        async with self.client(broker) as client:
            await until("results are consumed", lambda: broker.consuming)
            services.freeze_rabbitmq()
            self.addCleanup(services.thaw_rabbitmq)
            with self.assertRaisesRegex(NoResult, "Job frozen has no result"):
                await client.validate("frozen", timeout_s=2.0)
            services.thaw_rabbitmq()
            self.assertIsInstance((await client.validate("thawed")).verdict, Loss)

    async def test_redis_is_stopped(self) -> None:
        await self.ready_worker()
        async with self.client() as client:
            fleet = self.fleet()
            self.assertEqual(await fleet.accepts(VERSION) & {"score", "validate"}, {"score", "validate"})
            await asyncio.to_thread(services.stop_redis)
            try:
                with self.assertRaises(FleetUnknown):
                    await fleet.capacity(VERSION)
                waiting = asyncio.create_task(client.validate("waits"))
                await until("it is held", lambda: client.held == 1)
            finally:
                await asyncio.to_thread(services.start_redis)
            self.assertIsInstance((await waiting).verdict, Loss)
            await fleet.close()


class Refusals(Live):
    """What the broker does not take is an outcome, and an exception of the future. No worker is needed."""

    async def test_without_a_queue_a_job_is_unroutable(self) -> None:
        await self.refused(Unroutable, "no exchange .*scorer topology --declare")
        async with self.channel() as channel:
            exchange = await channel.declare_exchange(f"{self.namespace}.jobs", "direct")
            await self.refused(Unroutable, "no queue is bound for jobs of tinylm")
            await exchange.delete()

    async def test_a_full_queue_refuses(self) -> None:
        async with self.channel() as channel:
            exchange = await channel.declare_exchange(f"{self.namespace}.jobs", "direct")
            full = {"x-max-length": 1, "x-overflow": "reject-publish"}
            queue = await channel.declare_queue(exclusive=True, arguments=full)
            await queue.bind(exchange, MODEL)
            await exchange.publish(aio_pika.Message(b"first"), MODEL)
            await self.refused(Nacked, "Job name was not accepted: the queue .* refused it")
            await exchange.delete()

    async def refused(self, kind: type[Exception], sentence: str) -> None:
        broker = self.broker()
        await broker.connect()
        with self.assertRaisesRegex(kind, sentence):
            await broker.publish("name", "application/msgpack", b"body")
        await broker.close()

    async def test_a_login_that_is_refused_is_told_from_a_service_that_is_away(self) -> None:
        for found, given, said in DENIED:
            with self.assertRaisesRegex(BrokerUnavailable, f"^RabbitMQ at [0-9.:]+ denies access: {said}") as raised:
                await Broker(services.amqp.replace(found, given), MODEL).connect()
            self.assertNotRegex(str(raised.exception), "hunter2|is running")
        for login in ("", ":hunter2@", "stranger:hunter2@"):
            fleet = Fleet(services.redis.replace("//", f"//{login}"), MODEL)
            with redis_with_a_password(services), self.assertRaisesRegex(FleetUnknown, REFUSED_BY_REDIS) as unknown:
                await fleet.workers()
            self.assertNotRegex(str(unknown.exception), "hunter2|is running")
            await fleet.close()

    async def test_a_refused_job_is_an_outcome_of_its_own(self) -> None:
        async with self.channel() as channel:
            results = await channel.declare_queue(f"{self.namespace}.results.{MODEL}")
            away = Fleet("redis://127.0.0.1:1", MODEL)  # Nobody listens there, so the job goes out blindly.
            settings = Settings(outstanding_without_heartbeats=1)
            async with Client(self.broker(), away, settings, self.handler) as client:
                with self.assertRaises(Unroutable):
                    await client.validate("loss")
                await client.join()
            await results.delete()
        (refused,) = self.outcomes
        self.assertIsInstance(refused, NotSent)


if __name__ == "__main__":
    unittest.main()
