"""Early stopping: what is asked, which workers are waited for, what comes back, and what the command says of it."""

import argparse
import asyncio
import contextlib
import io
import json
import math
import pathlib
import tempfile
import time
import unittest
from dataclasses import replace
from unittest import mock

import msgpack
import scorer_client
from scorer_client import Answer, BrokerUnavailable, Candidate, Client, Job, NoResult, Score, Settings, Stop, StoppedEarly, aio, cli
from scorer_client.endpoint import Delivery
from scorer_client.fields import Fields, Malformed
from scorer_client.flow_control import FlowControl
from scorer_client.jobs import Encoding
from scorer_client.report import Report, verdict_line
from scorer_client.results import Result
from scorer_client.sketches import PLACES
from scorer_client.stops import ASSUMPTION
from scorer_client.workers import FleetUnknown
from test_aio_client import Broker as AioBroker
from test_aio_client import Known as AioKnown
from test_client import NOWHERE, Clock, FakeBroker, Known, example, worker

ROOT = pathlib.Path(__file__).resolve().parents[3]
CANDIDATE = Candidate("binary_v2", "gradient", 0.1, data=b"body")
STOP = Stop(0.05, 0.002, proven=True)
ENCODINGS = Encoding.__args__

OLD = worker("old")
NEW = worker("new", accepts=frozenset({"score", "validate", "stop"}))

WORSE = {"decision": "worse", "alpha": 0.01, "margin": 0, "proven": False, "of": 64, "upper": -0.0003}
FUTILE = WORSE | {"decision": "futile", "margin": 0.002, "proven": True, "upper": 0.001, "finished": {"delta": 0.0005}}


def whole(stopped, **fields):
    """The message of a score that was stopped."""
    result = example("score_result.v1-scored")
    return result | {"score": 0, "delta": -0.004, "stderr": None, "ci95": None, "windows": 24, "stopped": stopped} | fields


def read(message, content_type="application/json"):
    body = json.dumps(message).encode() if content_type == "application/json" else msgpack.packb(message)
    return Result.read(body, content_type)


def decoded(body, content_type):
    return json.loads(body) if content_type == "application/json" else msgpack.unpackb(body)


def answer(name, tag=1):
    message = whole(WORSE, submission_id=name)
    return Delivery(tag, f"{name}:7:scored:", "application/msgpack", msgpack.packb(message))


class Asked(unittest.TestCase):
    def test_a_stop_is_checked_when_it_is_made(self):
        self.assertEqual(Stop(), Stop(alpha=0.01, margin=0.0, proven=False))
        for alpha in (0, -0.01, 0.5, 1, math.nan, math.inf, -math.inf):
            with self.assertRaisesRegex(ValueError, "alpha .* above 0 and below 0.5"):
                Stop(alpha)
        for margin in (-0.001, math.nan, math.inf, -math.inf):
            with self.assertRaisesRegex(ValueError, "margin .* finite number of 0 or more"):
                Stop(margin=margin)
        with self.assertRaises(AttributeError):
            Stop().alpha = 0.2

    def test_it_is_sent_with_all_its_parts_and_only_if_asked(self):
        for encoding in ENCODINGS:
            for stop, sent in (
                (Stop(), {"alpha": 0.01, "margin": 0.0, "proven": False}),
                (STOP, {"alpha": 0.05, "margin": 0.002, "proven": True}),
            ):
                job = decoded(Job("a", 7, CANDIDATE, "n", [1], stop=stop).body("m", encoding), encoding)
                self.assertEqual(job["validation"], {"nonce": "n", "shards": [1], "stop": sent})
            job = decoded(Job("a", 7, CANDIDATE).body("m", encoding), encoding)
            self.assertEqual(job["validation"], {"nonce": ""})

    def test_a_margin_that_is_a_whole_number_is_sent_as_a_float(self):
        job = msgpack.unpackb(Job("a", 7, CANDIDATE, stop=Stop(0.1, 1)).body("m", "application/msgpack"))
        self.assertIs(type(job["validation"]["stop"]["margin"]), float)

    def test_a_validate_job_cannot_be_stopped(self):
        for version in (None, 7):
            with self.assertRaisesRegex(ValueError, "Job a has a stop and no candidate"):
                Job("a", version, stop=Stop())

    def test_such_a_job_needs_workers_that_know_both(self):
        self.assertEqual(Job("a", 7, CANDIDATE, stop=Stop()).needs, {"score", "stop"})
        self.assertEqual((Job("a", 7, CANDIDATE).needs, Job("a").needs), ({"score"}, {"validate"}))


