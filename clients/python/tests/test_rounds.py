"""Rounds: who is merged, who is left out, and what is paid."""

import contextlib
import io
import json
import pathlib
import random
import tempfile
import unittest
from dataclasses import replace
from unittest import mock

from scorer_client import Answer, Candidate, Job, Member, Merge, Nacked, Round, Unsettled, cli
from scorer_client.results import Result
from test_client import NOWHERE, example

PLAN = example("score_result.v1-scored")["plan"]


def candidate(id):
    return Candidate("binary_v2", "param_diff", data=id.encode())


def read(message):
    return Result.read(json.dumps(message).encode(), "application/json")


def scored(id, delta=0.001, error=0.0001, **fields):
    """The answer to a score job. Its interval is twice its error to either side."""
    job = Job(id, 7, candidate(id), "epoch", [1, 2])
    message = example("score_result.v1-scored") | {"submission_id": id, "delta": delta, "score": max(delta, 0)}
    message |= {"stderr": error, "ci95": None if error is None else [delta - 2 * error, delta + 2 * error]}
    return Answer(job, read(message | fields))


def stopped(id):
    return Answer(Job(id, 7, candidate(id)), read(example("score_result.v1-stopped") | {"submission_id": id}))


def rejected(id):
    return Answer(Job(id, 7, candidate(id)), read(example("score_result.v1-rejected") | {"submission_id": id}))


class Bench:
    """A worker: the loss is quadratic in what members add to each direction, `off` is what the measure misses."""

    def __init__(self, changes, curve=1.0, refused=(), off=0.0, large=False):
        self.changes, self.curve, self.refused, self.off, self.large = changes, curve, refused, off, large

    def delta(self, weights):
        reach = sum(weight * self.changes[id] for id, weight in weights.items())
        return reach - self.curve * reach**2 / 2

    def answer(self, merge, **fields):
        weights = {member.id: member.weight or 1 / len(merge.members) for member in merge.members}
        left = {id: weight for id, weight in weights.items() if id not in self.refused}
        members = [self.member(id, weight, left) for id, weight in sorted(weights.items())]
        summed = sum(member["contribution"]["value"] for member in members if "contribution" in member)
        joint = self.delta(left) + self.off
        message = example("score_result.v1-merge") | {"submission_id": merge.submission_id, "members": members, "plan": PLAN}
        message["joint"] |= {"delta": joint}
        message["gap"] = {"value": joint - summed, "stderr": 0.0, "large": self.large}
        return read(message | fields)

    def member(self, id, weight, left):
        dead, alive = example("score_result.v1-merge")["members"][1:3]
        if id in self.refused:
            return dead | {"id": id, "weight": weight}
        others = {other: weight for other, weight in left.items() if other != id}
        alone, last = self.delta({id: weight}), self.delta(left) - self.delta(others)
        changes = {"alone": {"delta": alone, "stderr": 0.0}, "last": {"delta": last, "stderr": 0.0}}
        value = (alone + last) / 2
        return alive | changes | {"id": id, "weight": weight, "contribution": {"value": value, "stderr": 0.0, "ci95": None}}


def run(round, bench):
    """The merges that are asked, each answered."""
    merges = []
    while (merge := round.next_merge()) is not None:
        merges.append(merge)
        round.add(bench.answer(merge))
    return merges


def ids(merge):
    return [member.id for member in merge.members]


