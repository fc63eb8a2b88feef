"""The Python client against real services and a real worker; both are killed meanwhile.

    WORKER_BINARY=target/debug/scorer python3 tests/python_client_live.py

Starts its own RabbitMQ and Redis (ops/services). ORT_DYLIB_PATH, PYTHONPATH and a python3 with what ops/python.txt names
come from ops/setup. What is missing is a failure.
"""

import base64
import contextlib
import io
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
import zlib
from collections.abc import Iterable, Iterator

import msgpack
import numpy
import pika
import redis
from safetensors.numpy import load_file
from scorer_client import (
    Answer,
    Broker,
    BrokerUnavailable,
    Candidate,
    Client,
    Fleet,
    FleetUnknown,
    Job,
    Loss,
    Metrics,
    Nacked,
    Outcome,
    Refusal,
    Result,
    Score,
    Settings,
    Stop,
    TimedOut,
    Unroutable,
    candidates,
    cli,
)
from scorer_client.workers import ready

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ops"))

import demo_jobs  # noqa: E402
import demo_table  # noqa: E402
from live_stack import CASES, DEAD_NODE, MODEL, SOON_S, VERSION, Binary, Services, eventually  # noqa: E402

# What to replace in RabbitMQ's URL, and what it then says.
DENIED = (
    (":guest@", ":hunter2@", "it refused the login of guest; check the user and the password.$"),
    ("guest:guest@", "stranger:hunter2@", "it refused the login of stranger; check the user and the password.$"),
    ("/%2f", "/nowhere", "it does not let guest use the virtual host 'nowhere'.*; check that it exists and that guest may use it.$"),
)
REFUSED_BY_REDIS = "^Redis at [0-9.:]+ cannot be read: it refused the login of (default|stranger); check the user and the password.$"

cases = {case["name"]: case for case in json.loads(CASES.read_text())["cases"]}
services: Services
binary: Binary


def setUpModule() -> None:
    global services, binary
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    logging.getLogger("scorer_client").setLevel(logging.CRITICAL)
    services = Services()
    unittest.addModuleCleanup(services.stop)
    binary = Binary(services)


def job_of(case: dict, name: str | None = None, nonce: str | None = None) -> Job:
    """The job of a case of tests/model, as the demonstration submits it."""
    candidate = Candidate(
        case["format"],
        case["semantics"],
        case["learning_rate"],
        data=(CASES.parent / case["file"]).read_bytes(),
        sha256=case["sha256"],
        compression=case.get("compression"),
    )
    nonce = (case["nonce"] or "") if nonce is None else nonce
    return Job(name or case["name"], case["model_version"], candidate, nonce, case["shards"], context={"kind": case["kind"]})


def honest(numbers: Iterable[int]) -> list[Job]:
    """Many jobs of one candidate; a nonce for each, so that every one costs two passes and takes a while."""
    return [job_of(cases["gradient-medium-rate"], f"job-{n}", f"nonce-{n}") for n in numbers]


def blocks(page: pathlib.Path) -> list[str]:
    """The Python programs of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@contextlib.contextmanager
def redis_with_a_password(services: Services) -> Iterator[None]:
    with redis.Redis.from_url(services.redis, single_connection_client=True) as store:
        store.config_set("requirepass", "sesame")
        try:
            yield
        finally:
            store.config_set("requirepass", "")


class Gathered:
    """A handler that keeps what it is called with."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def __call__(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def results(self) -> list[Result]:
        return [outcome.result for outcome in self.outcomes if isinstance(outcome, Answer) and outcome.job is not None]

    @property
    def names(self) -> list[str]:
        return sorted(result.submission_id for result in self.results)


class Back(Metrics, threading.Event):
    """Is set when a lost connection was made again."""

    def reconnected(self) -> None:
        self.set()