class ComesBack(unittest.TestCase):
    def test_both_encodings_with_and_without_finished(self):
        worse = StoppedEarly("worse", 0.01, 0.0, False, 64, -0.0003, None)
        futile = StoppedEarly("futile", 0.01, 0.002, True, 64, 0.001, 0.0005)
        for stopped, expected in ((WORSE, worse), (WORSE | {"finished": None}, worse), (FUTILE, futile)):
            for content_type in ENCODINGS:
                score = read(whole(stopped), content_type).verdict
                self.assertIsInstance(score, Score)
                self.assertEqual(score.stopped, expected)
                self.assertEqual((score.score, score.stderr, score.windows, score.delta), (0, None, 24, -0.004))

    def test_a_score_that_was_not_stopped_says_so(self):
        scored = example("score_result.v1-scored")
        for message in (scored, scored | {"stopped": None}):
            self.assertIsNone(read(message).verdict.stopped)

    def test_a_malformed_field_is_refused_by_its_name(self):
        numbers = (None, "0.01", True, math.inf, -math.inf, math.nan, [], 10**400)
        wrong = {
            "decision": (None, "better", "", 1, ["worse"]),
            "alpha": (*numbers, 0, -0.1, 0.5, 1),
            "margin": (*numbers, -0.001),
            "proven": (None, 0, 1, "false"),
            "of": (None, -1, 1.5, "64", True),
            "upper": numbers,
        }
        self.assertEqual(wrong.keys(), WORSE.keys())
        for field, values in wrong.items():
            for value in values:
                with self.subTest(field=field, value=value):
                    self.refused(FUTILE | {field: value}, f"^{field} of stopped is .* must be")
            without = {name: value for name, value in FUTILE.items() if name != field}
            self.refused(without, f"^{field} of stopped is missing")
        for delta in numbers:
            self.refused(FUTILE | {"finished": {"delta": delta}}, "^delta of finished of stopped is .* must be")
        self.refused(FUTILE | {"finished": {}}, "^delta of finished of stopped is missing")
        for part in (True, 0.5, [0.5], "x"):
            self.refused(FUTILE | {"finished": part}, "^finished of stopped is not a map")

    def refused(self, stopped, why):
        with self.assertRaisesRegex(Malformed, why):
            StoppedEarly.read(Fields("stopped", stopped))

    def test_the_sentence_names_the_result(self):
        for stopped, why in ((WORSE | {"upper": "?"}, "upper of stopped of the result of miner-7:epoch-12 is '[?]'; it must be"),
                             ([1], "stopped of the result of miner-7:epoch-12 is not a map")):  # fmt: skip
            for content_type in ENCODINGS:
                with self.assertRaisesRegex(Malformed, why):
                    read(whole(stopped), content_type)

    def test_a_stop_is_never_in_the_candidates_favour(self):
        for field, value, why in (("score", 0.001, "must be 0, because"), ("stderr", 0.1, "must be null, because")):
            with self.assertRaisesRegex(Malformed, f"{field} of the result of .* {why} the evaluation was stopped"):
                read(whole(WORSE, **{field: value}))


