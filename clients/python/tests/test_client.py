"""The client without any service: how it handles heartbeats, results, lost connections and time."""

import base64
import contextlib
import io
import json
import logging
import pathlib
import socket
import sys
import tempfile
import time
import unittest
from concurrent.futures import as_completed
from dataclasses import replace
from decimal import Decimal
from unittest import mock

import msgpack
import redis
from pika.exceptions import (
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    StreamLostError,
)
from redis.exceptions import AuthenticationError, NoPermissionError, RedisClusterException
from scorer_client import cli
from scorer_client.bounded_set import BoundedSet
from scorer_client.broker import Broker, _parameters, _reason
from scorer_client.client import Client
from scorer_client.console import counted
from scorer_client.endpoint import Delivery, Endpoint, Reason
from scorer_client.errors import (
    BacklogFull,
    BrokerUnavailable,
    NoResult,
    PublishRefused,
    Stopped,
    TopologyMissing,
    Unencodable,
    Unroutable,
)
from scorer_client.fields import Malformed
from scorer_client.fleet import Fleet
from scorer_client.jobs import Candidate, Job
from scorer_client.metrics import Metrics
from scorer_client.nodes import Nodes, checked, with_heartbeat
from scorer_client.outcomes import Answer, NotSent, TimedOut, Unreadable
from scorer_client.merges import Merged
from scorer_client.refusals import Refusal
from scorer_client.results import Loss, Result, Score
from scorer_client.flow_control import FlowControl
from scorer_client.report import Report, verdict_line
from scorer_client.settings import Settings
from scorer_client.stores import Addresses
from scorer_client.workers import FleetUnknown, Heartbeats, Worker, answering, capacity, free, ready

SCHEMAS = pathlib.Path(__file__).resolve().parents[3] / "schemas"
EXAMPLES = SCHEMAS / "examples/valid"
NOWHERE = "127.0.0.1:1"  # Nobody listens on this port.


def setUpModule():
    logging.getLogger("scorer_client").setLevel(logging.CRITICAL)


def example(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def worker(id="w1", **fields):
    idle = Worker(id, "ready", "serving", True, True, 7, held=0, slots=2, age_ms=5)
    return replace(idle, **fields)


def message(name, status="scored", tag=1, version=7, kind="validate", **fields):
    """A result as the broker delivers it."""
    whole = example("score_result.v1-loss" if status == "scored" else "score_result.v1-rejected")
    whole |= {"submission_id": name, "status": status, "kind": kind, "model_version": version} | fields
    return Delivery(tag, f"{name}:{version}:{status}:", "application/msgpack", msgpack.packb(whole))


class Results(unittest.TestCase):
    def read(self, value, content_type="application/json"):
        return Result.read(json.dumps(value).encode(), content_type)

    def test_the_examples_of_the_schema(self):
        kinds = {"loss": Loss, "one-window": Score, "rejected": Refusal, "scored": Score}
        kinds |= {"merge": Merged, "stopped": Score, "stopped-and-finished": Score}
        for name, kind in kinds.items():
            whole = example(f"score_result.v1-{name}")
            packed = Result.read(msgpack.packb(whole), "application/msgpack")
            self.assertEqual(packed, self.read(whole))
            self.assertIsInstance(packed.verdict, kind)

    def test_a_float_without_a_fraction_is_a_whole_number(self):
        scored = example("score_result.v1-scored")
        floats = scored | {"v": 1.0, "model_version": 7.0, "windows": float(scored["windows"])}
        self.assertEqual(self.read(floats), self.read(scored))
        self.assertEqual(Result.read(msgpack.packb(floats), None), self.read(scored))
        self.assertIs(type(self.read(floats).model_version), int)
        with self.assertRaisesRegex(Malformed, "windows"):
            self.read(scored | {"windows": 7.5})

    def test_json_has_many_names_and_may_begin_with_a_mark(self):
        scored = example("score_result.v1-scored")
        body = b"\xef\xbb\xbf" + json.dumps(scored).encode()
        for name in ("application/json", "text/json", "Application/JSON; charset=utf-8", "application/vnd.acme+json"):
            self.assertEqual(Result.read(body, name), self.read(scored))
        for name in (None, "application/x-msgpack", "text/plain"):
            self.assertEqual(Result.read(msgpack.packb(scored), name), self.read(scored))

    def test_a_context_keeps_its_digits_and_its_keys(self):
        text = json.dumps(example("score_result.v1-rejected") | {"context": "CONTEXT"})
        numbers = "[1.5, 1e400, 123456789012345678901234567890, 0.10000000000000000001, 7.0]"
        read = Result.read(text.replace('"CONTEXT"', f'{{"a": {numbers}}}').encode(), "application/json")
        exact = [1.5, Decimal("1e400"), 123456789012345678901234567890, Decimal("0.10000000000000000001"), 7.0]
        self.assertEqual(read.fields["context"], {"a": exact})
        whole = example("score_result.v1-rejected")
        read = Result.read(msgpack.packb(whole | {"context": {1: 2.0, b"x": None}}), None)
        self.assertEqual(read.fields["context"], {1: 2.0, b"x": None})
        packed = msgpack.packb(whole | {"context": {}})
        with self.assertRaisesRegex(Malformed, "cannot be decoded"):
            Result.read(packed.replace(b"\xa7context\x80", b"\xa7context\x81\x90\x01"), None)

    def test_what_a_context_cannot_be_written_as_is_named(self):
        for context in ({"a": 1 << 70}, {"a": object()}):
            with self.assertRaisesRegex(ValueError, "Job name cannot be encoded"):
                Job("name", context=context).body("m", "application/msgpack")
        with self.assertRaisesRegex(ValueError, "Job name cannot be encoded"):
            Job("name", context={"a": float("nan")}).body("m", "application/json")

    def test_whatever_is_missing_or_of_another_type_is_a_sentence(self):
        for name in ("loss", "merge", "rejected", "scored"):
            self.bend(example(f"score_result.v1-{name}"), [])

    def bend(self, whole, path):
        """Every field in turn is left out, and replaced by everything that it cannot be."""
        part = whole
        for key in path:
            part = part[key]
        for key, kept in list(part.items()):
            for wrong in (None, [], {}, "?", -1, 1e999, True, 10**400):
                part[key] = wrong
                self.read_or_refuse(whole)
            del part[key]
            self.read_or_refuse(whole)
            part[key] = kept
            if isinstance(kept, dict):
                self.bend(whole, [*path, key])

    def read_or_refuse(self, whole):
        with contextlib.suppress(Malformed):
            self.read(whole)

    def test_the_sentence_names_field_and_result(self):
        whole = example("score_result.v1-scored")
        del whole["delta"]
        with self.assertRaisesRegex(Malformed, "delta of the result of miner-7:epoch-12 is missing; it must be a finite number"):
            self.read(whole)
        with self.assertRaisesRegex(Malformed, "sketch of candidate of the result .* must be a list of 64"):
            self.read(example("score_result.v1-scored") | {"candidate": {"sketch": [1, "2"]}})

    def test_bodies_that_do_not_decode(self):
        deep = b"\x91" * 100_000
        for body, kind in ((b"", None), (b"\xc1", None), (deep, None), (b"[" * 100_000, "application/json")):
            with self.assertRaises(Malformed):
                Result.read(body, kind)
        for text in ("{", "[]", '{"v":1', '{"v":NaN}', "\xff"):
            with self.assertRaises(Malformed):
                Result.read(text.encode("latin1"), "application/json")


class Jobs(unittest.TestCase):
    candidate = Candidate("binary_v2", "gradient", 0.1, data=b"body")

    def test_only_fields_of_the_schema_are_sent(self):
        schema = json.loads((SCHEMAS / "score_job.v1.json").read_text(encoding="utf-8"))
        known = set().union(*(kind.get("properties", {}) for kind in self.kinds(schema)))
        job = Job("name", 7, self.candidate, "nonce", [1, 2], 5, {"miner_id": 7})
        self.assertLessEqual(set(msgpack.unpackb(job.body("m", "application/msgpack"))), known)

    def kinds(self, schema):
        yield schema
        for part in schema.values():
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, dict):
                    yield from self.kinds(inner)

    def test_both_encodings_say_the_same(self):
        job = Job("name", 7, self.candidate, shards=[2, 1])
        packed = msgpack.unpackb(job.body("m", "application/msgpack"))
        text = json.loads(job.body("m", "application/json"))
        self.assertEqual(base64.b64decode(text["candidate"].pop("data")), packed["candidate"].pop("data"))
        self.assertEqual(packed, text)
        self.assertEqual(packed["candidate"]["size"], 4)
        self.assertEqual(packed["validation"], {"nonce": "", "shards": [2, 1]})

    def test_without_a_candidate_the_model_is_measured(self):
        fields = json.loads(Job("name").body("m", "application/json"))
        self.assertEqual(fields, {"v": 1, "kind": "validate", "submission_id": "name", "model": "m", "validation": {"nonce": ""}})

    def test_the_priority_is_the_messages_and_not_the_jobs(self):
        body = Job("name", priority=255).body("m", "application/msgpack")
        self.assertEqual(body, Job("name").body("m", "application/msgpack"))

    def test_what_cannot_be_meant_is_refused(self):
        for mistake in (
            lambda: Job("with blank"),
            lambda: Job("n" * 129),
            lambda: Job("name", priority=-1),
            lambda: Job("name", priority=256),
            lambda: Job("name", None, self.candidate),
            lambda: Candidate("binary_v2", "param_diff"),
            lambda: Candidate("binary_v2", "param_diff", data=b"", url="http://x"),
        ):
            with self.assertRaises(ValueError):
                mistake()

    def test_an_unknown_word_is_refused_with_the_known_ones(self):
        for mistake, said in (
            (lambda: Candidate("safetensor", "param_diff", data=b""),
             "The format of a candidate must be binary_v2 or safetensors or pt_chunks, not 'safetensor'. Did you mean safetensors?"),
            (lambda: Candidate(None, "param_diff", data=b""),
             "The format of a candidate must be binary_v2 or safetensors or pt_chunks, not None."),
            (lambda: Candidate("binary_v2", "gradients", data=b""),
             "The semantics of a candidate must be gradient or param_diff, not 'gradients'. Did you mean gradient?"),
            (lambda: Candidate("binary_v2", "param_diff", data=b"", compression="gzip"),
             "The compression of a candidate must be zstd, not 'gzip'."),
            (lambda: Settings(encoding="json"),
             "The encoding must be application/msgpack or application/json, not 'json'."),
        ):  # fmt: skip
            with self.assertRaises(ValueError) as raised:
                mistake()
            self.assertEqual(str(raised.exception), said)