class Live(unittest.TestCase):
    def setUp(self) -> None:
        self.namespace = f"live-{uuid.uuid4().hex[:8]}"
        self.fleet = Fleet(services.redis, MODEL, self.namespace)
        self.worker = binary.worker(self.namespace)
        self.addCleanup(self.worker.kill)
        self.gathered = Gathered()

    def ready_worker(self) -> None:
        self.worker.start()
        try:
            eventually("a worker is ready", lambda: ready(self.fleet.workers()))
        except AssertionError as error:
            raise AssertionError(f"{error}; its log ends with:\n{self.worker.last_words()}") from error

    def broker(self, **options: str | float) -> Broker:
        return Broker(services.amqp, MODEL, self.namespace, **options)

    @contextlib.contextmanager
    def client(self, broker: Broker | None = None, **settings: float) -> Iterator[Client]:
        settings = {"timeout_s": SOON_S} | settings
        with Client(broker or self.broker(), self.fleet, Settings(**settings)) as client:
            yield client

    def step_until(self, client: Client, what: str, holds) -> None:
        deadline = time.monotonic() + SOON_S
        while not holds():
            self.assertLess(time.monotonic(), deadline, f"in vain: {what}")
            client.step(self.gathered)

    @contextlib.contextmanager
    def channel(self) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
        with pika.BlockingConnection(pika.URLParameters(services.amqp)) as connection:
            yield connection.channel()

    def run_command(self, *words: str) -> tuple[int, str, str]:
        places = ["--amqp", services.amqp, "--redis", services.redis, "--namespace", self.namespace]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = cli.main(["--model", MODEL, *places, *words])
        return code, out.getvalue(), err.getvalue()


class Answers(Live):
    def test_a_job_waits_for_the_first_worker(self) -> None:
        with self.client() as client:
            client.submit(job_of(cases["gradient-medium-rate"]))
            client.submit(Job("loss"))
            for _ in range(10):
                client.step(self.gathered)
            self.assertEqual((client.held, self.fleet.workers(), self.gathered.outcomes), (2, [], []))
            self.worker.start()
            self.step_until(client, "the jobs go out", lambda: client.held == 0)
            self.assertTrue(ready(self.fleet.workers(), VERSION), "no job goes out before a worker is ready")
            client.collect(self.gathered)
        verdicts = {result.submission_id: result.verdict for result in self.gathered.results}
        self.assertIsInstance(verdicts["gradient-medium-rate"], Score)
        self.assertIsInstance(verdicts["loss"], Loss)

    def test_scores_are_the_expected_ones_in_both_encodings(self) -> None:
        self.ready_worker()
        usable = [case for case in cases.values() if demo_jobs.usable(case, VERSION)]
        for encoding in ("application/msgpack", "application/json"):
            gathered = Gathered()
            with self.client(encoding=encoding) as client:
                names = {f"{case['name']}.{encoding[-4:]}": case for case in usable}
                for name, case in names.items():
                    client.submit(job_of(case, name))
                client.collect(gathered)
            self.assertEqual(gathered.names, sorted(names))
            for result in gathered.results:
                agrees, gap = demo_table.judge(result.fields, names[result.submission_id])
                self.assertTrue(agrees, f"{result.submission_id}: {result.verdict}, off by {gap}")

    def test_a_second_copy_of_a_result_is_dropped(self) -> None:
        self.ready_worker()
        with self.channel() as channel, self.client() as client:
            spy = channel.queue_declare("", exclusive=True).method.queue
            channel.queue_bind(spy, f"{self.namespace}.results", f"{MODEL}.*")
            client.submit(job_of(cases["gradient-medium-rate"]))
            client.collect(self.gathered)
            _, properties, body = channel.basic_get(spy, auto_ack=True)
            self.publish_result(channel, properties, body, copies=2)
            stranger = msgpack.packb(msgpack.unpackb(body) | {"submission_id": "of-an-earlier-run"})
            self.publish_result(channel, pika.BasicProperties(message_id="earlier"), stranger, copies=2)
            # Results come in order, so when this one is here the copies have been.
            client.submit(Job("last"))
            client.collect(self.gathered)
        seen = [(outcome.job is not None, outcome.result.submission_id) for outcome in self.gathered.outcomes]
        self.assertEqual(seen, [(True, "gradient-medium-rate"), (False, "of-an-earlier-run"), (True, "last")])

    def publish_result(self, channel, properties, body: bytes, copies: int) -> None:
        for _ in range(copies):
            channel.basic_publish(f"{self.namespace}.results", f"{MODEL}.scored", body, properties)

    def test_a_handler_that_raises_gets_the_result_again(self) -> None:
        self.ready_worker()

        def failing(outcome: Outcome) -> None:
            raise RuntimeError("the disk is full")

        with self.client() as client, self.assertRaisesRegex(RuntimeError, "disk"):
            client.submit(Job("loss"))
            client.collect(failing)
        with self.client() as later:  # Another process, which knows of no job.
            self.step_until(later, "the result comes again", lambda: self.gathered.outcomes)
        (answer,) = self.gathered.outcomes
        self.assertEqual((answer.job, answer.result.submission_id), (None, "loss"))

    def test_futures_have_the_results(self) -> None:
        self.ready_worker()
        with self.client() as client:
            client.start()
            score, loss = client.submit(job_of(cases["gradient-medium-rate"])), client.validate("loss")
            may_stop = client.score("may-stop", VERSION, job_of(cases["noise-large"]).candidate, stop=Stop())
            self.assertIsInstance(score.result(SOON_S).verdict, Score)
            # Too short a plan to be stopped, yet the worker knows what is asked.
            self.assertIsNone(may_stop.result(SOON_S).verdict.stopped)
            self.assertIsInstance(loss.result(SOON_S).verdict, Loss)
        self.assertIn("score", self.fleet.accepts(VERSION))

    def test_a_failed_job_is_reported_with_its_code(self) -> None:
        self.ready_worker()
        url = (CASES.parent / "nothing-is-here").as_uri()
        with self.client() as client:
            client.submit(Job("nowhere", VERSION, Candidate("binary_v2", "param_diff", url=url, sha256="0" * 64, size=1)))
            client.collect(self.gathered)
        (result,) = self.gathered.results
        self.assertEqual((result.status, result.verdict.code), ("failed", "candidate_unavailable"))
        self.assertIsInstance(result.verdict, Refusal)
        self.assertTrue(result.verdict.retryable)


