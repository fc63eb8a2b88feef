"""Merge jobs: what is asked, which workers are waited for, and what comes back."""

import asyncio
import base64
import json
import logging
import math
import time
import unittest

import msgpack
import scorer_client
from scorer_client import Candidate, Client, Job, Member, Merge, NoResult, Refusal, Score, Settings, aio
from scorer_client.endpoint import Delivery
from scorer_client.fields import Fields, Malformed
from scorer_client.jobs import Encoding
from scorer_client.merges import Change, Contribution, Facts, Gap, Joint, Merged, MergedMember, Worth
from scorer_client.report import verdict_line
from scorer_client.results import Result
from test_aio_client import Broker as AioBroker
from test_aio_client import Known as AioKnown
from test_client import Clock, FakeBroker, Known, example, worker

CANDIDATE = Candidate("binary_v2", "gradient", 0.1, data=b"body")
BY_URL = Candidate("safetensors", "param_diff", url="https://x.example/b", sha256="8" * 64, size=9)
MEMBERS = (Member("a", CANDIDATE), Member("b", BY_URL, weight=2))
ENCODINGS = Encoding.__args__

OLD = worker("old")
NEW = worker("new", accepts=frozenset({"score", "validate", "merge", "stop"}))


def setUpModule():
    logging.getLogger("scorer_client").setLevel(logging.NOTSET)


def read(message, content_type="application/json"):
    body = json.dumps(message).encode() if content_type == "application/json" else msgpack.packb(message)
    return Result.read(body, content_type)


def whole(**fields):
    return example("score_result.v1-merge") | fields


def answer(name, tag=1):
    return Delivery(tag, f"{name}:7:scored:", "application/msgpack", msgpack.packb(whole(submission_id=name)))


class Asked(unittest.TestCase):
    def test_what_is_wrong_is_said_when_it_is_made(self):
        def two(**fields):
            return lambda: Merge("m", 7, MEMBERS, **fields)

        for make, why in (
            (lambda: Merge("m", 7, MEMBERS[:1]), "^Merge m has 1 member: it needs at least 2"),
            (lambda: Merge("m", 7, []), "^Merge m has 0 members"),
            (lambda: Merge("m", 7, [*MEMBERS, MEMBERS[0]]), "^Merge m has two members called a"),
            (lambda: Merge("a b", 7, MEMBERS), "^submission_id 'a b' must be 1 to 128"),
            (two(on_rejected="keep"), "^on_rejected 'keep' of the merge m must be drop or fail"),
            (two(priority=256), "^priority 256"),
            (lambda: Member("", CANDIDATE), "^id of a member '' must be 1 to 128"),
            (lambda: Member("é", CANDIDATE), "^id of a member 'é'"),
            (lambda: Member("n" * 129, CANDIDATE), "^id of a member 'nnn"),
            *(
                (lambda weight=weight: Member("a", CANDIDATE, weight), "^weight .* of the member a must be finite and not 0")
                for weight in (0, 0.0, -0.0, math.nan, math.inf, -math.inf)
            ),
        ):
            with self.assertRaisesRegex(ValueError, why):
                make()
        self.assertEqual(Member("a", CANDIDATE, -0.5).weight, -0.5)

    def test_the_example_of_the_schema_can_be_asked(self):
        asked = example("score_job.v1-merge")
        members = [
            Member(
                member["id"],
                Candidate(**member["candidate"] | ({"data": b"{}"} if "data" in member["candidate"] else {})),
                member.get("weight"),
            )
            for member in asked["members"]
        ]
        context, deadline = asked["context"], asked["deadline_ms"]
        merge = Merge("merge:epoch-12", 7, members, "fail", "epoch-12", deadline_ms=deadline, context=context)
        sent = json.loads(merge.body("tinylm", "application/json"))
        inline = sent["members"][0]["candidate"]
        self.assertEqual((len(inline.pop("sha256")), inline.pop("size")), (64, 2))  # Of inline data, given in addition.
        self.assertEqual(sent, asked)

    def test_both_encodings_say_the_same(self):
        merge = Merge("m", 7, MEMBERS, shards=(2, 1), priority=9)
        packed = msgpack.unpackb(merge.body("tinylm", "application/msgpack"))
        text = json.loads(merge.body("tinylm", "application/json"))
        data = text["members"][0]["candidate"].pop("data")
        self.assertEqual(base64.b64decode(data), packed["members"][0]["candidate"].pop("data"))
        self.assertEqual(packed, text)
        self.assertEqual((packed["kind"], packed["on_rejected"]), ("merge", "drop"))
        self.assertEqual(packed["validation"], {"nonce": "", "shards": [2, 1]})
        self.assertNotIn("weight", packed["members"][0])
        self.assertIs(type(packed["members"][1]["weight"]), float)
        self.assertNotIn("priority", packed)

    def test_what_a_context_cannot_be_written_as_is_named(self):
        merge = Merge("m", 7, MEMBERS, context={"a": 1 << 70})
        with self.assertRaisesRegex(ValueError, "Job m cannot be encoded as application/msgpack"):
            merge.body("tinylm", "application/msgpack")

    def test_it_needs_workers_that_know_merges(self):
        self.assertEqual((Merge("m", 7, MEMBERS).kind, Merge("m", 7, MEMBERS).needs), ("merge", {"merge"}))


