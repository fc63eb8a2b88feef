"""Who may do what at RabbitMQ and Redis: ops/rabbitmq and ops/redis, proven on real servers that read these very files.

    WORKER_BINARY=target/debug/scorer ORT_DYLIB_PATH=... python3 tests/privileges_live.py

A real worker under the user `worker` judges real candidates of the user `aggregator`; `dashboard` watches, `operator`
ends it. Then each of them tries what it must not do. Nothing is skipped: what is missing is a failure.
Needs pika, PyYAML and redis (ops/python.txt) and Debian's rabbitmq-server and redis-server (ops/setup services).
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request

import pika
import redis

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ops"))
import demo_jobs  # noqa: E402  (beside the demonstration, which submits the same cases)

MODEL, VERSION = "tinylm", 7
CASES = ROOT / "tests/model/cases.json"
LIMIT_S = 120
JSON = pika.BasicProperties(content_type="application/json")


def required(name, what):
    value = os.environ.get(name)
    if not value or not pathlib.Path(value).exists():
        raise SystemExit(f"{name} is {value or 'not set'}: it must be the path of {what}.")
    return str(pathlib.Path(value).resolve())


def until(what, ask, limit_s=LIMIT_S):
    """The first answer that is true; asks again every tenth of a second."""
    deadline = time.monotonic() + limit_s
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {limit_s} s")
        time.sleep(0.1)
    return answer


class Services:
    """RabbitMQ and Redis of this test's own, under the files that the fleet has."""

    def __init__(self, folder):
        self.folder = folder
        started = subprocess.run(
            ["ops/services", "start", folder, "guarded"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        words = shlex.split(started.stdout)
        self.values = dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self):
        subprocess.run(["ops/services", "stop", self.folder], cwd=ROOT, check=True)

    def as_user(self, key, user):
        """Every user's password is its name, as the files say of themselves."""
        parts = urllib.parse.urlsplit(self.values[key])
        return parts._replace(netloc=f"{user}:{user}@{parts.hostname}:{parts.port}").geturl()

    def amqp(self, user):
        return self.as_user("SCORER_AMQP__URL", user)

    def redis(self, user):
        return redis.Redis.from_url(self.as_user("SCORER_REDIS__URL", user), decode_responses=True, socket_timeout=10)

    def environment(self, user):
        return {
            "SCORER_AMQP__URL": self.amqp(user),
            "SCORER_REDIS__URL": self.as_user("SCORER_REDIS__URL", user),
            "SCORER_MODEL__NAME": MODEL,
        }


class Worker:
    """The real program."""

    def __init__(self, services, folder):
        self.services, self.folder, self.binary = services, pathlib.Path(folder), required("WORKER_BINARY", "the program scorer")
        required("ORT_DYLIB_PATH", "the ONNX Runtime library (ops/setup onnxruntime)")
        self.log = self.folder / "worker.log"

    def start(self):
        tests = ROOT / "tests/model"
        package = self.folder / "package"
        made = ["package", "--graph", tests / "graph-named.onnx", "--weights", tests / "checkpoint.safetensors"]
        made += ["--shards", tests / "shards", "--name", MODEL, "--version", str(VERSION), "--out", package]
        subprocess.run([self.binary, *made], stdout=subprocess.DEVNULL, check=True, env=self.environment(None))
        settings = [f"model.dir={package}", "worker.id=w1", "engine.execution_provider=cpu", "engine.threads=1"]
        settings += [f'candidates.allow=["file://{tests}/"]']
        arguments = [word for setting in settings for word in ("--set", setting)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self.binary, "run", *arguments], env=self.environment("worker"), stdout=log, stderr=log
            )

    def environment(self, user):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SCORER_")}
        return kept | (self.services.environment(user) if user else {})

    def command(self, user, *words):
        return subprocess.run(
            [self.binary, *words], env=self.environment(user), capture_output=True, text=True, timeout=LIMIT_S
        )

    def await_state(self, state):
        """Reads the events as the user `aggregator` does; each read waits at the server."""
        events, key, last = self.services.redis("aggregator"), f"scorer:{{{MODEL}}}:events", "0"
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            for _, entries in events.xread({key: last}, block=1000) or []:
                for last, fields in entries:
                    if fields["to"] == state:
                        return
            if self.process.poll() is not None:
                break
        raise AssertionError(f"the worker is not {state}; its log ends:\n" + self.log.read_text()[-3000:])

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(LIMIT_S)