class Chosen(unittest.TestCase):
    def test_whose_whole_interval_is_above_0_is_chosen_the_best_first(self):
        answers = [
            scored("good", 0.001),
            scored("best", 0.003),
            scored("as-good", 0.001),
            scored("unsure", 0.0001, 0.0001),
            scored("just-not", 0.002, 0.001),
            scored("harmful", -0.001),
            scored("one-window", 0.01, None),
            stopped("stopped"),
            rejected("rejected"),
        ]
        round = Round("m", answers)
        self.assertEqual((round.chosen, round.crowded_out), (["best", "as-good", "good"], []))
        merge = round.next_merge()
        members = [Member(id, candidate(id)) for id in round.chosen]
        self.assertEqual(merge, Merge("m", 7, members, nonce="epoch", shards=[1, 2]))

    def test_there_is_room_for_so_many_and_the_others_are_named(self):
        answers = [scored(f"c{number}", 0.001 + number / 1000) for number in range(5)]
        round = Round("m", answers, max_members=3)
        self.assertEqual((round.chosen, round.crowded_out), (["c4", "c3", "c2"], ["c1", "c0"]))
        self.assertEqual(len(Round("m", [scored(f"c{number}") for number in range(70)]).chosen), 64)

    def test_answers_to_nobody_and_to_other_jobs_are_passed_over(self):
        loss = read(example("score_result.v1-loss") | {"submission_id": "loss"})
        merged = read(example("score_result.v1-merge"))
        merge = Merge("merge:epoch-12", 7, [Member("a", candidate("a")), Member("b", candidate("b"))])
        others = [Answer(Job("loss"), loss), replace(scored("stranger"), job=None), Answer(merge, merged)]
        self.assertEqual(Round("m", [*others, scored("a"), scored("b")]).chosen, ["a", "b"])

    def test_what_cannot_be_compared_or_named_is_refused(self):
        two = [scored("a"), scored("b")]
        for make, why in (
            (lambda: Round("m", [*two, scored("c", plan="4" * 64)]), "of 2 plans"),
            (lambda: Round("m", [*two, scored("c", model_version=8)]), "of 2 model versions"),
            (lambda: Round("m", [*two, scored("a")]), "Job a has two answers"),
            (lambda: Round("m", two, weights={"a": 1}), "weights has none for b"),
            (lambda: Round("m", two, weights={"a": 1, "b": 0}), "weight 0 of the member b must be finite and not 0"),
            (lambda: Round("m", two, max_members=1), "max_members 1 must be at least 2"),
            (lambda: Round("a b", two), "submission_id 'a b"),
            (lambda: Round("n" * 127, two), "submission_id 'nnn"),  # There would be no room for the second name.
        ):
            with self.assertRaisesRegex(ValueError, why):
                make()

    def test_weights_and_nonce_may_be_given(self):
        merge = Round("m", [scored("a"), scored("b")], weights={"a": 0.5, "b": 2, "c": 1}, nonce="other").next_merge()
        self.assertEqual([(member.id, member.weight) for member in merge.members], [("a", 0.5), ("b", 2)])
        self.assertEqual(merge.nonce, "other")