class ComesBack(unittest.TestCase):
    def test_everything_is_read_in_both_encodings(self):
        facts = Facts("7" * 64, 20, 3850, 3850, 0.71)
        contribution = Contribution(0.0007650000000000001, 0.0001, (0.0005650000000000001, 0.000965))
        first = Worth(facts, Change(0.0008, 0.0001), Change(0.00073, 0.0001), contribution)
        for content_type in ENCODINGS:
            result = read(whole(), content_type)
            merged = result.verdict
            self.assertIsInstance(merged, Merged)
            self.assertEqual((result.kind, result.status, result.code), ("merge", "scored", None))
            self.assertEqual(merged.joint, Joint(0.00151, 0.0002, (0.00109, 0.00193), 1.1625, 1.16099))
            self.assertEqual(merged.gap, Gap(0.0, 0.0, False))
            self.assertEqual((merged.windows, merged.tokens, merged.plan, merged.passes), (17, 2176, "3" * 64, 4))
            self.assertEqual([(member.id, member.status) for member in merged.members],
                             [("miner-7", "scored"), ("miner-8", "rejected"), ("miner-9", "scored")])  # fmt: skip
            self.assertEqual(merged.members[0], MergedMember("miner-7", "scored", 1 / 3, first))
            self.assertEqual(list(merged.worths), ["miner-7", "miner-9"])
            empty = Refusal("candidate_empty", "the candidate has no entries", False)
            self.assertEqual(merged.refusals, {"miner-8": empty})
        self.assertEqual(verdict_line(result), "scored  joint delta +0.001510 of 3 members")

    def test_of_one_window_there_is_no_error(self):
        message = whole()
        message["joint"] |= {"stderr": None, "ci95": None}
        message["gap"] |= {"stderr": None}
        for member in message["members"]:
            for part in ("alone", "last", "contribution"):
                if part in member:
                    member[part] |= {"stderr": None}
            if "contribution" in member:
                member["contribution"]["ci95"] = None
        merged = read(message).verdict
        self.assertEqual((merged.joint.stderr, merged.joint.ci95, merged.gap.stderr), (None, None, None))
        self.assertEqual(merged.worths["miner-9"].contribution, Contribution(0.000745, None, None))

    def test_a_merge_that_was_refused_has_its_code(self):
        refused = example("score_result.v1-rejected") | {"kind": "merge"}
        self.assertEqual(read(refused).code, "candidate_empty")

    def test_a_field_that_is_missing_or_of_another_type_is_refused_by_its_name(self):
        numbers = (None, "0.1", True, math.inf, math.nan, [], 10**400)
        optional = ("0.1", True, math.inf, [])
        interval = (1, "x", [], [1], [1, 2, 3], [1, None], [2, 1], [math.nan, 1], {})
        wholes = (None, -1, 1.5, "4", True)
        worth, left_out = ("members", 0), ("members", 1)
        for path, values in {
            ("joint",): (None, [], 1),
            ("joint", "delta"): numbers,
            ("joint", "stderr"): optional,
            ("joint", "ci95"): interval,
            ("joint", "loss_before"): numbers,
            ("joint", "loss_after"): numbers,
            ("windows",): wholes,
            ("tokens",): wholes,
            ("passes",): wholes,
            ("plan",): (None, "", "g" * 64, 3),
            ("gap",): (None, 0.1),
            ("gap", "value"): numbers,
            ("gap", "stderr"): optional,
            ("gap", "large"): (None, 0, "false"),
            ("members",): (None, {}, "x"),
            (*worth,): (None, [], "miner"),
            (*worth, "id"): (None, 7, "", "a b", "n" * 129, "a\x1b"),
            (*worth, "status"): (None, "dropped", 1),
            (*worth, "weight"): numbers,
            (*worth, "candidate"): (None, []),
            (*worth, "candidate", "sha256"): (None, "7" * 63, 7),
            (*worth, "candidate", "tensors"): wholes,
            (*worth, "candidate", "entries"): wholes,
            (*worth, "candidate", "effective_entries"): wholes,
            (*worth, "candidate", "l2_norm"): numbers,
            (*worth, "alone"): (None, 1),
            (*worth, "alone", "delta"): numbers,
            (*worth, "last"): (None, 1),
            (*worth, "last", "stderr"): optional,
            (*worth, "contribution"): (None, 0.1),
            (*worth, "contribution", "value"): numbers,
            (*worth, "contribution", "ci95"): interval,
            (*left_out, "error"): (None, "gone"),
            (*left_out, "error", "code"): (None, 7),
            (*left_out, "error", "retryable"): (None, 0),
        }.items():
            for value in values:
                with self.subTest(path=path, value=value):
                    self.refused(path, value)

    def refused(self, path, value):
        message = whole()
        part = message
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        name = "a member" if isinstance(path[-1], int) else path[-1]
        with self.assertRaisesRegex(Malformed, f"{name}.* of the result"):
            Merged.read(Fields("the result", message))

    def test_a_member_twice_and_a_merge_of_nobody_are_refused(self):
        first, left_out, _ = whole()["members"]
        with self.assertRaisesRegex(Malformed, "members of the result of .* has miner-7 twice"):
            read(whole(members=[first, left_out, first]))
        for members in ([], [left_out]):
            with self.assertRaisesRegex(Malformed, "members of the result of .* has none that was scored"):
                read(whole(members=members))

    def test_the_sentence_names_the_member(self):
        message = whole()
        del message["members"][2]["contribution"]["value"]
        with self.assertRaisesRegex(
            Malformed, "^value of contribution of the member miner-9 of the result of merge:epoch-12 is missing"
        ):
            read(message)

    def test_scores_have_their_interval_and_stopped_ones_none(self):
        score = read(example("score_result.v1-scored")).verdict
        self.assertIsInstance(score, Score)
        self.assertEqual(list(score.ci95), example("score_result.v1-scored")["ci95"])
        self.assertIsNone(read(example("score_result.v1-one-window")).verdict.ci95)
        stopped = example("score_result.v1-stopped")
        self.assertIsNone(read(stopped).verdict.ci95)
        with self.assertRaisesRegex(Malformed, "ci95 of the result of .* must be null, because"):
            read(stopped | {"ci95": [0.1, 0.2]})