class Held(unittest.TestCase):
    """Until every live worker of the model lists `stop`."""

    def setUp(self):
        self.clock = Clock()
        self.broker, self.fleet, self.outcomes = FakeBroker(self.clock), Known(NEW, OLD), []
        self.client = self.opened()

    def opened(self, **settings):
        settings = Settings(timeout_s=60, **settings)
        return self.enterContext(Client(self.broker, self.fleet, settings, self.clock, self.clock.wait))

    def steps(self, client=None):
        for _ in range(10):
            (client or self.client).step(self.outcomes.append)

    def test_it_is_sent_when_every_worker_of_the_model_accepts_it(self):
        future = self.client.score("stopped", 7, CANDIDATE, nonce="n", stop=STOP)
        self.client.score("whole", 7, CANDIDATE)
        other_version = replace(OLD, model_version=8)
        warming = replace(OLD, ready=False, accepting=False)
        only_stop = replace(NEW, id="odd", accepts=frozenset({"stop"}))
        for other in (OLD, other_version, warming, only_stop):
            self.fleet.now = [NEW, other]
            self.steps()
            self.assertEqual((self.broker.published, self.client.held), (["whole"], 1))
        self.fleet.now = [NEW, replace(NEW, id="new2")]
        self.broker.coming = [answer("whole")]
        self.steps()
        self.assertEqual((self.broker.published, self.client.held), (["whole", "stopped"], 0))
        self.broker.coming = [answer("stopped", tag=2)]
        self.steps()
        self.assertEqual(future.result(timeout=0).verdict.stopped.decision, "worse")

    def test_its_message_asks_for_the_stop(self):
        self.fleet.now = [NEW]
        bodies = []
        with mock.patch.object(self.broker, "publish", lambda name, kind, body, priority: bodies.append(body)):
            self.client.score("a", 7, CANDIDATE, nonce="n", stop=STOP)
            self.steps()
        self.assertEqual(bodies, [Job("a", 7, CANDIDATE, "n", stop=STOP).body("tinylm", "application/msgpack")])

    def test_the_log_says_once_what_is_waited_for_and_once_that_it_is_over(self):
        with self.assertLogs("scorer_client", "WARNING") as logs:
            self.client.score("a", 7, CANDIDATE, stop=Stop())
            self.steps()
            self.steps()
            self.fleet.now = [NEW]
            self.steps()
        self.assertEqual([record.getMessage() for record in logs.records], [
            "Jobs that need score and stop are held back: some live workers do not accept stop: old (1 of 2).",
            "Every live worker accepts score and stop now.",
        ])  # fmt: skip

    def test_many_workers_are_counted_and_a_few_are_named(self):
        flow = FlowControl(Settings(), self.clock)
        flow.learn([NEW, *(worker(f"old-{number}") for number in range(5))])
        said = "some live workers do not accept stop: old-0, old-1, old-2, ... (5 of 6)"
        self.assertEqual(flow.lacking(frozenset({"score", "stop"})), said)
        self.assertEqual(flow.lacking(frozenset({"score"})), "")

    def test_workers_that_come_and_go_end_no_wait_by_their_absence(self):
        flow, needs = FlowControl(Settings(), self.clock), frozenset({"score", "stop"})
        with self.assertLogs("scorer_client", "WARNING") as logs:
            for workers in ([NEW, OLD], [], [NEW, OLD]):
                flow.learn(workers)
                self.assertLessEqual(flow.room(7, needs, 0), 0)
        self.assertNotIn("Every live worker", " ".join(logs.output))

    def test_a_job_that_times_out_says_what_it_waited_for(self):
        future = self.client.score("a", 7, CANDIDATE, stop=Stop())
        self.client.collect(self.outcomes.append)
        said = "Job a has no result after 60 s: it was held back because some live workers do not accept stop: old (1 of 2)."
        self.assertEqual(str(self.outcomes[0]), said)
        with self.assertRaisesRegex(NoResult, "do not accept stop: old"):
            future.result(timeout=0)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            Report({"a": pathlib.Path("file")}).add(self.outcomes[0])
        self.assertEqual(out.getvalue(), f"file  timed out  {said}\n")

    def test_a_job_that_was_sent_waited_for_no_worker(self):
        self.fleet.now = [NEW]
        self.client.score("a", 7, CANDIDATE, stop=Stop())
        self.steps()
        self.fleet.now = [OLD]
        self.client.collect(self.outcomes.append)
        self.assertEqual(str(self.outcomes[0]), "Job a has no result after 60 s: RabbitMQ has it.")

    def test_a_job_that_was_published_and_not_confirmed_may_be_with_a_worker(self):
        self.fleet.now = [NEW]
        self.client.score("a", 7, CANDIDATE, stop=Stop())
        self.broker.failures["publish"] = BrokerUnavailable("lost")
        self.client.step(self.outcomes.append)
        self.fleet.now = [NEW, OLD]
        self.clock.wait(1)
        self.client.collect(self.outcomes.append)
        self.assertEqual((self.broker.published, self.outcomes[0].why), (["a"], ""))
        self.assertIn("RabbitMQ did not confirm it", str(self.outcomes[0]))

    def test_without_heartbeats_it_is_held_and_others_are_sent(self):
        self.fleet.now = None
        client = self.opened(outstanding_without_heartbeats=4)
        client.score("stopped", 7, CANDIDATE, stop=Stop())
        client.score("whole", 7, CANDIDATE)
        self.steps(client)
        self.assertEqual((self.broker.published, client.held), (["whole"], 1))
        client.collect(self.outcomes.append)
        said = {outcome.job.submission_id: str(outcome) for outcome in self.outcomes}
        self.assertIn("it is not known whether every live worker accepts stop", said["stopped"])

    def test_without_heartbeats_the_log_says_which_jobs_are_held(self):
        more = "jobs are sent 4 at a time, and held back if they need more than score and validate."
        for blind, said in ((0, "jobs are held back."), (4, more)):
            with self.assertLogs("scorer_client", "WARNING") as logs:
                FlowControl(Settings(outstanding_without_heartbeats=blind), self.clock).learn(FleetUnknown("Redis is away."))
            self.assertTrue(logs.records[0].getMessage().endswith(said), logs.output)