class BadDays(Live):
    """The handler hears of every job once, whatever dies."""

    def halfway(self, client: Client, jobs: list[Job]) -> None:
        for job in jobs:
            client.submit(job)
        self.step_until(client, "some are answered", lambda: len(self.gathered.results) >= 5)
        self.assertLess(len(self.gathered.results), len(jobs) - 5, "the middle has passed")

    def every_job_once(self, jobs: list[Job]) -> None:
        self.assertEqual(self.gathered.names, sorted(job.submission_id for job in jobs))
        self.assertEqual(len(self.gathered.outcomes), len(jobs))
        self.assertEqual({result.status for result in self.gathered.results}, {"scored"})

    def test_rabbitmq_is_killed(self) -> None:
        self.ready_worker()
        services.remembers([f"{self.namespace}.{kind}.{MODEL}" for kind in ("dead", "jobs", "results")])
        broker, jobs = self.broker(), honest(range(40))
        with self.client(broker) as client:
            self.halfway(client, jobs)
            services.kill_rabbitmq()
            self.step_until(client, "the loss is noticed", lambda: not broker.connected)
            services.start_rabbitmq()
            client.collect(self.gathered)
        self.every_job_once(jobs)

    def test_rabbitmq_is_frozen(self) -> None:
        self.ready_worker()
        broker = self.broker(reply_timeout_s=1.0)
        with self.client(broker) as client:
            self.step_until(client, "results are consumed", lambda: broker.consuming)
            services.freeze_rabbitmq()
            self.addCleanup(services.thaw_rabbitmq)
            client.submit(Job("frozen"), timeout_s=2.0)
            client.collect(self.gathered)
            services.thaw_rabbitmq()
            client.submit(Job("thawed"))
            client.collect(self.gathered)
        self.assertEqual(self.gathered.outcomes[0].job.submission_id, "frozen")
        self.assertIsInstance(self.gathered.outcomes[0], TimedOut)
        self.assertIn("thawed", self.gathered.names)

    def test_connections_are_closed_by_force_and_the_next_node_is_dead(self) -> None:
        self.ready_worker()
        broker, jobs = Broker([services.amqp, DEAD_NODE], MODEL, self.namespace), honest(range(20))
        with self.client(broker) as client:
            self.halfway(client, jobs)
            services.close_connections()

            def lost() -> bool:
                """However long it takes, it happens amid jobs."""
                if not client.held:
                    jobs.extend(honest([len(jobs)]))
                    client.submit(jobs[-1])
                return not broker.connected

            self.step_until(client, "the loss is noticed", lost)
            client.collect(self.gathered)
            self.assertEqual(broker.node, Broker(services.amqp, MODEL).endpoint.address)
        self.every_job_once(jobs)

    def test_connections_are_closed_by_force_while_futures_are_waited_for(self) -> None:
        self.ready_worker()
        back, futures = Back(), []
        with Client(self.broker(), self.fleet, Settings(timeout_s=SOON_S, max_jobs=8), metrics=back) as client:
            client.start(self.gathered)
            services.close_connections()
            deadline = time.monotonic() + SOON_S
            while not back.is_set():  # `submit` waits for room, so the loss happens amid jobs.
                self.assertLess(time.monotonic(), deadline, "in vain: the connection is made again")
                futures += [client.submit(job) for job in honest([len(futures)])]
            client.join()
        names = sorted(f"job-{number}" for number in range(len(futures)))
        self.assertEqual(sorted(future.result(timeout=0).submission_id for future in futures), names)
        self.assertEqual(self.gathered.names, names)
        self.assertEqual(len(self.gathered.outcomes), len(names))

    def test_the_worker_is_killed(self) -> None:
        self.ready_worker()
        jobs = honest(range(40))
        with self.client() as client:
            self.halfway(client, jobs)
            self.worker.kill()
            self.worker.start()
            client.collect(self.gathered)
        self.every_job_once(jobs)

    def test_redis_is_stopped(self) -> None:
        self.ready_worker()
        with self.client(self.broker(own_queue=f"{self.namespace}.waits")) as waiting:
            services.stop_redis()
            self.addCleanup(self.restart_redis)
            with self.assertRaises(FleetUnknown):
                self.fleet.capacity(VERSION)
            code, out, err = self.run_command("status")
            self.assertEqual((code, out), (69, "unknown\n"), err)
            waiting.submit(Job("waits"))
            for _ in range(10):
                waiting.step(self.gathered)
            self.assertEqual(waiting.held, 1)
            self.submit_all_the_same()
            self.restart_redis()
            waiting.collect(self.gathered)
        self.assertEqual(self.gathered.names, ["goes-on", "waits"])

    def submit_all_the_same(self) -> None:
        broker = self.broker(own_queue=f"{self.namespace}.goes-on")
        with self.client(broker, outstanding_without_heartbeats=4) as going_on:
            going_on.submit(Job("goes-on"))
            going_on.collect(self.gathered)

    def restart_redis(self) -> None:
        try:
            self.fleet.workers()
        except FleetUnknown:
            services.start_redis()


