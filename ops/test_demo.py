"""The Python beside the demonstration, without any service: which cases become jobs, and what the table makes of results."""

import base64
import json
import pathlib
import tempfile
import unittest

import demo_jobs
import demo_services
import demo_table


def case(name, **fields):
    return {
        "name": name,
        "kind": "honest",
        "file": f"{name}.bin",
        "format": "binary_v2",
        "semantics": "gradient",
        "learning_rate": 0.1,
        "model_version": 7,
        "nonce": "n",
        "shards": [2, 1],
        "label_shift": 1,
        "sha256": "0" * 64,
        "expect": {"status": "scored", "loss_before": 4.0, "loss_after": 3.5, "delta": 0.5},
    } | fields


def result(name, **fields):
    return {
        "submission_id": name,
        "worker_id": "demo-1",
        "status": "scored",
        "delta": 0.5,
        "stderr": 0.01,
        "ci95": [0.48, 0.52],
        "loss_before": 4.0,
        "loss_after": 3.5,
        "timings_ms": {"queued": 5.0, "fetch": 1.0, "forward": 9.0, "total": 15.0},
    } | fields


REFUSED = {"status": "rejected", "error": {"code": "candidate_malformed", "message": ""}}


class Jobs(unittest.TestCase):
    def job(self, data, **fields):
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "a.bin").write_bytes(data)
            return demo_jobs.job(case("a", **fields), pathlib.Path(folder))

    def test_a_small_candidate_travels_inside_the_job(self):
        job = self.job(b"body")
        self.assertEqual(base64.b64decode(job["candidate"]["data"]), b"body")
        self.assertEqual(job["candidate"]["size"], 4)
        self.assertNotIn("url", job["candidate"])
        self.assertEqual(job["validation"], {"nonce": "n", "shards": [2, 1]})

    def test_a_large_candidate_is_a_file_url(self):
        candidate = self.job(bytes(demo_jobs.MAX_INLINE_BYTES + 1))["candidate"]
        self.assertTrue(candidate["url"].startswith("file:///"))
        self.assertNotIn("data", candidate)

    def test_a_difference_has_no_learning_rate(self):
        self.assertNotIn("learning_rate", self.job(b"x", semantics="param_diff", learning_rate=None)["candidate"])

    def test_other_objectives_and_newer_versions_are_left_out(self):
        self.assertFalse(demo_jobs.usable(case("a", label_shift=2), 7))
        self.assertFalse(demo_jobs.usable(case("a", model_version=8), 7))
        self.assertFalse(demo_jobs.usable(case("a", file=None), 7))
        self.assertTrue(demo_jobs.usable(case("a", model_version=6), 7))

    def test_every_kind_is_shown_before_any_second_of_a_kind(self):
        cases = [case("a1"), case("a2"), case("a3"), case("b1", kind="noise")]
        self.assertEqual([c["name"] for c in demo_jobs.in_turn(cases, 3)], ["a1", "b1", "a2"])


class Table(unittest.TestCase):
    def test_results_are_read_as_lines_and_as_an_array(self):
        one, two = result("a"), result("b")
        lines = json.dumps(one) + "\n" + json.dumps(two, indent=2) + "\n"
        self.assertEqual(demo_table.read_results(lines), [one, two])
        self.assertEqual(demo_table.read_results(json.dumps([one, two])), [one, two])
        self.assertEqual(demo_table.read_results("\n"), [])

    def test_a_loss_that_is_off_is_no_agreement(self):
        self.assertEqual(demo_table.judge(result("a"), case("a")), (True, 0.0))
        agrees, gap = demo_table.judge(result("a", loss_after=3.50001), case("a"))
        self.assertFalse(agrees)
        self.assertAlmostEqual(gap, 1e-5)

    def test_a_refusal_must_carry_the_expected_code(self):
        for expect in ({"code": "candidate_malformed"}, {"error": {"code": "candidate_malformed"}}):
            self.assertEqual(demo_table.judge(result("a", **REFUSED), case("a", expect=expect)), (True, None))
        self.assertFalse(demo_table.judge(result("a", **REFUSED), case("a"))[0])
        self.assertFalse(demo_table.judge(result("a"), case("a", expect={"code": "candidate_empty"}))[0])

    def test_the_verdict_says_what_the_windows_can_tell(self):
        shown = [
            demo_table.shown_verdict(result("a", **fields))
            for fields in ({}, {"ci95": [-2, -1]}, {"ci95": [-1, 1]}, {"ci95": None}, {"delta": 0.0}, REFUSED)
        ]
        self.assertEqual(
            shown,
            ["scored: better", "scored: worse", "scored: unclear", "scored: unclear", "scored: no change", "rejected: candidate_malformed"],
        )

    def test_a_missing_result_is_a_failure(self):
        text, good = demo_table.summary([result("a")], {"a": case("a")}, 2, 0.5)
        self.assertFalse(good)
        self.assertIn("1 of 2 jobs answered in 0.5 s, 2.0 jobs/s: 1 scored; 1 demo-1.", text)

    def test_an_unexpected_verdict_is_marked_in_its_row(self):
        text = demo_table.table(demo_table.rows([result("a", **REFUSED)], {"a": case("a")}))
        self.assertIn("rejected: candidate_malformed  expected scored", text)


class Services(unittest.TestCase):
    def test_only_a_namespace_of_the_demonstration_is_deleted(self):
        with self.assertRaises(SystemExit):
            demo_services.delete("scorer", "tinylm")

    def test_an_address_is_shown_without_its_password(self):
        self.assertEqual(demo_services.place("amqp://me:secret@broker:5672/%2f"), "broker:5672")


if __name__ == "__main__":
    unittest.main()