class Store:
    """As much of a Redis as the fleet reads."""

    def __init__(self, now_ms, beats, records):
        self.now_ms, self.beats, self.records = now_ms, beats, records

    def pipeline(self, transaction):
        return contextlib.nullcontext(self)

    def time(self):
        pass

    def zrange(self, key, first, last, withscores):
        assert key == "scorer:{tinylm}:workers"

    def execute(self):
        return [(self.now_ms // 1000, self.now_ms % 1000 * 1000), [(id.encode(), at) for id, at in self.beats.items()]]

    def mget(self, keys):
        return [self.records.get(key.removeprefix("scorer:{tinylm}:worker:")) for key in keys]


class Fleets(unittest.TestCase):
    def fleet(self, beats, records, now_ms=100_000, prefetch=2):
        return Fleet(f"redis://{NOWHERE}", "tinylm", prefetch=prefetch, store=Store(now_ms, beats, records))

    def record(self, **fields):
        return json.dumps(example("heartbeat.v1-ready") | fields).encode()

    def test_alive_is_who_reported_by_redis_clock_and_has_a_record(self):
        beats = {"alive": 95_000.0, "late": 94_999.0, "expired": 99_000.0}
        (found,) = self.fleet(beats, {"alive": self.record(), "late": self.record()}).workers()
        self.assertEqual((found.id, found.age_ms, found.ready, found.model_version), ("alive", 5000, True, 7))

    def test_capacity_is_of_ready_workers_of_the_version(self):
        model = example("heartbeat.v1-ready")["model"]
        records = {
            "a": self.record(),
            "b": self.record(model=model | {"version": 8}),
            "c": self.record(ready=False, accepting=False, model=model | {"version": None}),
        }
        fleet = self.fleet(dict.fromkeys(records, 100_000.0), records)
        self.assertEqual([fleet.capacity(version) for version in (None, 7, 8, 9)], [4, 2, 2, 0])

    def test_a_worker_that_holds_more_than_is_believed_has_more_places(self):
        jobs = example("heartbeat.v1-ready")["jobs"] | {"in_flight": 1, "buffered": 4}
        (found,) = self.fleet({"a": 100_000.0}, {"a": self.record(jobs=jobs)}).workers()
        self.assertEqual((found.held, found.slots, found.free), (5, 6, 1))
        (full,) = self.fleet({"a": 100_000.0}, {"a": self.record(jobs=jobs, accepting=False)}).workers()
        self.assertEqual((full.slots, full.free), (5, 0))

    def test_what_a_worker_accepts_is_what_it_lists_or_score_and_validate(self):
        beats = dict.fromkeys("ab", 100_000.0)
        old, new = self.record(), self.record(accepts=["score", "validate", "merge", "of-the-future"])
        whole = json.loads(old)
        whole.pop("accepts", None)
        old = json.dumps(whole).encode()
        for records, common in (((new, new), {"merge", "of-the-future"}), ((old, new), set()), ((old, old), set())):
            fleet = self.fleet(beats, dict(zip("ab", records, strict=True)))
            self.assertEqual(fleet.accepts(7), {"score", "validate"} | common)
        self.assertEqual(fleet.accepts(8), set())
        for wrong in ("score", [1], {}):
            (found,) = self.fleet({"a": 100_000.0}, {"a": self.record(accepts=wrong)}).workers()
            self.assertRegex(found.detail, "accepts of the heartbeat of a is .* must be a list of texts")

    def test_a_record_that_nobody_can_read_is_no_ready_worker(self):
        for record in (b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, self.record(ready="yes"), self.record(jobs=None)):
            (found,) = self.fleet({"a": 100_000.0}, {"a": record}).workers()
            self.assertEqual((found.state, found.ready, found.slots), ("unreadable", False, 0))
            self.assertRegex(found.detail, "heartbeat of a (is|does) no|of the heartbeat of a is|of a is no")

    def test_every_mode_says_where_redis_is_away_without_its_password(self):
        places = ("127.0.0.1:1", "127.0.0.1:2")
        urls = [f"redis://:secret@{place}" for place in places]
        for mode in ("sentinel", "cluster"):
            fleet = Fleet(urls, "tinylm", mode=mode)
            for _ in range(2):
                with self.assertRaisesRegex(FleetUnknown, f"^Redis at {', '.join(places)} cannot be read: ") as raised:
                    fleet.workers()
                self.assertNotIn("secret", str(raised.exception))

    def test_urls_that_a_mode_cannot_use_are_refused_without_their_passwords(self):
        for mode, urls, why in (
            ("replicated", "redis://h", "must be one of"),
            ("single", ["redis://h", "redis://g"], "one server has one URL"),
            ("sentinel", [], "at least one"),
            ("sentinel", '["redis://h"', "no TOML array"),
            ("sentinel", ["redis://h", "rediss://g"], "host and port only"),
            ("sentinel", ["redis://:hunter2@h", "redis://:other@g"], "host and port only"),
            ("sentinel", "unix:///run/redis.sock", "must begin with"),
            ("cluster", "redis://:hunter2@h/1", "only database 0"),
            ("cluster", "redis://:hunter2@h?db=1", "only database 0"),
        ):
            with self.subTest(mode=mode, urls=urls), self.assertRaisesRegex(ValueError, why) as raised:
                Fleet(urls, "tinylm", mode=mode)
            self.assertNotIn("hunter2", str(raised.exception))

    def test_sentinels_have_a_port_and_a_login_of_their_own(self):
        url = "rediss://u:p@h/3?sentinel_user=s&sentinel_password=%40"
        addresses = Addresses.checked(f'["{url}"]', "sentinel", "mymaster")
        self.assertEqual(addresses.nodes(), [("h", 26379)])
        told, sentinels = addresses.options(), addresses.sentinel_options()
        self.assertEqual([told[name] for name in ("username", "password", "db", "ssl")], ["u", "p", 3, True])
        self.assertEqual([sentinels[name] for name in ("username", "password", "ssl")], ["s", "@", True])

    def test_redis_away_is_unknown_and_neither_ready_nor_nobody(self):
        fleet = Fleet(f"redis://:secret@{NOWHERE}/0", "tinylm")
        for ask in (fleet.workers, fleet.capacity):
            with self.assertRaisesRegex(FleetUnknown, f"^Redis at {NOWHERE} cannot be read: .* address is correct.$"):
                ask()

    def test_a_redis_that_answers_is_not_away(self):
        login = AuthenticationError("secret?")
        wrapped = RedisClusterException("no node can be reached")  # As the client of a cluster does it.
        wrapped.__cause__ = login
        for user, error, said in (
            ("", login, "it refused the login of default; check the user and the password."),
            ("u", login, "it refused the login of u; check the user and the password."),
            ("u", wrapped, "it refused the login of u; check the user and the password."),
            ("u", NoPermissionError("u has no permissions"), "u has no permissions."),
            ("u", redis.ConnectionError("refused"), "refused. Check that it is running and the address is correct."),
        ):
            addresses = Addresses.checked(f"redis://{user}:secret@h", "single", "mymaster")
            heartbeats = Heartbeats(addresses, "tinylm", "scorer", prefetch=2, ttl_ms=5000)
            self.assertEqual(str(heartbeats.unknown(error)), f"Redis at h:6379 cannot be read: {said}")

    def test_a_job_is_for_workers_of_its_version_else_for_newer_ones(self):
        old, new = worker("old", model_version=7), worker("new", model_version=8)
        for version, ids in ((7, ["old"]), (8, ["new"]), (6, ["old", "new"]), (9, []), (None, ["old", "new"])):
            self.assertEqual([found.id for found in answering([old, new], version)], ids)
        self.assertEqual(ready([worker(ready=False)]), [])
        self.assertEqual((capacity([old, new]), free([old, worker(accepting=False)])), (4, 2))


class Known:
    """A fleet that is what the test says; None = Redis away."""

    def __init__(self, *workers):
        self.now = list(workers)

    def workers(self):
        if self.now is None:
            raise FleetUnknown("Redis is away.")
        return self.now


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


class FlowControls(unittest.TestCase):
    def room(self, fleet, outstanding, version=7, needs=frozenset({"score"}), **settings):
        flow = FlowControl(Settings(**settings), Clock())
        try:
            flow.learn(fleet.workers())
        except FleetUnknown as unknown:
            flow.learn(unknown)
        return flow.room(version, needs, outstanding)

    def test_room_is_twice_what_the_ready_workers_hold(self):
        full = worker(accepting=False, held=2)
        self.assertEqual(self.room(Known(full, replace(full, id="w2")), 3), 5)
        self.assertEqual(self.room(Known(full), 4), 0)
        self.assertEqual(self.room(Known(full), 0, jobs_per_slot=1.5), 3)

    def test_without_a_worker_for_it_there_is_no_room(self):
        for fleet in (Known(), Known(worker(ready=False, accepting=False)), Known(worker(model_version=6))):
            self.assertLessEqual(self.room(fleet, 0), 0)

    def test_what_a_job_waited_for_names_the_version_and_those_that_are_served(self):
        def all_of(*versions):
            return [worker(f"w{version}", model_version=version) for version in versions]

        full = "the workers of m that were ready for version 7 had no room for it, or RabbitMQ was unavailable"
        for workers, version, why in (
            (FleetUnknown("away"), 8, "it was not known whether a worker of m was ready for version 8"),
            (FleetUnknown("away"), None, "it was not known whether a worker of m was ready"),
            ([], None, "no worker of m was ready (versions served: none)"),
            ([worker(ready=False)], 8, "no worker of m was ready for version 8 (versions served: none)"),
            (all_of(0, 7), 8, "no worker of m was ready for version 8 (versions served: 7, 0)"),
            (all_of(1, 2, 3, 4), 8, "no worker of m was ready for version 8 (versions served: 4, 3, 2, ...)"),
            (all_of(7), 7, full),
        ):
            flow = FlowControl(Settings(), Clock())
            flow.learn(workers)
            self.assertEqual(flow.held_back("m", version, frozenset({"score"})), why)
        said = "Job a has no result after 60 s: RabbitMQ did not confirm it."
        self.assertEqual(str(TimedOut(Job("a"), 60, confirmed=False)), said)

    def test_jobs_on_the_retry_ladder_do_not_keep_idle_workers_waiting(self):
        flow = FlowControl(Settings(), Clock())
        flow.learn([worker(held=1)])
        self.assertEqual(flow.room(7, frozenset({"score"}), outstanding=100), 1)
        flow.take()
        self.assertEqual(flow.room(7, frozenset({"score"}), outstanding=101), 0)

    def test_what_some_live_worker_of_any_version_does_not_accept_is_held_back(self):
        new = worker("new", accepts=frozenset({"score", "validate", "merge"}))
        other_version = worker("other", model_version=8)
        warming = worker("warming", ready=False, accepting=False)
        for workers, room in (((new,), 4), ((new, other_version), 0), ((new, worker("old")), 0), ((new, warming), 0)):
            self.assertEqual(self.room(Known(*workers), 0, needs=frozenset({"merge"})), room)
        self.assertEqual(self.room(Known(new, warming), 0), 4)
        away = Known()
        away.now = None
        self.assertEqual(self.room(away, 0, needs=frozenset({"merge"}), outstanding_without_heartbeats=4), 0)

    def test_unknown_is_no_room_unless_it_is_wanted(self):
        fleet = Known()
        fleet.now = None
        self.assertEqual(self.room(fleet, 0), 0)
        self.assertEqual(self.room(fleet, 1, outstanding_without_heartbeats=4), 3)


class FakeBroker:
    """Keeps what is published; delivers what the test puts in; fails when it is told to."""

    endpoint = Endpoint((f"amqp://{NOWHERE}",), "tinylm", "scorer", None)

    def __init__(self, clock):
        self.clock = clock
        self.connected = self.consuming = False
        self.there = self.has_queue = True
        self.published, self.acknowledged, self.coming = [], [], []
        self.failures = {}

    def connect(self):
        if not self.there:
            raise BrokerUnavailable("RabbitMQ is away.")
        self.connected = True

    def close(self):
        self.connected = self.consuming = False

    def consume(self):
        self.consuming = self.has_queue
        return self.consuming

    def publish(self, submission_id, content_type, body, priority):
        self.published.append(submission_id)
        self.fail("publish")

    def receive(self, wait_s):
        self.clock.wait(wait_s)
        self.fail("receive")
        coming, self.coming = self.coming, []
        return coming

    def acknowledge(self, delivery):
        self.fail("acknowledge")
        self.acknowledged.append(delivery.tag)

    def wake(self):
        pass

    def fail(self, what):
        if error := self.failures.pop(what, None):
            if isinstance(error, BrokerUnavailable):
                self.close()
            raise error


class Recorded(Metrics):
    """Keeps the calls of every hook."""

    def __init__(self):
        self.calls = []
        for name in [name for name in vars(Metrics) if not name.startswith("_")]:
            setattr(self, name, lambda *arguments, name=name: self.calls.append((name, *arguments)))


class Clients(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.broker = FakeBroker(self.clock)
        self.fleet = Known(worker())
        self.outcomes = []
        self.client = self.opened(Settings(timeout_s=60))

    def opened(self, settings):
        client = Client(self.broker, self.fleet, settings, self.clock, self.clock.wait)
        return self.enterContext(client)

    def submit(self, *names, version=7):
        for name in names:
            self.client.submit(Job(name, version))

    def steps(self, count=10):
        for _ in range(count):
            self.client.step(self.outcomes.append)

    def answered(self):
        return [(outcome.job and outcome.job.submission_id, outcome.result.status) for outcome in self.outcomes]

    def test_jobs_are_held_back_until_a_worker_is_ready(self):
        for number, nobody in enumerate(([], [worker(ready=False, accepting=False)], [worker(model_version=6)], None)):
            self.fleet.now = nobody
            self.submit(f"job-{number}")
            self.steps()
            self.assertEqual(self.broker.published, [])
        self.fleet.now = [worker()]
        self.steps()
        self.assertEqual((len(self.broker.published), self.client.held), (4, 0))

    def test_no_more_are_outstanding_than_twice_what_the_workers_hold(self):
        self.fleet.now = [worker(accepting=False, held=2)]
        self.submit(*"abcdef")
        self.steps()
        self.assertEqual(self.broker.published, list("abcd"))
        self.broker.coming = [message("b")]
        self.steps()
        self.assertEqual(self.broker.published, list("abcde"))

    def test_a_version_without_workers_holds_up_no_other(self):
        self.submit("later", version=8)
        self.submit("now", version=7)
        self.steps()
        self.assertEqual(self.broker.published, ["now"])

    def test_a_result_is_acknowledged_after_the_handler(self):
        self.submit("a")
        self.steps()
        self.broker.coming = [message("a", tag=9)]

        def failing(outcome):
            raise RuntimeError("the disk is full")

        for _ in range(2):
            with self.assertRaises(RuntimeError):
                for _ in range(3):
                    self.client.step(failing)
            self.assertEqual((self.broker.acknowledged, len(self.client)), ([], 1))
        self.client.collect(self.outcomes.append)
        self.assertEqual((self.answered(), self.broker.acknowledged), ([("a", "scored")], [9]))

    def test_copies_and_second_answers_are_dropped_and_acknowledged(self):
        self.submit("a")
        self.steps()
        self.broker.coming = [message("a", tag=1), message("a", tag=2), message("a", "failed", tag=3)]
        self.broker.coming += [message("other", tag=4), message("other", tag=5)]
        self.steps()
        self.assertEqual(self.answered(), [("a", "scored"), (None, "scored")])
        self.assertEqual(self.broker.acknowledged, [1, 2, 3, 4, 5])

    def test_a_job_that_was_not_confirmed_is_published_again(self):
        self.submit("a", "b")
        self.broker.failures["publish"] = BrokerUnavailable("lost")
        self.steps()
        self.assertEqual(self.broker.published, ["a", "a", "b"])
        self.broker.coming = [message("a"), message("a"), message("b")]
        self.client.collect(self.outcomes.append)
        self.assertEqual(self.answered(), [("a", "scored"), ("b", "scored")])

    def test_a_result_whose_acknowledgement_was_lost_comes_again_and_is_dropped(self):
        self.submit("a")
        self.steps()
        self.broker.coming = [message("a", tag=1), message("never-handled", tag=2)]
        self.broker.failures["acknowledge"] = BrokerUnavailable("lost")
        self.steps()
        self.broker.coming = [message("a", tag=1)]
        self.steps()
        self.assertEqual((self.answered(), self.broker.acknowledged), ([("a", "scored")], [1]))

    def test_the_broker_is_waited_for_with_growing_pauses(self):
        self.submit("a")
        self.broker.failures["receive"] = BrokerUnavailable("lost")
        self.broker.there = False
        with mock.patch.object(self.broker, "connect", wraps=self.broker.connect) as tried:
            before = self.clock.now
            self.steps(200)
        self.assertGreater(self.clock.now - before, 30)
        self.assertLess(tried.call_count, 15)
        self.broker.there = True
        self.steps(40)
        self.assertTrue(self.broker.connected)

    def test_a_job_without_an_answer_times_out_and_says_where_it_was(self):
        self.submit("published")
        self.submit("held", version=8)
        self.client.collect(self.outcomes.append)
        where = [(outcome.job.submission_id, outcome.confirmed) for outcome in self.outcomes]
        self.assertEqual(where, [("published", True), ("held", False)])
        why = "it was held back because no worker of tinylm was ready for version 8 (versions served: 7)"
        self.assertEqual(str(self.outcomes[1]), f"Job held has no result after 60 s: {why}.")

    def test_an_answer_that_waits_for_the_handler_is_in_time(self):
        self.submit("a", "b")
        self.steps()
        self.broker.coming = [message("a"), message("b")]

        def slow(outcome):
            self.clock.wait(100)
            self.outcomes.append(outcome)

        self.client.collect(slow)
        self.assertEqual(self.answered(), [("a", "scored"), ("b", "scored")])

    def test_jobs_stop_when_redis_goes_away(self):
        self.steps()
        self.submit("before")
        self.steps()
        self.fleet.now = None
        self.submit("after")
        self.clock.wait(1)
        self.steps()
        self.assertEqual((self.broker.published, self.client.held), (["before"], 1))

    def test_time_runs_out_while_the_broker_is_away(self):
        self.submit("a")
        self.broker.failures["receive"] = BrokerUnavailable("lost")
        self.broker.there = False
        self.client.collect(self.outcomes.append)
        self.assertIsInstance(self.outcomes[0], TimedOut)

    def test_a_late_answer_is_handed_over_and_the_job_may_be_submitted_again(self):
        self.submit("a")
        self.client.collect(self.outcomes.append)
        self.broker.coming = [message("a")]
        self.steps()
        self.submit("a")
        self.steps()
        self.broker.coming = [message("a")]
        self.client.collect(self.outcomes.append)
        self.assertEqual([type(outcome) for outcome in self.outcomes], [TimedOut, Answer, Answer])
        self.assertEqual([outcome.job is None for outcome in self.outcomes], [False, True, False])

    def test_a_name_is_taken_once(self):
        self.submit("a")
        with self.assertRaisesRegex(ValueError, "Job a was already submitted"):
            self.submit("a")
        self.steps()
        self.broker.coming = [message("a")]
        self.client.collect(self.outcomes.append)
        with self.assertRaisesRegex(ValueError, "another submission_id"):
            self.submit("a")
        self.submit("a", version=8)

    def test_a_name_without_a_version_is_taken_once_too(self):
        self.submit("a", version=None)
        self.steps()
        self.broker.coming = [message("a"), message("a", "failed")]
        self.client.collect(self.outcomes.append)
        self.steps()
        self.assertEqual(self.answered(), [("a", "scored")])
        for version in (None, 7):
            with self.assertRaises(ValueError):
                self.submit("a", version=version)

    def test_a_result_for_another_version_or_kind_is_no_answer(self):
        self.submit("a")
        self.steps()
        self.broker.coming = [message("a", version=6), message("a", "rejected", kind="score")]
        self.steps()
        self.assertEqual((self.answered(), len(self.client)), ([(None, "scored"), (None, "rejected")], 1))

    def test_what_is_no_result_of_this_model_is_reported_and_acknowledged(self):
        self.broker.coming = [Delivery(1, None, None, b"\xc1"), message("a", tag=2, model="another")]
        self.steps()
        self.assertEqual([type(outcome) for outcome in self.outcomes], [Unreadable, Unreadable])
        self.assertIn("for the model 'another', not for tinylm", self.outcomes[1].problem)
        self.assertEqual(self.broker.acknowledged, [1, 2])

    def test_a_refused_job_is_given_back_and_the_others_go_on(self):
        self.submit("a", "b")
        self.broker.failures["publish"] = Unroutable("a", "no queue.")
        self.steps()
        (refused,) = self.outcomes
        self.assertEqual((type(refused), refused.job.submission_id, str(refused.error)),
                         (NotSent, "a", "Job a was not accepted: no queue."))  # fmt: skip
        self.outcomes.clear()
        self.broker.coming = [message("b")]
        self.client.collect(self.outcomes.append)
        self.assertEqual(self.answered(), [("b", "scored")])
        self.submit("a")

    def test_a_queue_that_stays_away_while_workers_are_ready_is_a_fault(self):
        self.broker.has_queue = False
        self.fleet.now = []
        self.submit("a")
        self.steps(60)
        self.assertEqual(self.outcomes, [])
        self.fleet.now = [worker()]
        self.steps(60)
        (refused,) = self.outcomes
        self.assertIsInstance(refused.error, TopologyMissing)
        self.assertRegex(str(refused.error), "Job a was not accepted: .* no results queue scorer.results.tinylm.*scorer topology")
        self.broker.has_queue = True
        self.submit("a")
        self.steps()
        self.assertEqual(self.broker.published, ["a"])

    def test_a_handler_may_submit_more(self):
        self.submit("a")
        self.steps()
        self.broker.coming = [message("a"), message("b")]

        def handler(outcome):
            self.outcomes.append(outcome)
            if outcome.job is not None and outcome.job.submission_id == "a":
                self.submit("b")

        self.client.step(handler)
        self.broker.coming = [message("b")]
        self.client.collect(handler)
        self.assertIn(("b", "scored"), self.answered())

    def test_a_retryable_failure_carries_its_code(self):
        self.submit("a")
        self.steps()
        error = {"code": "inference_failed", "message": "m", "retryable": True, "detail": {}}
        self.broker.coming = [message("a", "failed", error=error)]
        self.client.collect(self.outcomes.append)
        self.assertEqual(self.outcomes[0].result.verdict, Refusal("inference_failed", "m", True))


    def test_a_result_that_comes_while_its_job_waits_to_be_published_again_is_its_answer(self):
        self.submit("a")
        self.broker.failures["publish"] = BrokerUnavailable("lost")
        self.client.step(self.outcomes.append)
        self.fleet.now = []
        self.clock.wait(1)
        self.broker.coming = [message("a")]
        self.client.collect(self.outcomes.append)
        self.assertEqual((self.answered(), self.broker.published), ([("a", "scored")], ["a"]))

    def test_a_job_that_cannot_be_encoded_ends_and_the_others_go_on(self):
        future = self.client.validate("a", context={"a": object()})
        self.submit("b")
        self.steps()
        self.assertIsInstance(self.outcomes[0].error, Unencodable)
        with self.assertRaisesRegex(Unencodable, "Job a cannot be encoded"):
            future.result(timeout=0)
        self.assertEqual(self.broker.published, ["b"])

    def test_a_refusal_that_closes_the_channel_loses_no_result_that_waits(self):
        self.submit("a")
        self.steps()
        self.submit("b")
        self.broker.coming = [message("x", tag=1), message("a", tag=2)]
        self.client.step(self.outcomes.append)

        def refuse(submission_id, content_type, body, priority):
            self.broker.close()
            raise PublishRefused(submission_id, "403.")

        self.submit("c")
        with mock.patch.object(self.broker, "publish", refuse):
            self.client.step(self.outcomes.append)
        self.broker.coming = [message("a", tag=1), message("b", tag=2)]  # Not acknowledged, so they come again.
        self.client.collect(self.outcomes.append)
        ended = [outcome.job.submission_id for outcome in self.outcomes if outcome.job is not None]
        self.assertEqual(sorted(ended), ["a", "b", "c"])
        self.assertEqual(self.broker.acknowledged, [1, 1, 2])


class Futures(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.broker = FakeBroker(self.clock)
        self.fleet = Known(worker())
        self.metrics = Recorded()
        settings = Settings(timeout_s=60, max_jobs=3)
        client = Client(self.broker, self.fleet, settings, self.clock, self.clock.wait, metrics=self.metrics)
        self.client = self.enterContext(client)

    def test_every_outcome_completes_its_future(self):
        candidate = Candidate("binary_v2", "param_diff", data=b"body")
        scored = self.client.score("a", 7, candidate, nonce="n", shards=[1], context={"b": 2})
        lost, refused = self.client.validate("b", 8), self.client.submit(Job("c"))
        self.broker.coming = [message("a", "rejected", kind="score")]
        body = Job("a", 7, candidate, "n", [1], None, {"b": 2}).body("tinylm", "application/msgpack")

        def publish(submission_id, content_type, published, priority):
            if submission_id == "c":
                raise Unroutable("c", "no queue.")
            self.assertEqual(published, body)

        with mock.patch.object(self.broker, "publish", publish):
            self.client.collect()
        self.assertEqual(scored.result(timeout=0).code, "candidate_empty")
        with self.assertRaisesRegex(NoResult, "Job b has no result after 60 s"):
            lost.result(timeout=0)
        with self.assertRaises(Unroutable):
            refused.result(timeout=0)

    def test_what_is_left_when_the_client_is_closed_has_stopped(self):
        client = Client(self.broker, self.fleet)
        with client:
            left = client.submit(Job("a"))
        with self.assertRaises(Stopped):
            left.result(timeout=0)
        with self.assertRaises(Stopped):
            client.submit(Job("b"))

    def test_a_future_can_be_cancelled_until_its_job_is_sent(self):
        self.fleet.now = []
        held = self.client.validate("held")
        self.assertTrue(held.cancel())
        self.client.collect()
        self.assertEqual((list(as_completed([held], timeout=0)), self.broker.published), ([held], []))
        self.fleet.now = [worker()]
        self.clock.wait(1)
        sent = self.client.validate("held")
        self.client.step()
        self.assertFalse(sent.cancel())
        self.broker.coming = [message("held")]
        self.client.collect()
        self.assertEqual(sent.result(timeout=0).status, "scored")

    def test_without_a_thread_too_many_jobs_are_refused_and_collect_takes_them_one_by_one(self):
        for name in "abc":
            self.client.validate(name)
        with self.assertRaisesRegex(BacklogFull, "Job d must wait: Settings.max_jobs allows 3 jobs without an outcome"):
            self.client.validate("d")
        most, names = [], []

        def handler(outcome):
            most.append(len(self.client))
            names.append(outcome.job.submission_id)
            if outcome.job.submission_id == "a":
                self.client.validate("of-the-handler")  # In the place of the job that ends here.

        def publish(submission_id, content_type, body, priority):
            self.broker.coming.append(message(submission_id))

        with mock.patch.object(self.broker, "publish", publish):
            self.client.collect(handler, (Job(name) for name in "defgh"))
        self.assertEqual((sorted(names), max(most)), ([*"abcdefgh", "of-the-handler"], 3))

    def test_metrics_count_what_happens(self):
        self.client.validate("a")
        self.client.step()
        self.broker.coming = [message("a"), message("a")]
        self.clock.wait(2)
        for _ in range(4):
            self.client.step()
        self.broker.failures["receive"] = BrokerUnavailable("lost")
        for _ in range(4):
            self.client.step()
        self.client.validate("b", 8)
        self.client.collect()
        calls = [name for name, *_ in self.metrics.calls if name != "load"]
        self.assertEqual(calls, ["submitted", "confirmed", "answered", "duplicate", "disconnected", "reconnected",
                                 "submitted", "timed_out"])  # fmt: skip
        ((_, job, result, seconds),) = [call for call in self.metrics.calls if call[0] == "answered"]
        self.assertEqual((job.submission_id, result.status, result.code), ("a", "scored", None))
        self.assertGreaterEqual(seconds, 2)
        loads = [load for name, *load in self.metrics.calls if name == "load"]
        self.assertEqual(loads, [[1, 0], [0, 1], [0, 0], [1, 0], [0, 0]])

    def test_a_hook_that_raises_changes_nothing(self):
        self.metrics.submitted = mock.Mock(side_effect=RuntimeError("of the hook"))
        future = self.client.validate("a")
        self.client.step()
        self.broker.coming = [message("a")]
        self.client.collect()
        self.assertEqual(future.result(timeout=0).status, "scored")


class Threads(unittest.TestCase):
    """With a thread of its own. The fake broker answers what is published."""

    def setUp(self):
        self.broker = FakeBroker(time.sleep)
        self.broker.clock = mock.Mock(wait=lambda seconds: time.sleep(0.001))
        self.broker.publish = lambda name, content_type, body, priority: self.broker.coming.append(message(name))
        self.fleet = Known(worker())

    def client(self, **settings):
        return Client(self.broker, self.fleet, Settings(timeout_s=60, **settings))

    def test_submit_waits_for_room_and_the_handler_does_not(self):
        heard = []

        def handler(outcome):
            name = outcome.job.submission_id
            heard.append(name)
            if name.startswith("job-"):
                with contextlib.suppress(BacklogFull):
                    for number in range(3):
                        client.validate(f"of-the-handler-{number}-{name}")

        with self.client(max_jobs=2) as client:
            client.start(handler)
            futures = [client.validate(f"job-{number}") for number in range(20)]
            self.assertEqual({future.result(60).status for future in futures}, {"scored"})
        self.assertGreater(len(heard), 20)

    def test_join_returns_when_all_have_ended(self):
        with self.client() as client:
            client.start()
            futures = [client.validate(f"job-{number}") for number in range(20)]
            client.join()
            self.assertTrue(all(future.done() for future in futures))
            for wrong in (client.start, client.step, client.collect):
                with self.assertRaises(RuntimeError):
                    wrong()
        with self.client() as client, self.assertRaisesRegex(RuntimeError, "collect"):
            client.join()

    def test_a_handler_that_raises_stops_the_client(self):
        def failing(outcome):
            raise OSError("the disk is full")

        with self.assertRaisesRegex(OSError, "the disk is full"), self.client(max_jobs=1) as client:
            client.start(failing)
            future = client.validate("a")
            with self.assertRaises(Stopped) as caught:
                future.result(60)
            self.assertIsInstance(caught.exception.__cause__, OSError)
            for use in (client.join, lambda: client.validate("b")):
                with self.assertRaises(Stopped):
                    use()
        self.assertEqual(self.broker.acknowledged, [])


class BoundedSets(unittest.TestCase):
    def test_the_oldest_is_forgotten(self):
        names = BoundedSet(2)
        for name in "abac":
            names.add(name)
        self.assertEqual([name in names for name in "abc"], [True, False, True])


class Commands(unittest.TestCase):
    def run_command(self, *words):
        places = ["--amqp", f"amqp://{NOWHERE}/%2f", "--redis", f"redis://{NOWHERE}/0"]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = cli.main(["--model", "tinylm", *places, *words])
            except SystemExit as ended:
                code = ended.code
        return code, out.getvalue(), err.getvalue()

    def score(self, *words):
        with tempfile.NamedTemporaryFile() as file:
            return self.run_command("score", file.name, "--format", "binary_v2", *words)

    def test_usage_is_64(self):
        self.assertEqual(self.run_command()[0], 64)
        self.assertEqual(self.run_command("score", "x", "--format", "tar", "--semantics", "gradient")[0], 64)
        code, _, err = self.score("--semantics", "gradient")
        self.assertEqual((code, err.count("\n")), (64, 1))
        self.assertIn("--learning-rate is required", err)
        code, _, err = self.run_command(
            "score", "/nothing/here", "--format", "binary_v2", "--semantics", "param_diff", "--model-version", "7"
        )
        self.assertEqual((code, err), (64, "scorer-client: /nothing/here cannot be read: No such file or directory.\n"))
        code, _, err = self.run_command("--amqp", "http://x", "score", "x", "--format", "binary_v2", "--semantics", "param_diff")
        self.assertEqual((code, err.count("--amqp")), (64, 1))

    def test_compression_without_its_package_is_64(self):
        with mock.patch.dict(sys.modules, {"zstandard": None}):
            code, _, err = self.score("--semantics", "param_diff", "--model-version", "7", "--compression", "zstd")
        self.assertEqual(code, 64)
        self.assertEqual(err, "scorer-client: --compression needs the package zstandard: install scorer-client[zstd].\n")

    def test_a_service_that_is_away_is_69(self):
        code, out, err = self.run_command("status")
        self.assertEqual((code, out), (69, "unknown\n"))
        self.assertIn(f"Redis at {NOWHERE} cannot be read", err)
        code, _, err = self.score("--semantics", "param_diff", "--model-version", "7")
        self.assertEqual(code, 69)
        self.assertRegex(err, f"^scorer-client: RabbitMQ at {NOWHERE} is unavailable: .*refused.*address is correct.\n$")

    def test_a_verdict_is_one_line_whatever_its_message_and_its_files_name_hold(self):
        whole = example("score_result.v1-rejected")
        whole["error"]["message"] = "a\nb\x1b[2J"
        result = Result.read(json.dumps(whole).encode(), "application/json")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            Report({result.submission_id: pathlib.Path("fi\x1ble")}).add(Answer(Job(result.submission_id), result))
        self.assertEqual(out.getvalue(), "fi?le  rejected  candidate_empty: a?b?[2J\n")

    def test_there_may_be_one_of_a_thing(self):
        self.assertEqual([counted(n, "job") for n in (0, 1, 2, 1000)], ["0 jobs", "1 job", "2 jobs", "1,000 jobs"])

    def test_the_lines_of_scores_and_failures(self):
        scored = Result.read(msgpack.packb(example("score_result.v1-scored")), None)
        self.assertEqual(verdict_line(scored), "scored  delta +0.000800 ± 0.000100")
        self.assertEqual(verdict_line(replace(scored, verdict=Refusal("poisoned", "m", True), status="failed")),
                         "failed  poisoned: m (may be submitted again)")  # fmt: skip

    def test_the_address_of_a_broker_is_checked(self):
        with self.assertRaisesRegex(ValueError, "begin with amqp://"):
            Broker("http://x", "tinylm")
        for url, host in (("amqp://h", "/"), ("amqp://h//", "/"), ("amqp://h/%2f", "/"), ("amqp://h/a%2fb", "a/b")):
            self.assertEqual(_parameters(*checked(url)).virtual_host, host)
        for url, why in (
            ("amqp://u:secret@h/", "ends in /, which is the virtual host with an empty name: write /%2f for the virtual host /.$"),
            ("amqp://u:secret@h/?heartbeat=3", "ends in /, .* write /%2f"),
            ("amqp://u:secret@h/a/b", "has a / in the name of the virtual host: write %2f.$"),
            ("amqp://u:secret@h///", "has a / in the name of the virtual host"),
        ):
            with self.assertRaisesRegex(ValueError, f"^The RabbitMQ URL {why}"):
                Broker(url, "tinylm")

    def test_a_cluster_is_a_list_of_its_nodes(self):
        a, b = "amqp://u:secret@a", "amqp://u:secret@b:5673/%2f"
        for given in ([a, b], (a, b), f'["{a}", "{b}"]', f" ['{a}', '{b}']"):
            self.assertEqual(checked(given), (a, b))
        self.assertEqual(checked(a), (a,))
        self.assertEqual(Broker([a, b], "tinylm").endpoint.address, "a:5672, b:5673")
        for unfit, why in (
            ([], "at least one"),
            ("[]", "at least one"),
            ('["amqp://u:secret@a', "no TOML array"),
            ("[1]", "no TOML array"),
            ([a, "http://u:secret@b"], "must begin with amqp://"),
            ([a, "amqps://u:secret@b"], "must all begin"),
            ([a, "amqp://u:secret@b/v"], "the same virtual host"),
            ([b, a, "amqp://v:secret@A:5672//"], "name a:5672 twice"),
        ):
            with self.assertRaisesRegex(ValueError, why) as raised:
                checked(unfit)
            self.assertNotIn("secret", str(raised.exception))

    def test_a_heartbeat_is_added_to_a_url_without_one(self):
        for url, expected in (
            ("amqp://u:p@h", "amqp://u:p@h?heartbeat=3"),
            ("amqp://u:p@h//", "amqp://u:p@h//?heartbeat=3"),
            ("amqps://u:p%2f@h:1/%2f?name=x", "amqps://u:p%2f@h:1/%2f?name=x&heartbeat=3"),
            ("amqp://h/v?heartbeat=60", "amqp://h/v?heartbeat=60"),
        ):
            self.assertEqual(with_heartbeat(url, 3), expected)

    def test_the_node_that_was_lost_is_tried_last(self):
        urls = ["amqp://a", "amqp://b", "amqp://c"]
        nodes = Nodes(urls)
        order = list(nodes.round())
        self.assertEqual(sorted(order), urls)
        self.assertEqual(list(nodes.round()), order)
        self.assertEqual(next(nodes.round()), order[0])
        self.assertEqual(list(nodes.round()), [*order[1:], order[0]])
        self.assertEqual({next(Nodes(urls).round()) for _ in range(200)}, set(urls))

    def test_a_node_that_says_nothing_costs_a_moment_and_every_reason_is_given(self):
        with socket.create_server(("127.0.0.1", 0)) as silent, mock.patch("scorer_client.broker.CONNECT_TIMEOUT_S", 0.2):
            place = f"127.0.0.1:{silent.getsockname()[1]}"
            broker = Broker([f"amqp://u:secret@{place}", f"amqp://u:secret@{NOWHERE}"], "tinylm")
            with self.assertRaises(BrokerUnavailable) as raised:
                broker.connect()
        said = str(raised.exception)
        for part in (f"{place}: Timeout during AMQP handshake", f"{NOWHERE}: "):
            self.assertIn(part, said)
        self.assertNotIn("secret", said)
        self.assertIsNone(broker.node)

    def test_a_broker_that_denies_access_is_not_away(self):
        def closed(code, text):
            return repr(ConnectionClosedByBroker(code, text))

        login = "it refused the login of guest; check the user and the password"
        for error, text, denied in (
            (ProbableAuthenticationError(closed(403, "ACCESS_REFUSED - Login was refused")), login, True),
            (ProbableAccessDeniedError(closed(530, "NOT_ALLOWED - vhost '/v' not found")), "use the virtual host '/v' (NOT_", True),
            (ChannelClosedByBroker(403, "ACCESS_REFUSED - no queue"), "ACCESS_REFUSED - no queue", True),
            (ChannelClosedByBroker(406, "PRECONDITION_FAILED"), "PRECONDITION_FAILED", False),
            # As when a proxy drops the connection.
            (ProbableAuthenticationError(repr(StreamLostError("reset"))), "reset", False),
            (ProbableAccessDeniedError(closed(320, "CONNECTION_FORCED - shutdown")), "CONNECTION_FORCED", False),
        ):
            reason = _reason("amqp://h/%2fv", error)
            self.assertIn(text, reason.text)
            self.assertEqual(reason.denied, denied, error)

    def test_a_reason_that_all_nodes_share_is_given_once(self):
        one, other = urls = ("amqp://u:secret@a", "amqp://u:secret@b")
        unavailable = Endpoint(urls, "tinylm", "scorer", None).unavailable
        login, away = Reason.login(one), Reason("refused")
        why = "it refused the login of u; check the user and the password"
        advice = "Check that it is running and the address is correct."
        for reasons, said in (
            ({one: login}, f"RabbitMQ at a:5672 denies access: {why}."),
            ({one: login, other: login}, f"RabbitMQ at a:5672, b:5672 denies access: {why}."),
            ({one: login, other: away}, f"RabbitMQ at a:5672, b:5672 is unavailable: a:5672: {why}; b:5672: refused. {advice}"),
        ):
            self.assertEqual(str(unavailable(reasons)), said)

    def test_the_address_of_redis_names_a_database_or_none(self):
        for path in ("", "/", "/3", "?db=3"):
            Fleet(f"redis://{NOWHERE}{path}", "tinylm")
        with self.assertRaisesRegex(ValueError, "'abc', is not a database number"):
            Fleet(f"redis://{NOWHERE}/abc", "tinylm")


if __name__ == "__main__":
    unittest.main()