class Refusals(Live):
    """What the broker does not take is an exception with a sentence. No worker is needed."""

    def test_without_a_queue_a_job_is_unroutable(self) -> None:
        with self.assertRaisesRegex(Unroutable, "no exchange .*scorer topology --declare"):
            self.publish()
        with self.channel() as channel:
            channel.exchange_declare(f"{self.namespace}.jobs", "direct")
            with self.assertRaisesRegex(Unroutable, "no queue is bound for jobs of tinylm"):
                self.publish()
            channel.exchange_delete(f"{self.namespace}.jobs")

    def test_a_full_queue_refuses(self) -> None:
        with self.channel() as channel:
            channel.exchange_declare(f"{self.namespace}.jobs", "direct")
            full = {"x-max-length": 1, "x-overflow": "reject-publish"}
            queue = channel.queue_declare("", exclusive=True, arguments=full).method.queue
            channel.queue_bind(queue, f"{self.namespace}.jobs", MODEL)
            self.publish()
            with self.assertRaisesRegex(Nacked, "Job name was not accepted: the queue .* refused it"):
                self.publish()
            channel.exchange_delete(f"{self.namespace}.jobs")

    def publish(self) -> None:
        broker = self.broker()
        broker.connect()
        try:
            broker.publish("name", "application/msgpack", b"body")
        finally:
            broker.close()


    def test_a_login_that_is_refused_is_told_from_a_service_that_is_away(self) -> None:
        for found, given, said in DENIED:
            with self.assertRaisesRegex(BrokerUnavailable, f"^RabbitMQ at [0-9.:]+ denies access: {said}") as raised:
                Broker(services.amqp.replace(found, given), MODEL).connect()
            self.assertNotRegex(str(raised.exception), "hunter2|is running")
        for login in ("", ":hunter2@", "stranger:hunter2@"):
            with redis_with_a_password(services), self.assertRaisesRegex(FleetUnknown, REFUSED_BY_REDIS) as unknown:
                Fleet(services.redis.replace("//", f"//{login}"), MODEL).workers()
            self.assertNotRegex(str(unknown.exception), "hunter2|is running")