class Paid(unittest.TestCase):
    def test_one_merge_pays_by_contribution(self):
        round = Round("m", [scored(id) for id in "abc"])
        merges = run(round, Bench({"a": 0.3, "b": 0.3, "c": 0.1}))
        self.assertEqual([merge.submission_id for merge in merges], ["m"])
        settled = round.settle()
        payments = settled.payments()
        self.assertEqual(payments.keys(), {"a", "b", "c"})
        self.assertEqual(payments["a"], payments["b"])  # Copies are paid equally.
        self.assertAlmostEqual(sum(payments.values()), settled.joint_delta)
        self.assertEqual(settled.weights, dict.fromkeys("abc", 1 / 3))

    def test_with_the_gap_they_sum_to_the_joint_delta_whatever_it_is(self):
        chance = random.Random(7)
        for size in range(2, 20):
            names = [f"c{number}" for number in range(size)]
            weights = {name: chance.choice((0.5, 1.0, -0.25, 3.0)) for name in names}
            bench = Bench({name: chance.gauss(0, 1) for name in names}, chance.uniform(0, 3), off=chance.gauss(0, 1))
            round = Round("m", [scored(name) for name in names], weights=weights)
            run(round, bench)
            settled = round.settle()
            paid = settled.payments(with_gap=True)
            self.assertAlmostEqual(sum(paid.values()), settled.joint_delta, delta=1e-12 * sum(map(abs, paid.values())))
            self.assertGreaterEqual(min(settled.payments().values()), 0)

    def test_who_contributes_less_than_0_is_paid_nothing_and_owes_with_the_gap(self):
        round = Round("m", [scored("a"), scored("b")], weights={"a": 1, "b": 1})
        run(round, Bench({"a": 1.0, "b": -0.5}))
        settled = round.settle()
        self.assertEqual(settled.payments()["b"], 0)
        self.assertLess(settled.payments(with_gap=True)["b"], 0)

    def test_a_large_gap_is_said(self):
        round = Round("m", [scored("a"), scored("b"), scored("c")])
        run(round, Bench(dict.fromkeys("abc", 0.1), off=0.5, large=True))
        self.assertTrue(round.settle().gap.large)
        self.assertIs(round.settle().gap, round.merged.gap)

    def test_who_is_refused_within_the_merge_is_named_and_the_others_keep_their_weights(self):
        round = Round("m", [scored(id) for id in "abcd"], leave_out_negative=True)
        bench = Bench({"a": 0.5, "b": 0.4, "c": -0.3, "d": 0.1}, refused=("d",))
        first, second = run(round, bench)
        self.assertEqual((ids(first), ids(second)), (list("abcd"), ["a", "b"]))
        self.assertEqual(round.refused["d"].code, "candidate_empty")
        round = Round("m", [scored(id) for id in "abd"])
        run(round, bench)
        settled = round.settle()
        self.assertEqual(settled.weights, {"a": 1 / 3, "b": 1 / 3})
        self.assertEqual(settled.payments(with_gap=True).keys(), {"a", "b"})
        self.assertAlmostEqual(sum(settled.payments(with_gap=True).values()), settled.joint_delta)


class LeftOut(unittest.TestCase):
    def test_members_are_left_out_until_no_contribution_is_negative(self):
        round = Round("m", [scored(id) for id in "abcd"], leave_out_negative=True)
        bench = Bench({"a": 1.0, "b": 0.8, "c": -0.5, "d": 1.4})
        first, second = run(round, bench)
        self.assertEqual([first.submission_id, second.submission_id], ["m", "m:2"])
        self.assertEqual(ids(second), ["a", "b", "d"])
        self.assertEqual(round.negative, ["c"])
        settled = round.settle()
        self.assertEqual(settled.weights, dict.fromkeys("abd", 1 / 3))
        self.assertGreaterEqual(min(settled.contributions.values()), 0)

    def test_given_weights_stay_and_one_departure_may_bring_others(self):
        """Together they go too far. Once the one that held them back is gone, nobody helps as the last."""
        round = Round("m", [scored(id) for id in "abcd"], weights=dict.fromkeys("abcd", 1.0), leave_out_negative=True)
        first, second = run(round, Bench({"a": 1.2, "b": 0.9, "c": -0.3, "d": 0.1}))
        self.assertEqual((ids(second), [member.weight for member in second.members]), (["a", "b", "d"], [1.0] * 3))
        self.assertEqual(round.negative, ["c", "a", "b", "d"])
        self.assertEqual(round.settle().payments(), {})

    def test_it_ends_when_fewer_than_two_are_left(self):
        for changes, left in (({"a": 0.5, "b": -0.5, "c": -0.1}, ["a"]), (dict.fromkeys("abc", -0.5), [])):
            round = Round("m", [scored(id, 0.002) for id in "abc"], leave_out_negative=True)
            self.assertEqual(len(run(round, Bench(changes))), 1)
            settled = round.settle()
            # With equal weights, the one that is left has a weight of 1, as in its score.
            self.assertEqual(settled.payments(), dict.fromkeys(left, 0.002))
            self.assertEqual(settled.weights, dict.fromkeys(left, 1.0))
            self.assertEqual((settled.joint_delta, settled.gap.value), (0.002 * len(left), 0))
            self.assertEqual(settled.payments(with_gap=True), settled.payments())

    def test_the_one_that_is_left_with_a_given_weight_is_worth_what_it_changed_alone(self):
        round = Round("m", [scored("a"), scored("b")], weights={"a": 0.5, "b": 0.5}, leave_out_negative=True)
        bench = Bench({"a": 0.5, "b": -0.5})
        run(round, bench)
        self.assertEqual(round.settle().payments(), {"a": bench.delta({"a": 0.5})})
        self.assertEqual(round.settle().weights, {"a": 0.5})

    def test_it_always_ends(self):
        chance = random.Random(7)
        for _ in range(50):
            names = [f"c{number}" for number in range(chance.randint(2, 12))]
            bench = Bench({name: chance.gauss(0, 1) for name in names}, 2.0, refused=chance.sample(names, 1))
            round = Round("m", [scored(name) for name in names], leave_out_negative=True)
            merges = run(round, bench)
            self.assertLess(len(merges), len(names))
            self.assertEqual(len({merge.submission_id for merge in merges}), len(merges))
            self.assertGreaterEqual(min(round.settle().contributions.values(), default=0), 0)