class Case(unittest.TestCase):
    """What all tests share: the services, one worker, the topology that it declared."""

    @classmethod
    def setUpClass(cls):
        cls.services, cls.worker = SHARED["services"], SHARED["worker"]

    @contextlib.contextmanager
    def channel(self, user):
        with pika.BlockingConnection(pika.URLParameters(self.services.amqp(user))) as connection:
            yield connection.channel()

    def refused(self, user, what, action):
        """RabbitMQ must answer 403 to this; every attempt has a channel of its own, since a refusal closes it."""
        with self.subTest(f"{user} must not: {what}"), self.channel(user) as channel:
            channel.confirm_delivery()
            with self.assertRaises(pika.exceptions.ChannelClosedByBroker) as raised:
                action(channel)
            self.assertEqual(raised.exception.reply_code, 403, raised.exception)

    def cannot_read(self, user, *queues):
        for queue in queues:
            self.refused(user, f"read {queue}", lambda channel, queue=queue: channel.basic_get(queue))
            self.refused(user, f"purge {queue}", lambda channel, queue=queue: channel.queue_purge(queue))

    def cannot_publish(self, user, *places):
        for exchange, key in places:
            what = f"publish to '{exchange}' with '{key}'"
            self.refused(user, what, lambda channel, e=exchange, k=key: channel.basic_publish(e, k, b"{}", JSON))

    def cannot_shape(self, user, *queues):
        for queue in queues:
            self.refused(user, f"declare {queue}", lambda channel, q=queue: channel.queue_declare(q, durable=True))
            self.refused(user, f"delete {queue}", lambda channel, q=queue: channel.queue_delete(q))


JOBS, DEAD, RESULTS = f"scorer.jobs.{MODEL}", f"scorer.dead.{MODEL}", f"scorer.results.{MODEL}"
UNROUTED = "scorer.results.unrouted"
RETRY = f"{JOBS}.retry.5s"


def jobs():
    """One candidate that is scored and one that is refused."""
    cases = json.loads(CASES.read_text())["cases"]
    usable = [case for case in cases if demo_jobs.usable(case, VERSION)]
    chosen = [next(case for case in usable if case["expect"]["status"] == status) for status in ("scored", "rejected")]
    return [demo_jobs.job(case, CASES.parent) for case in chosen], [case["expect"] for case in chosen]


def take(channel, queue, count):
    """So many messages from a queue, acknowledged."""
    taken = []
    for method, properties, body in channel.consume(queue, inactivity_timeout=LIMIT_S):
        if method is None:
            raise AssertionError(f"{queue}: {len(taken)} of {count} messages within {LIMIT_S} s")
        channel.basic_ack(method.delivery_tag)
        taken.append((properties, body))
        if len(taken) == count:
            break
    channel.cancel()
    return taken


