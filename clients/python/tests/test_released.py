"""Messages of every released version, as its workers wrote them, are read; what is added to one is ignored."""

import json
import pathlib
import unittest

import msgpack
from scorer_client.results import Result
from scorer_client.workers import Heartbeats

RELEASED = pathlib.Path(__file__).parents[3] / "tests" / "released"
STATUSES = {"scored", "rejected", "failed"}


def messages(schema):
    found = sorted(RELEASED.glob(f"*/messages/{schema}-*"))
    assert found, f"{RELEASED} has no {schema}"
    return found


def content_type(path):
    return "application/json" if path.suffix == ".json" else "application/msgpack"


class Released(unittest.TestCase):
    def test_results_are_read_with_and_without_a_field_that_nobody_knows(self):
        seen = set()
        for path in messages("score_result.v1"):
            body = path.read_bytes()
            is_json = path.suffix == ".json"
            with self.subTest(path.name):
                result = Result.read(body, content_type(path))
                fields = json.loads(body) if is_json else msgpack.unpackb(body, strict_map_key=False)
                fields["added_later"] = {"of": ["any", "kind"]}
                later = json.dumps(fields).encode() if is_json else msgpack.packb(fields)
                again = Result.read(later, content_type(path))
                self.assertEqual((again.submission_id, again.verdict), (result.submission_id, result.verdict))
                seen.add(result.status)
        self.assertEqual(seen, STATUSES)

    def test_heartbeats_are_read(self):
        heartbeats = Heartbeats("redis://127.0.0.1/0", "model", "scorer", 2, 5000)
        for path in messages("heartbeat.v1"):
            with self.subTest(path.name):
                (worker,) = heartbeats.workers({"w1": 10}, [path.read_bytes()])
                self.assertNotEqual(worker.state, "unreadable", worker.detail)
                self.assertEqual(set(worker.accepts), {"score", "validate"})


if __name__ == "__main__":
    unittest.main()