class Unfinished(unittest.TestCase):
    def test_of_fewer_than_two_there_is_no_merge(self):
        for answers, paid in (([], {}), ([scored("bad", -1)], {}), ([scored("a", 0.002), scored("bad", -1)], {"a": 0.002})):
            round = Round("m", answers)
            self.assertIsNone(round.next_merge())
            self.assertEqual((round.settle().payments(), round.settle().joint_delta), (paid, sum(paid.values())))
        self.assertEqual(Round("m", [scored("a", 0.002)], weights={"a": 1}).settle().payments(), {"a": 0.002})
        with self.assertRaisesRegex(Unsettled, "a was chosen alone, and nothing has measured it with its weight of 0.5"):
            Round("m", [scored("a")], weights={"a": 0.5}).settle()

    def test_until_it_is_answered_the_merge_stays_the_same_and_nobody_is_paid(self):
        round = Round("m", [scored("a"), scored("b")])
        self.assertEqual(round.next_merge(), round.next_merge())
        with self.assertRaisesRegex(Unsettled, "The merge m has no result yet"):
            round.settle()

    def test_a_merge_that_is_refused_ends_the_round_unpaid(self):
        for id in ("m", "m:2"):
            round = Round("m", [scored(id) for id in "abc"], leave_out_negative=True)
            if id == "m:2":
                round.add(Bench({"a": 0.5, "b": -0.5, "c": 0.1}).answer(round.next_merge()))
            round.add(read(example("score_result.v1-rejected") | {"kind": "merge", "submission_id": id}))
            self.assertIsNone(round.next_merge())
            self.assertEqual(round.refusal.code, "candidate_empty")
            with self.assertRaisesRegex(Unsettled, f"The merge {id} was refused: candidate_empty: "):
                round.settle()

    def test_another_result_is_not_taken_for_the_merges(self):
        bench = Bench({"a": 0.5, "b": 0.4, "c": 0.1})
        round = Round("m", [scored("a"), scored("b")])
        merge = round.next_merge()
        more = replace(merge, members=[*merge.members, Member("c", candidate("c"))])
        heavy = replace(merge, members=[replace(member, weight=2.0) for member in merge.members])
        for result, why in (
            (bench.answer(replace(merge, submission_id="other")), "The result of other answers no merge"),
            (replace(scored("m").result, submission_id="m"), "The result of m is a Score, not that of a merge"),
            (bench.answer(more), "other members than its merge"),
            (bench.answer(merge, plan="4" * 64), "another plan than the scores"),
            (bench.answer(merge, model_version=8), "is of model version 8"),
            (bench.answer(heavy), "or other weights"),
            (bench.answer(merge, gap={"value": 0.1, "stderr": 0.0, "large": False}), "contradicts itself"),
        ):
            with self.assertRaisesRegex(ValueError, why):
                round.add(result)
        self.assertEqual(round.next_merge(), merge)
        round.add(bench.answer(merge))
        with self.assertRaisesRegex(ValueError, "answers no merge"):
            round.add(bench.answer(merge))

    def test_with_a_nonce_of_its_own_the_merge_has_a_plan_of_its_own(self):
        round = Round("m", [scored("a"), scored("b")], nonce="other")
        round.add(Bench({"a": 0.5, "b": 0.4}).answer(round.next_merge(), plan="4" * 64))
        self.assertEqual(round.merged.plan, "4" * 64)