class Command(Live):
    def test_score_finds_a_copy_and_says_what_was_not_scored(self) -> None:
        self.ready_worker()
        with tempfile.TemporaryDirectory() as folder:
            original, stranger = (CASES.parent / cases[name]["file"] for name in ("difference-few-steps", "noise-small"))
            copy, broken = pathlib.Path(folder, "copy.json"), pathlib.Path(folder, "broken.json")
            copy.write_text(json.dumps(dict(reversed(json.loads(original.read_text()).items()))))
            broken.write_text("no candidate")
            files = [str(path) for path in (original, copy, stranger)]
            options = ["--format", "binary_v2", "--semantics", "param_diff", "--compression", "zstd"]
            code, out, err = self.run_command("score", *files, *options)
            self.assertEqual((code, err), (0, ""), out)
            self.assertEqual(out.count("scored  delta"), 3, out)
            alike = [line for line in out.splitlines() if line.startswith("alike")]
            self.assertEqual(alike, [f"alike  {original}  {copy}  1.00 of the changed weights are the same"])
            code, out, err = self.run_command("score", str(broken), *options)
            self.assertEqual(code, 1, err)
            self.assertRegex(out, "broken.json  rejected  candidate_malformed: ")

    def test_the_examples_of_the_pages_print_a_line_for_every_file(self) -> None:
        self.ready_worker()
        readme, page = (ROOT / path for path in ("clients/python/README.md", "docs/aggregators.md"))
        blocking, asynchronous, *_, metrics = blocks(readme)
        asynchronous_files = blocks(page)[1]
        file = CASES.parent / cases["difference-few-steps"]["file"]
        for program, words in ((blocking, []), (asynchronous, []), (asynchronous_files, [MODEL])):
            # The examples have the default namespace.
            program, named = re.subn(r'URL"\], ("tinylm"|model)\)', rf'URL"], \1, "{self.namespace}")', program)
            self.assertEqual(named, 2)
            addresses = {"SCORER_AMQP__URL": services.amqp, "SCORER_REDIS__URL": services.redis}
            command = [sys.executable, "-c", program, *words, str(VERSION), str(file)]
            done = subprocess.run(command, env=os.environ | addresses, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertRegex(done.stdout, rf"{file.name}.* ?(status=')?scored")
        counts = {}
        exec(metrics, counts)
        with Client(self.broker(), self.fleet, metrics=(counted := counts["Counts"]())) as client:
            client.validate("loss")
            client.collect()
        self.assertEqual(dict(counted.results), {("scored", None): 1})

    def test_a_difference_of_two_states_is_scored_in_every_format_as_its_file_is(self) -> None:
        self.ready_worker()
        case = cases["difference-few-steps"]
        before = load_file(CASES.parent / "checkpoint.safetensors")
        after = {name: tensor.copy() for name, tensor in before.items()}
        for name, entry in json.loads((CASES.parent / case["file"]).read_text()).items():
            if isinstance(entry, dict):
                k, packed = entry["k"], zlib.decompress(base64.b64decode(entry["data"]))
                values = numpy.frombuffer(packed[: -4 * k], "<f4" if len(packed) == 8 * k else "<f2")
                after[name].reshape(-1)[numpy.frombuffer(packed[-4 * k :], "<i4")] += values
        update = candidates.param_diff(before, after)
        bodies = {
            "binary_v2": [candidates.binary_v2(update)],
            "safetensors": [candidates.safetensors(update), candidates.safetensors(update, dense=True)],
            "pt_chunks": [candidates.pt_chunks(update, VERSION, VERSION + 1)],
        }
        jobs = [
            Job(f"{format}-{n}", VERSION, Candidate(format, "param_diff", data=body), case["nonce"] or "", case["shards"])
            for format, written in bodies.items()
            for n, body in enumerate(written)
        ]
        with Client(self.broker(), self.fleet) as client:
            futures = [client.submit(job) for job in jobs]
            client.collect()
        for verdict in (future.result().verdict for future in futures):
            self.assertIsInstance(verdict, Score)
            self.assertAlmostEqual(verdict.delta, case["expect"]["delta"], delta=2e-6)

    def test_status_has_a_line_for_every_worker(self) -> None:
        self.assertEqual(self.run_command("status")[:2], (1, ""))
        self.ready_worker()
        code, out, err = self.run_command("status")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, r"^w1  ready/serving  accepting  v7  holds 0  \d+ ms ago\n$")


if __name__ == "__main__":
    unittest.main()