class HeldInAsyncio(unittest.IsolatedAsyncioTestCase):
    async def until(self, holds):
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.001)

    def client(self, broker, fleet, clock=time.monotonic):
        return aio.Client(broker, fleet, Settings(timeout_s=60, tick_s=0.01, poll_interval_s=0.01), clock=clock)

    async def test_it_is_sent_when_every_worker_of_the_model_accepts_it(self):
        broker, fleet = AioBroker(), AioKnown(NEW, OLD)
        with self.assertLogs("scorer_client", "WARNING") as logs:
            async with self.client(broker, fleet) as client:
                stopped = asyncio.create_task(client.score("stopped", 7, CANDIDATE, stop=STOP))
                complete = asyncio.create_task(client.score("whole", 7, CANDIDATE))
                await self.until(lambda: broker.published == ["whole"] and client.held == 1)
                fleet.now = [NEW]
                await self.until(lambda: len(broker.published) == 2)
                broker.arrived(answer("whole", tag=1))
                broker.arrived(answer("stopped", tag=2))
                results = await asyncio.gather(complete, stopped)
        self.assertEqual(broker.published, ["whole", "stopped"])
        self.assertEqual([result.verdict.stopped.decision for result in results], ["worse", "worse"])
        self.assertIn("some live workers do not accept stop: old (1 of 2)", logs.records[0].getMessage())

    async def test_its_message_asks_for_the_stop(self):
        broker, bodies = AioBroker(), []

        async def publish(submission_id, content_type, body, alone, priority):
            bodies.append(body)
            broker.arrived(answer(submission_id))

        broker.publish = publish
        async with self.client(broker, AioKnown(NEW)) as client:
            await client.score("a", 7, CANDIDATE, nonce="n", stop=STOP)
        self.assertEqual(bodies, [Job("a", 7, CANDIDATE, "n", stop=STOP).body("tinylm", "application/msgpack")])

    async def test_a_job_that_times_out_says_what_it_waited_for(self):
        broker, fleet, clock = AioBroker(), AioKnown(NEW, OLD), Clock()
        with self.assertLogs("scorer_client", "WARNING") as logs:
            async with self.client(broker, fleet, clock) as client:
                never = asyncio.create_task(client.score("a", 7, CANDIDATE, stop=STOP))
                await self.until(lambda: logs.records)
                clock.wait(60)
                with self.assertRaisesRegex(NoResult, "held back because some live workers do not accept stop: old"):
                    await never
        self.assertEqual(broker.published, [])