class TheFleetWorks(Case):
    """Everybody does its work, with the real worker in the middle."""

    def publish(self, channel, job, **properties):
        properties = pika.BasicProperties(content_type="application/json", **properties)
        channel.basic_publish("scorer.jobs", MODEL, json.dumps(job).encode(), properties, mandatory=True)

    def test_an_aggregator_submits_and_reads_what_the_worker_publishes(self):
        (scored, rejected), expected = jobs()
        with self.channel("aggregator") as channel:
            channel.confirm_delivery()
            reply = channel.queue_declare("", exclusive=True).method.queue
            channel.queue_declare("aggregator.copies", exclusive=True)
            channel.queue_bind("aggregator.copies", "scorer.results", f"{MODEL}.scored")
            self.publish(channel, scored, reply_to=reply, correlation_id="asked")
            self.publish(channel, rejected)
            found = {result["submission_id"]: result for _, body in take(channel, RESULTS, 2) for result in [json.loads(body)]}
            for job, expect in zip((scored, rejected), expected):
                self.assertEqual(found[job["submission_id"]]["status"], expect["status"])
            score = found[scored["submission_id"]]
            self.assertAlmostEqual(score["delta"], expected[0]["delta"], delta=2e-6)
            self.assertEqual((score["worker_id"], score["execution_provider"]), ("w1", "CPUExecutionProvider"))
            [(properties, body)] = take(channel, reply, 1)
            self.assertEqual((properties.correlation_id, json.loads(body)["delta"]), ("asked", score["delta"]))
            [(_, copy)] = take(channel, "aggregator.copies", 1)
            self.assertEqual(json.loads(copy)["delta"], score["delta"])
            # The stored result answers the same job: the worker may read what it wrote into Redis.
            self.publish(channel, scored)
            [(_, again)] = take(channel, RESULTS, 1)
            self.assertEqual(json.loads(again)["scored_at_ms"], score["scored_at_ms"])

    def test_the_worker_parks_and_retries(self):
        (job, _), _ = jobs()
        later = job | {"submission_id": "from-the-future", "model_version": VERSION + 1}
        with self.channel("aggregator") as channel, self.channel("dashboard") as watching:
            channel.confirm_delivery()
            channel.basic_publish("scorer.jobs", MODEL, b"no job at all", JSON, mandatory=True)
            self.publish(channel, later)
            depth = lambda queue: watching.queue_declare(queue, passive=True).method.message_count  # noqa: E731
            until(f"a job in {RETRY}", lambda: depth(RETRY))
            until(f"a job in {DEAD}", lambda: depth(DEAD))
        with self.channel("operator") as channel:
            [(properties, body)] = take(channel, DEAD, 1)
        self.assertEqual((body, properties.headers["x-error-code"]), (b"no job at all", "invalid_job"))

    def test_the_dashboard_sees_workers_and_queues(self):
        answer = self.worker.command("dashboard", "status", "--json")
        self.assertEqual(answer.returncode, 0, answer.stderr)
        status = json.loads(answer.stdout)
        self.assertEqual((status["alive"], status["ready"]), (1, 1))
        self.assertEqual(status["queue"]["consumers"], 1)
        self.assertEqual(status["workers"][0]["worker_id"], "w1")
        self.assertEqual(self.api("dashboard", f"queues/%2F/{JOBS}")["name"], JOBS)
        self.assertEqual([p["name"] for p in self.api("dashboard", "policies/%2F")], ["scorer-jobs", "scorer-kept"])

    def test_heartbeats_and_events_are_read_without_the_program(self):
        for user in ("aggregator", "dashboard"):
            reading = self.services.redis(user)
            self.assertEqual(json.loads(reading.get(RECORD))["worker_id"], "w1")
            self.assertEqual(reading.zrangebyscore(INDEX, reading.time()[0] * 1000 - 5000, "+inf"), ["w1"])
            self.assertEqual(reading.xrevrange(EVENTS, count=100)[-1][1]["from"], "starting")

    def test_the_dashboard_finds_models_that_it_was_not_told_of(self):
        environment = self.worker.environment("dashboard")
        del environment["SCORER_MODEL__NAME"]
        answer = subprocess.run(
            [self.worker.binary, "status", "--json"], env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertEqual([w["model"]["name"] for w in json.loads(answer.stdout)["workers"]], [MODEL])

    def test_the_page_says_what_its_user_may_not_see(self):
        command = [self.worker.binary, "dashboard", "--listen", "127.0.0.1:0"]
        page = subprocess.Popen(command, env=self.worker.environment("dashboard"), stdout=subprocess.PIPE, text=True)
        self.addCleanup(page.stdout.close)
        self.addCleanup(page.wait)
        self.addCleanup(page.kill)
        url = page.stdout.readline().strip()

        def told():
            with urllib.request.urlopen(f"{url}events", timeout=LIMIT_S) as events:
                next(line for line in events if line == b"event: now\n")
                return json.loads(next(events).removeprefix(b"data: "))

        until("it says why it sees no results", lambda: "ACCESS_REFUSED" in (told().get("unwatched") or ""))
        until("it counts what waits", lambda: (told().get("queues") or {}).get("consumers") == 1)
        connections = lambda: [c for c in self.api("dashboard", "connections") if c.get("user") == "dashboard"]  # noqa: E731
        with urllib.request.urlopen(f"{url}job?id=s", timeout=LIMIT_S) as answer:
            self.assertEqual(json.load(answer)["running"], {"state": "absent"})
        until("it keeps one link, of two connections", lambda: len(connections()) == 2)

    def test_who_may_only_publish_submits_with_the_program(self):
        file = CASES.parent / "candidates/difference-one-step.json"
        asked = ["--candidate", str(file), "--semantics", "param_diff", "--model-version", str(VERSION), "--wait", "--json"]
        answer = self.worker.command("aggregator", "submit", *asked)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        self.assertEqual(json.loads(answer.stdout)["status"], "scored")
        with self.channel("aggregator") as channel:
            take(channel, RESULTS, 1)

    def test_metrics_of_queues_have_the_names_that_alerts_use(self):
        def line(name):
            with urllib.request.urlopen(self.services.values["SERVICES_METRICS"] + "/metrics/per-object") as answer:
                text = answer.read().decode()
            return re.search(rf'^{name}{{.*queue="{JOBS}".*}} (\S+)$', text, re.MULTILINE)

        for name, wanted in (("rabbitmq_queue_consumers", 1), ("rabbitmq_queue_messages_ready", 0), ("rabbitmq_queue_messages", 0)):
            until(f"{name} of {JOBS} is {wanted}", lambda name=name, wanted=wanted: (m := line(name)) and float(m[1]) == wanted)

    def test_who_works_can_ask_for_the_doctors_report(self):
        settings = ["--set", f"model.dir={self.worker.folder / 'package'}", "--set", "engine.execution_provider=cpu"]
        answer = self.worker.command("worker", "check", "--json", *settings)
        self.assertEqual(answer.returncode, 0, answer.stderr)
        verdicts = {finding["part"]: finding["verdict"] for finding in json.loads(answer.stdout)["findings"]}
        self.assertEqual(set(verdicts.values()), {"ok"}, answer.stdout)

    def test_results_and_parked_jobs_outlive_readers_that_hand_them_back(self):
        def policy(queue):  # the pages learn of it with the queue's next report
            ask = lambda: self.api("operator", f"queues/%2F/{queue}").get("effective_policy_definition")  # noqa: E731
            return until(f"a policy for {queue}", ask)

        for queue in (RESULTS, DEAD, UNROUTED):
            self.assertEqual((policy(queue)["overflow"], policy(queue)["delivery-limit"]), ("reject-publish", 1_000_000))
        self.assertNotIn("delivery-limit", policy(JOBS))
        self.assertEqual(self.api("operator", f"queues/%2F/{JOBS}")["arguments"]["x-delivery-limit"], 20)

    def api(self, user, path, method="GET"):
        request = urllib.request.Request(f"{self.services.values['SERVICES_MANAGEMENT']}/api/{path}", method=method)
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{user}".encode()).decode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def test_an_operator_declares_submits_and_commands(self):
        (job, _), _ = jobs()
        file = pathlib.Path(self.worker.folder) / "jobs.ndjson"
        file.write_text(json.dumps(job | {"submission_id": "by-hand"}) + "\n")
        for words in (["topology", "--declare"], ["submit", "--jobs", str(file), "--wait", "--json"], ["ctl", "rewarm"]):
            answer = self.worker.command("operator", *words)
            self.assertEqual(answer.returncode, 0, f"{words}: {answer.stderr}")
        # The demonstration, under a name space of its own that it deletes.
        declared = self.worker.command("operator", "topology", "--declare", "--set", "amqp.namespace=scorer-demo-1")
        self.assertEqual(declared.returncode, 0, declared.stderr)
        demo = [sys.executable, "ops/demo_services.py", "delete", "scorer-demo-1", MODEL]
        subprocess.run(demo, cwd=ROOT, env=self.worker.environment("operator"), check=True)
        with self.assertRaises(urllib.error.HTTPError) as raised:
            self.api("operator", "users/worker", method="DELETE")
        self.assertEqual(raised.exception.code, 401)


class NobodyDoesMoreAtRabbitmq(Case):
    def test_nobody_gets_in_without_its_password(self):
        for user, password in (("guest", "guest"), ("worker", "guess"), ("scorer", "scorer")):
            url = self.services.amqp("worker").replace("worker:worker", f"{user}:{password}")
            with self.subTest(user), self.assertRaises(pika.exceptions.ProbableAuthenticationError):
                pika.BlockingConnection(pika.URLParameters(url))

    def test_a_worker(self):
        self.cannot_read("worker", DEAD, RESULTS)
        self.cannot_publish("worker", ("scorer.control", "all"), ("scorer.results", f"{MODEL}.praised"), ("amq.topic", "x"))
        self.cannot_shape("worker", "aggregator.copies", "elsewhere")
        self.refused("worker", "declare an exchange", lambda channel: channel.exchange_declare("elsewhere"))

        def listen_to_another(channel):
            queue = channel.queue_declare("", exclusive=True).method.queue
            channel.queue_bind(queue, "scorer.control", "#")

        self.refused("worker", "hear what every worker is told", listen_to_another)

    def test_an_aggregator(self):
        self.cannot_read("aggregator", JOBS, RETRY, DEAD)
        self.cannot_publish(
            "aggregator",
            ("scorer.results", f"{MODEL}.scored"),
            (UNROUTED, ""),
            ("scorer.dead", MODEL),
            ("scorer.control", "all"),
            ("", RESULTS),
            ("", JOBS),
            ("amq.topic", "x"),
        )
        self.cannot_shape("aggregator", JOBS, RETRY, DEAD, RESULTS, UNROUTED, "elsewhere")
        for exchange in ("scorer.jobs", "scorer.results", "elsewhere"):
            self.refused("aggregator", f"delete {exchange}", lambda channel, e=exchange: channel.exchange_delete(e))

        def eavesdrop(exchange):
            def bind(channel):
                queue = channel.queue_declare("", exclusive=True).method.queue
                channel.queue_bind(queue, exchange, MODEL)

            return bind

        for exchange in ("scorer.jobs", "scorer.dead", "scorer.control"):
            self.refused("aggregator", f"bind a queue of its own to {exchange}", eavesdrop(exchange))
        self.refused(
            "aggregator", "unbind the results", lambda channel: channel.queue_unbind(RESULTS, "scorer.results", f"{MODEL}.*")
        )

    def test_a_dashboard(self):
        self.cannot_read("dashboard", JOBS, DEAD, RESULTS)
        self.cannot_publish("dashboard", ("scorer.jobs", MODEL), ("", JOBS), ("scorer.control", "all"))
        self.cannot_shape("dashboard", JOBS, "elsewhere")
        self.refused("dashboard", "have a queue", lambda channel: channel.queue_declare("", exclusive=True))
        for exchange in ("scorer.results", "scorer.jobs", "amq.topic"):
            bind = lambda channel, exchange=exchange: channel.queue_bind(JOBS, exchange, "#")  # noqa: E731
            self.refused("dashboard", f"send {exchange} into {JOBS}", bind)
        self.refused("dashboard", "unbind the jobs", lambda channel: channel.queue_unbind(JOBS, "scorer.jobs", MODEL))

    def test_an_operator(self):
        self.cannot_read("operator", "elsewhere")
        self.cannot_publish("operator", ("amq.topic", "x"))
        self.cannot_shape("operator", "elsewhere", "aggregator.copies")


RECORD, INDEX, EVENTS = (f"scorer:{{{MODEL}}}:{name}" for name in ("worker:w1", "workers", "events"))
RESULT, CRASH = f"scorer:{{{MODEL}}}:result:k", f"scorer:{{{MODEL}}}:crash:s:7"

DENIED = "[Nn]o permissions|can't access|can't run"  # plain, and from within a script

# One call for each command that src/store sends, in a script or alone, as the user `worker` must be able to.
SENT = {
    "PING": [], "TIME": [], "ROLE": [], "GET": [RESULT], "MGET": [RECORD], "TYPE": [RECORD], "DEL": [RESULT],
    "SET": [RESULT, "{}", "NX", "GET", "EX", 60], "EXPIRE": [CRASH, 60], "HGET": [CRASH, "f"], "HGETALL": [CRASH],
    "HSET": [CRASH, "f", "1"], "HDEL": [CRASH, "f"], "ZADD": [INDEX, 1, "w0"], "ZREM": [INDEX, "w0"],
    "ZREMRANGEBYSCORE": [INDEX, "-inf", "(1"], "ZCARD": [INDEX], "ZRANDMEMBER": [INDEX, 64],
    "XADD": [f"scorer:{{other}}:events", "MAXLEN", "~", 2000, "*", "to", "ready"],
}  # fmt: skip


class NobodyDoesMoreAtRedis(Case):
    def denied(self, user, *command):
        with self.subTest(f"{user} must not: {' '.join(map(str, command))}"):
            with self.assertRaises(redis.exceptions.ResponseError) as raised:
                self.services.redis(user).execute_command(*command)
            self.assertRegex(str(raised.exception), DENIED)

    def test_nobody_gets_in_without_its_password(self):
        port = urllib.parse.urlsplit(self.services.values["SCORER_REDIS__URL"]).port
        for login in ({}, {"username": "worker", "password": "guess"}, {"username": "guest", "password": "guest"}):
            with self.subTest(login), self.assertRaises(redis.exceptions.AuthenticationError):
                redis.Redis(port=port, **login).ping()

    def test_whose_health_is_asked_gets_to_know_nothing_else(self):
        self.assertTrue(self.services.redis("health").ping())
        for command in (["GET", RECORD], ["INFO"], ["ACL", "LIST"], ["TIME"]):
            self.denied("health", *command)

    def test_a_worker_may_send_all_that_the_store_sends(self):
        source = (ROOT / "src/store/scripts.rs").read_text()
        self.assertEqual(set(re.findall(r"redis\.call\('(\w+)'", source)) - set(SENT), set(), "missing in SENT")
        for name, arguments in SENT.items():
            with self.subTest(name):
                self.services.redis("worker").execute_command(name, *arguments)

    def test_a_worker(self):
        for command in (
            ["GET", "other:{m}:worker:w1"], ["SET", "scorer", "x"], ["KEYS", "*"], ["SCAN", 0], ["FLUSHALL"], ["FLUSHDB"],
            ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["CLIENT", "LIST"], ["SCRIPT", "FLUSH"], ["SHUTDOWN"], ["INFO"],
            ["CLUSTER", "NODES"], ["CLUSTER", "RESET"],
            ["SUBSCRIBE", "x"], ["PUBLISH", "x", "y"], ["MONITOR"], ["RENAME", RESULT, CRASH], ["DUMP", RESULT],
        ):  # fmt: skip
            self.denied("worker", *command)
        script = "return redis.call('SET', 'other', 'x')"
        worker = self.services.redis("worker")
        with self.assertRaises(redis.exceptions.ResponseError) as raised:
            worker.evalsha(worker.script_load(script), 0)
        self.assertRegex(str(raised.exception), DENIED)

    def test_who_reads_the_fleet(self):
        for user in ("aggregator", "dashboard"):
            for command in (
                ["SET", RECORD, "x"], ["DEL", RECORD], ["ZADD", INDEX, 1, "x"], ["XADD", EVENTS, "*", "a", "b"],
                ["EXPIRE", RECORD, 1], ["SET", RESULT, "x"], ["HSET", CRASH, "f", "1"], ["HDEL", CRASH, "f"], ["GET", "other"],
                ["EVALSHA", "0" * 40, 0], ["EVAL", "return 1", 0], ["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "GET", "*"],
                ["ACL", "LIST"], ["INFO"], ["MONITOR"],
            ):  # fmt: skip
                self.denied(user, *command)
        for command in (["SCAN", 0], ["GET", RESULT], ["HGETALL", CRASH]):
            self.denied("aggregator", *command)

    def test_an_operator(self):
        operator = self.services.redis("operator")
        self.assertIn(EVENTS, set(operator.scan_iter(match="scorer:*")))  # of the worker that is gone by now
        operator.set("scorer-demo-1:{m}:x", "1")
        operator.unlink("scorer-demo-1:{m}:x")
        for command in (["GET", "other"], ["KEYS", "*"], ["FLUSHALL"], ["ACL", "LIST"], ["CONFIG", "GET", "*"]):
            self.denied("operator", *command)


class TheEnd(Case):
    """Runs last, by its place in `load_tests`."""

    def test_nothing_that_the_real_worker_did_was_refused_and_an_operator_drains_it(self):
        drained = self.worker.command("operator", "ctl", "drain", "--worker", "w1")
        self.assertEqual(drained.returncode, 0, drained.stderr)
        self.assertEqual(self.worker.process.wait(LIMIT_S), 0)
        refusals = re.findall(r".*(?:NOPERM|ACCESS_REFUSED|access to|with other arguments).*", self.worker.log.read_text())
        self.assertEqual(refusals, [])
        self.assertEqual(SHARED["refused"](), [])


def load_tests(loader, _tests, _pattern):
    """The work first, with nothing refused yet; then what must be refused."""
    cases = (TheFleetWorks, TheEnd, NobodyDoesMoreAtRabbitmq, NobodyDoesMoreAtRedis)
    return unittest.TestSuite(loader.loadTestsFromTestCase(case) for case in cases)


SHARED = {}


def refused_at_redis(services):
    """All that was refused so far, but for the names of client libraries: they tell them since 7.2, do not mind a refusal,
    and Redis 7.0 does not start with a right that it does not know."""
    refused = services.redis("audit").acl_log()
    return [entry for entry in refused if entry["object"] != "client|setinfo"]


def main():
    with tempfile.TemporaryDirectory(prefix="scorer-privileges-") as folder:
        services = Services(folder + "/services")
        try:
            worker = Worker(services, folder)
            worker.start()
            try:
                worker.await_state("ready")
                SHARED.update(services=services, worker=worker)
                SHARED["refused"] = lambda: refused_at_redis(services)
                passed = unittest.main(argv=[__file__, *sys.argv[1:]], exit=False).result.wasSuccessful()
            finally:
                worker.end()
        finally:
            services.stop()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
