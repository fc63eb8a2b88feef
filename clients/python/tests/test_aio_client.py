"""The asyncio client without any service: cancellation, back-pressure, and what happens between publish and confirm."""

import asyncio
import logging
import socket
import unittest
from unittest import mock

from aiormq.exceptions import ChannelAccessRefused, InvalidFrameError, ProbableAuthenticationError
from scorer_client import (
    Answer,
    BacklogFull,
    BrokerUnavailable,
    FleetUnknown,
    Job,
    NoResult,
    NotSent,
    PublishRefused,
    Settings,
    Stopped,
    TopologyMissing,
    Unencodable,
)
from scorer_client import aio
from scorer_client.aio.broker import _reason
from test_client import NOWHERE, FakeBroker, Recorded, message, worker


def setUpModule():
    for name in ("aiormq", "scorer_client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class Known:
    """A fleet that is what the test says; None = Redis away."""

    def __init__(self, *workers):
        self.now = list(workers)

    async def workers(self):
        if self.now is None:
            raise FleetUnknown("Redis is away.")
        return self.now

    async def close(self):
        pass


class Broker:
    """Keeps what is published, and confirms it unless the test holds that back."""

    endpoint = FakeBroker.endpoint

    def __init__(self):
        self.connected = self.consuming = False
        self.has_queue = True
        self.published, self.acknowledged = [], []
        self.confirming = asyncio.Event()
        self.confirming.set()
        self.losing = asyncio.Event()
        self.connections = 0

    def listen(self, arrived, woken):
        self.arrived, self.woken = arrived, woken

    async def connect(self):
        self.connections += 1
        self.connected = True
        self.losing.clear()

    async def close(self):
        self.connected = self.consuming = False

    async def check(self):
        pass

    async def consume(self):
        self.consuming = self.has_queue
        return self.consuming

    async def publish(self, submission_id, content_type, body, alone, priority):
        self.published.append(submission_id)
        waits = [asyncio.create_task(event.wait()) for event in (self.confirming, self.losing)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.losing.is_set():
            self.connected = self.consuming = False
            raise BrokerUnavailable("lost")

    async def acknowledge(self, delivery):
        self.acknowledged.append(delivery.tag)


class Clients(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.broker, self.fleet, self.metrics, self.outcomes = Broker(), Known(worker()), Recorded(), []
        self.handled = self.keep

    async def keep(self, outcome):
        self.outcomes.append(outcome)

    def client(self, **settings):
        settings = Settings(**{"timeout_s": 60, "tick_s": 0.01, "poll_interval_s": 0.01, "reconnect_min_s": 0.01} | settings)
        return aio.Client(self.broker, self.fleet, settings, lambda outcome: self.handled(outcome), metrics=self.metrics)

    async def until(self, holds):
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.001)

    async def answer(self, submission_id, content_type, body, alone, priority):
        """A `publish` that has the result at once."""
        self.broker.arrived(message(submission_id))

    @property
    def answered(self):
        return [outcome.job and outcome.job.submission_id for outcome in self.outcomes if isinstance(outcome, Answer)]

    async def test_jobs_that_were_not_confirmed_are_published_again_in_their_order(self):
        self.broker.confirming.clear()
        async with self.client() as client:
            waiting = [await client.submit(Job(name)) for name in "abcd"]
            await self.until(lambda: len(self.broker.published) == 4)
            self.broker.losing.set()
            await self.until(lambda: self.broker.connections == 2)
            self.broker.confirming.set()
            await self.until(lambda: len(self.broker.published) == 8)
            for name in "abcdabcd":
                self.broker.arrived(message(name))
            await asyncio.gather(*waiting)
            await self.until(lambda: len(self.broker.acknowledged) == 8)
        self.assertEqual((self.broker.published, self.answered), (list("abcdabcd"), list("abcd")))

    async def test_one_job_that_closes_the_channel_is_found_and_the_others_go_on(self):
        async def publish(submission_id, content_type, body, alone, priority):
            self.broker.published.append(submission_id)
            if submission_id == "c" or not self.broker.connected:
                self.broker.connected = self.broker.consuming = False
                raise PublishRefused(submission_id, "406.") if alone else BrokerUnavailable("the channel was closed")
            self.broker.arrived(message(submission_id))

        self.broker.publish = publish
        async with self.client() as client:
            futures = [await client.submit(Job(name)) for name in "abcdef"]
            ended = await asyncio.gather(*futures, return_exceptions=True)
        self.assertEqual([isinstance(end, PublishRefused) for end in ended], [False, False, True, False, False, False])
        self.assertEqual(sorted(self.answered), list("abdef"))

    async def test_a_result_may_be_faster_than_its_confirm(self):
        self.broker.confirming.clear()
        async with self.client() as client:
            waiting = await client.submit(Job("a"))
            await self.until(lambda: self.broker.published)
            self.broker.arrived(message("a"))
            self.assertEqual((await waiting).status, "scored")
            self.broker.losing.set()
            await self.until(lambda: self.broker.connections == 2)
            self.broker.confirming.set()
            last = await client.submit(Job("last"))
            await self.until(lambda: "last" in self.broker.published)
            self.broker.arrived(message("last"))
            await last
        self.assertEqual((self.broker.published, self.answered), (["a", "last"], ["a", "last"]))

    async def test_a_cancelled_caller_withdraws_a_held_job_and_leaves_a_sent_one_to_the_handler(self):
        async with self.client() as client:
            sent = asyncio.create_task(client.validate("sent", 7))
            held = asyncio.create_task(client.validate("held", 8))
            await self.until(lambda: self.broker.published == ["sent"] and client.held == 1)
            for task in (sent, held):
                task.cancel()
            await self.until(lambda: len(client) == 1)
            self.broker.arrived(message("sent"))
            await client.join()
        self.assertTrue(sent.cancelled() and held.cancelled())
        self.assertEqual((self.broker.published, self.answered), (["sent"], ["sent"]))

    async def test_submit_waits_for_room_and_a_cancelled_one_passes_its_turn_on(self):
        self.fleet.now = [worker(held=2, accepting=False)]
        async with self.client(max_jobs=2) as client:
            waiting = [asyncio.create_task(client.validate(name)) for name in "abcdef"]
            await self.until(lambda: self.broker.published == list("ab"))
            waiting[2].cancel()
            self.broker.arrived(message("a"))
            await self.until(lambda: self.broker.published == list("abd"))
            self.assertEqual(len(client), 2)
            for name in "bdef":
                self.broker.arrived(message(name))
                await self.until(lambda name=name: name in self.answered)
            done = await asyncio.gather(*waiting, return_exceptions=True)
        self.assertIsInstance(done[2], asyncio.CancelledError)
        self.assertEqual(self.broker.published, list("abdef"))

    async def test_collect_takes_jobs_as_there_is_room(self):
        async def jobs():
            for number, name in enumerate("abcdef"):
                self.assertGreaterEqual(len(self.outcomes), number - 2)
                yield Job(name)

        self.broker.publish = self.answer
        async with self.client(max_jobs=2) as client:
            await client.collect(jobs())
            await client.collect([Job("g"), Job("h")])
        self.assertEqual(self.answered, list("abcdefgh"))

    async def test_a_handler_may_submit_in_place_of_the_job_that_ends(self):
        refused = []

        async def handler(outcome):
            await self.keep(outcome)
            if outcome.job.submission_id == "a":
                await client.submit(Job("b"))
                try:
                    await client.submit(Job("c"))
                except BacklogFull as full:
                    refused.append(full)

        self.handled = handler
        self.broker.publish = self.answer
        async with self.client(max_jobs=1) as client:
            await client.submit(Job("a"))
            await client.join()
        self.assertEqual((self.answered, len(refused)), (["a", "b"], 1))

    async def test_a_handler_that_would_wait_for_itself_is_told(self):
        async def handler(outcome):
            await client.validate("b")

        self.handled = handler
        self.broker.publish = self.answer
        with self.assertRaisesRegex(RuntimeError, "A handler cannot wait for a result"):
            async with self.client() as client:
                with self.assertRaises(Stopped):
                    await client.validate("a")

    async def test_every_bad_end_is_an_exception_and_an_outcome(self):
        self.broker.has_queue = False
        async with self.client(missing_queue_timeout_s=0.01) as client:
            with self.assertRaises(TopologyMissing):
                await client.validate("a")
            with self.assertRaises(NoResult):
                await client.validate("b", 8, timeout_s=0.02)
            self.broker.has_queue = True
            with self.assertRaises(Unencodable):
                await client.validate("c", context={"c": object()})
        kinds = [type(outcome) for outcome in self.outcomes]
        self.assertEqual((kinds[0], kinds[2], len(kinds)), (NotSent, NotSent, 3))
        named = [name for name, *_ in self.metrics.calls if name in ("not_sent", "timed_out")]
        self.assertEqual(named, ["not_sent", "timed_out", "not_sent"])

    async def test_leaving_stops_what_waits(self):
        self.fleet.now = None
        async with self.client(max_jobs=1) as client:
            held = asyncio.create_task(client.validate("a"))
            for_room = asyncio.create_task(client.validate("b"))
            await self.until(lambda: client.held == 1)
        for task in (held, for_room):
            with self.assertRaises(Stopped):
                await task
        with self.assertRaises(Stopped):
            await client.validate("c")

    async def test_a_handler_that_is_cancelled_stops_the_client(self):
        async def handler(outcome):
            raise asyncio.CancelledError

        self.handled = handler
        with self.assertRaisesRegex(RuntimeError, "The handler was cancelled"):
            async with self.client() as client:
                self.broker.arrived(message("a"))
                with self.assertRaises(Stopped):
                    await client.validate("b")
        self.assertEqual(self.broker.acknowledged, [])


class Addresses(unittest.IsolatedAsyncioTestCase):
    async def test_a_service_that_is_away_is_a_sentence(self):
        with self.assertRaisesRegex(BrokerUnavailable, f"^RabbitMQ at {NOWHERE} is unavailable: .*address is correct.$"):
            await aio.Broker(f"amqp://{NOWHERE}", "tinylm").connect()
        fleet = aio.Fleet(f"redis://:secret@{NOWHERE}", "tinylm")
        with self.assertRaisesRegex(FleetUnknown, f"^Redis at {NOWHERE} cannot be read: .* address is correct.$"):
            await fleet.accepts()
        await fleet.close()

    def test_a_broker_that_denies_access_is_not_away(self):
        closed = "Expected one of ['Connection.OpenOk'], got <Connection.Close object at 0x7f>"
        tuned = "Expected one of ['Connection.Tune'], got <Connection.Close object at 0x7f>"
        for error, text, denied in (
            (ProbableAuthenticationError("ACCESS_REFUSED"), "it refused the login of u; check the user and the password", True),
            (InvalidFrameError(closed), "it does not let u use the virtual host '/v'; check that it exists", True),
            (InvalidFrameError(tuned), tuned, False),
            (ChannelAccessRefused("ACCESS_REFUSED - no queue"), "ACCESS_REFUSED - no queue", True),
            (ConnectionError("reset"), "reset", False),
        ):
            reason = _reason("amqp://u:secret@h/%2fv", error)
            self.assertIn(text, reason.text)
            self.assertEqual(reason.denied, denied, error)

    async def test_a_node_that_says_nothing_costs_a_moment_and_every_reason_is_given(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, mock.patch("scorer_client.aio.broker.CONNECT_TIMEOUT_S", 0.2):
            place = f"127.0.0.1:{silent.getsockname()[1]}"
            broker = aio.Broker([f"amqp://u:secret@{place}", f"amqp://u:secret@{NOWHERE}"], "tinylm")
            with self.assertRaises(BrokerUnavailable) as raised:
                await broker.connect()
        said = str(raised.exception)
        for part in (f"{place}: no reply within 0.2 s", f"{NOWHERE}: "):
            self.assertIn(part, said)
        self.assertNotIn("secret", said)
        self.assertIsNone(broker.node)

    def test_urls_are_checked(self):
        with self.assertRaisesRegex(ValueError, "begin with amqp://"):
            aio.Broker("http://x", "tinylm")
        with self.assertRaisesRegex(ValueError, "write /%2f"):
            aio.Broker("amqp://x/", "tinylm")
        with self.assertRaisesRegex(ValueError, "'abc', is not a database number"):
            aio.Fleet(f"redis://{NOWHERE}/abc", "tinylm")


if __name__ == "__main__":
    unittest.main()