class Reported(unittest.TestCase):
    def test_the_line_has_the_bound_and_not_the_biased_delta(self):
        line = "stopped  worse: delta at most -0.000300 (alpha 0.01), after 24 of 64 windows"
        self.assertEqual(verdict_line(read(whole(WORSE))), line)
        futile = verdict_line(read(whole(FUTILE)))
        self.assertEqual(futile, "stopped  futile: delta at most +0.001000 (alpha 0.01, margin 0.002, proven), after 24 of 64"
                                 " windows; finished to check the stop: delta +0.000500")  # fmt: skip
        self.assertNotIn("-0.004", line + futile)

    def test_a_copy_of_a_stopped_candidate_is_found(self):
        report = Report({"a": pathlib.Path("one"), "b": pathlib.Path("two")})
        sketch = {"sketch": list(range(PLACES))}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for name in "ab":
                result = read(whole(WORSE, submission_id=name, candidate=sketch))
                report.add(Answer(Job(name, 7, CANDIDATE), result))
            report.print_copies()
        self.assertEqual(out.getvalue().splitlines()[-1], "alike  one  two  1.00 of the changed weights are the same")


class CommandLine(unittest.TestCase):
    def test_the_value_is_alpha_then_margin_then_the_word(self):
        for text, stop in (("0.01", Stop()), ("0.05,0.002", Stop(0.05, 0.002)), ("5e-2,2e-3,proven", STOP)):
            self.assertEqual(cli.stop(text), stop)
        for wrong, why in (
            ("", "could not convert"),
            ("0.5", "below 0.5"),
            ("nan", "below 0.5"),
            ("0.01,-1", "0 or more"),
            ("0.01,", "could not convert"),
            ("0.01,proven", "could not convert"),
            ("0.01,0,sure", "only be the word proven"),
            ("0.01,0,proven,x", "only be the word proven"),
        ):
            with self.assertRaisesRegex(argparse.ArgumentTypeError, rf"is not ALPHA\[,MARGIN\[,proven\]\]: .*{why}"):
                cli.stop(wrong)

    def run_score(self, *words):
        """The jobs that the command would submit, and its exit code."""
        jobs = []

        def collect(handler, submitted):
            jobs.extend(submitted)
            for job in submitted:
                handler(Answer(job, read(whole(WORSE, submission_id=job.submission_id))))

        client = mock.MagicMock()
        client.return_value.__enter__.return_value.collect = collect
        places = ["--amqp", f"amqp://{NOWHERE}", "--redis", f"redis://{NOWHERE}", "--model", "tinylm"]
        output = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        options = ["--format", "binary_v2", "--semantics", "param_diff", "--model-version", "7"]
        with tempfile.NamedTemporaryFile() as file, output[0], output[1], mock.patch.object(cli, "Client", client):
            try:
                return cli.main([*places, "score", file.name, *options, *words]), jobs
            except SystemExit as ended:
                return ended.code, jobs

    def test_jobs_are_stopped_only_if_asked_and_a_stopped_one_has_its_verdict(self):
        for words, stop in (((), None), (("--stop", "0.05,0.002,proven"), STOP)):
            code, (job,) = self.run_score(*words)
            self.assertEqual((code, job.stop), (0, stop))
        for words in (("--stop",), ("--stop", "0.7")):
            self.assertEqual(self.run_score(*words), (64, []))


class Words(unittest.TestCase):
    def test_whoever_may_ask_for_a_stop_reads_what_it_assumes(self):
        help_ = io.StringIO()
        with contextlib.redirect_stdout(help_), self.assertRaises(SystemExit):
            cli.main(["score", "--help"])
        readme, page = (ROOT / "clients/python/README.md"), (ROOT / "docs/aggregators.md")
        places = {
            "the help": help_.getvalue(),
            "Stop": Stop.__doc__,
            "README.md": readme.read_text(encoding="utf-8"),
            "aggregators.md": page.read_text(encoding="utf-8"),
        }
        for place, text in places.items():
            with self.subTest(place):
                text = " ".join(text.split())
                self.assertIn(ASSUMPTION, text)
                self.assertIn("max(8, 2.5 * N^(1/4))", text)

    def test_the_package_exports_what_is_needed(self):
        self.assertLessEqual({"Stop", "StoppedEarly"}, set(scorer_client.__all__))


if __name__ == "__main__":
    unittest.main()