class Held(unittest.TestCase):
    """Until every live worker of the model lists `merge`."""

    def setUp(self):
        self.clock = Clock()
        self.broker, self.fleet, self.outcomes = FakeBroker(self.clock), Known(NEW, OLD), []
        self.client = Client(self.broker, self.fleet, Settings(timeout_s=60, poll_interval_s=0), self.clock, self.clock.wait)
        self.broker.connect()

    def steps(self):
        for _ in range(4):
            self.client.step(self.outcomes.append)

    def test_it_is_sent_when_every_live_worker_knows_merges(self):
        with self.assertLogs("scorer_client", "WARNING") as logs:
            asked = self.client.merge("together", 7, MEMBERS, nonce="n")
            self.client.submit(Job("loss"))
            self.steps()
            self.assertEqual((self.broker.published, self.client.held), (["loss"], 1))
            self.fleet.now = [NEW]
            self.steps()
        self.assertEqual(self.broker.published, ["loss", "together"])
        self.broker.coming = [answer("together")]
        self.steps()
        self.assertEqual(asked.result(timeout=0).verdict.joint.delta, 0.00151)
        self.assertEqual([record.getMessage() for record in logs.records], [
            "Jobs that need merge are held back: some live workers do not accept merge: old (1 of 2).",
            "Every live worker accepts merge now.",
        ])  # fmt: skip

    def test_one_that_times_out_says_what_it_waited_for(self):
        asked = self.client.submit(Merge("together", 7, MEMBERS))
        with self.assertLogs("scorer_client", "WARNING"):
            self.client.collect(self.outcomes.append)
        with self.assertRaisesRegex(NoResult, "held back because some live workers do not accept merge: old"):
            asked.result(timeout=0)

    def test_the_result_of_another_kind_of_job_is_not_its_own(self):
        self.fleet.now = [NEW]
        asked = self.client.submit(Merge("together", 7, MEMBERS))
        self.steps()
        score = msgpack.packb(example("score_result.v1-scored") | {"submission_id": "together"})
        self.broker.coming = [Delivery(1, "x", "application/msgpack", score)]
        self.steps()
        self.assertIsNone(self.outcomes[0].job)
        self.assertFalse(asked.done())

    def test_what_merge_is_given_is_what_is_sent(self):
        self.fleet.now = [NEW]
        bodies = []
        self.broker.publish = lambda name, kind, body, priority: bodies.append(body)
        how = {"on_rejected": "fail", "nonce": "n", "shards": [1], "deadline_ms": 5, "context": {"a": 1}}
        self.client.merge("together", 7, MEMBERS, **how)
        self.steps()
        self.assertEqual(bodies, [Merge("together", 7, MEMBERS, **how).body("tinylm", "application/msgpack")])