class CommandLine(unittest.TestCase):
    """`score --merge`: the client is a fake that answers scores with these deltas, and merges as the bench does."""

    def run_score(self, deltas, bench, *words, failing=None):
        merges = []

        def answered(job):
            delta = deltas[job.submission_id.partition(":")[0]]
            return Answer(job, scored(job.submission_id, delta).result)

        def collect(handler=None, jobs=()):
            for job in jobs:
                handler(answered(job))

        def submit(merge):
            merges.append(merge)
            future = mock.Mock()
            future.result.side_effect = failing
            bench.changes = {member.id: bench.changes[member.id.partition(":")[0]] for member in merge.members} | bench.changes
            future.result.return_value = bench.answer(merge)
            return future

        client = mock.MagicMock()
        entered = client.return_value.__enter__.return_value
        entered.collect, entered.submit = collect, submit
        places = ["--amqp", f"amqp://{NOWHERE}", "--redis", f"redis://{NOWHERE}", "--model", "tinylm"]
        options = ["--format", "binary_v2", "--semantics", "param_diff", "--model-version", "7"]
        out, err = io.StringIO(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(cli, "Client", client):
            paths = [pathlib.Path(folder, name) for name in deltas]
            for path in paths:
                path.write_bytes(path.name.encode())
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = cli.main([*places, "score", *map(str, paths), *options, *words])
                except SystemExit as ended:
                    code = ended.code
            lines = [line.replace(f"{folder}/", "") for line in out.getvalue().splitlines()]
        return code, lines, err.getvalue(), merges

    DELTAS = {"a": 0.002, "b": 0.003, "bad": -0.001}

    def test_those_whose_interval_is_above_0_are_merged_only_if_asked(self):
        code, lines, _, merges = self.run_score(self.DELTAS, Bench({"a": 0.2, "b": 0.4}), "--merge")
        self.assertEqual((code, len(merges), len(merges[0].members)), (0, 1, 2))
        self.assertEqual(lines[3], "merge  joint delta +0.255000, 2 of 2 chosen candidates")
        self.assertEqual(lines[4:6], ["b  contributes +0.170000, with weight 0.5", "a  contributes +0.085000, with weight 0.5"])
        code, lines, _, merges = self.run_score({"bad": -0.001}, Bench({}), "--merge")
        self.assertEqual((code, merges, lines[1].partition(":")[0]), (0, [], "merge  there is nothing to merge"))
        code, lines, _, merges = self.run_score(self.DELTAS, Bench({}))
        self.assertEqual((code, merges), (0, []))

    def test_who_is_left_out_and_a_large_gap_are_said(self):
        bench = Bench({"a": -0.2, "b": 0.4, "c": 0.3}, off=0.5, large=True)
        deltas = {"a": 0.002, "b": 0.003, "c": 0.004}
        _, lines, _, merges = self.run_score(deltas, bench, "--merge", "--leave-out-negative")
        self.assertEqual(len(merges), 2)
        self.assertIn("a  left out: its contribution was negative", lines)
        self.assertTrue(any(line.endswith("is large: the contributions are a guide, not a measure") for line in lines), lines)

    def test_what_fails_is_said_and_is_the_exit_code(self):
        bench = Bench({"a": 0.2, "b": 0.4})
        code, _, said, _ = self.run_score(self.DELTAS, bench, "--merge", failing=Nacked("merge", "the queue is full"))
        self.assertEqual((code, said), (1, "scorer-client: Job merge was not accepted: the queue is full\n"))
        code, _, said, _ = self.run_score(self.DELTAS, bench, "--leave-out-negative")
        self.assertEqual((code, said), (64, "scorer-client: --leave-out-negative is about the merge: it needs --merge.\n"))


if __name__ == "__main__":
    unittest.main()