class HeldInAsyncio(unittest.IsolatedAsyncioTestCase):
    def client(self, broker, fleet):
        return aio.Client(broker, fleet, Settings(timeout_s=60, tick_s=0.01, poll_interval_s=0.01), clock=time.monotonic)

    async def until(self, holds):
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.001)

    async def test_it_is_sent_when_every_live_worker_knows_merges(self):
        broker, fleet = AioBroker(), AioKnown(NEW, OLD)
        with self.assertLogs("scorer_client", "WARNING") as logs:
            async with self.client(broker, fleet) as client:
                asked = asyncio.create_task(client.merge("together", 7, MEMBERS))
                await self.until(lambda: logs.records and client.held == 1)
                fleet.now = [NEW]
                await self.until(lambda: broker.published)
                broker.arrived(answer("together"))
                result = await asked
        self.assertEqual(result.verdict.joint.delta, 0.00151)
        self.assertIn("some live workers do not accept merge: old (1 of 2)", logs.records[0].getMessage())

    async def test_what_merge_is_given_is_what_is_sent(self):
        broker, bodies = AioBroker(), []

        async def publish(submission_id, content_type, body, alone, priority):
            bodies.append(body)
            broker.arrived(answer(submission_id))

        broker.publish = publish
        how = {"on_rejected": "fail", "nonce": "n", "shards": [1], "deadline_ms": 5, "context": {"a": 1}}
        async with self.client(broker, AioKnown(NEW)) as client:
            await client.merge("together", 7, MEMBERS, **how)
            await (await client.submit(Merge("again", 7, MEMBERS)))
        self.assertEqual(bodies[0], Merge("together", 7, MEMBERS, **how).body("tinylm", "application/msgpack"))


class Words(unittest.TestCase):
    def test_the_package_exports_what_is_needed(self):
        self.assertLessEqual(
            {"AnyJob", "Member", "Merge", "Merged", "MergedMember", "Round", "Settlement", "Unsettled", "Worth"},
            set(scorer_client.__all__),
        )


if __name__ == "__main__":
    unittest.main()
