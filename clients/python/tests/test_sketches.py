"""Copies, half-copies and strangers, told apart by their sketches."""

import pathlib
import random
import unittest
from unittest import mock

from scorer_client import sketches

PLAN = "00" * 32
PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs/candidates.md"


def chosen(seed, count=5000):
    """So many weights of a layer of a million."""
    return random.Random(seed).sample(range(1_000_000), count)


def sketch(indices, plan=PLAN):
    return sketches.sketch({"layer.weight": indices}, plan)


class Sketches(unittest.TestCase):
    def test_the_example_of_the_documentation(self):
        found = sketches.sketch({"w": [0, 3]}, PLAN)
        filled = [(place, number) for place, number in enumerate(found) if number is not None]
        said = " and ".join(f"{number} at place {place}" for place, number in filled)
        self.assertIn(said, PAGE.read_text(encoding="utf-8"))

    def test_copies_half_copies_and_strangers(self):
        mine, yours = chosen(1), chosen(2)
        original = sketch(mine)
        self.assertEqual(sketches.similarity(original, sketch(reversed(mine))), 1.0)
        self.assertAlmostEqual(sketches.similarity(original, sketch(mine + yours[:1000])), 0.83, delta=0.2)
        self.assertAlmostEqual(sketches.similarity(original, sketch(mine[:2500] + yours[:2500])), 0.33, delta=0.2)
        self.assertLess(sketches.similarity(original, sketch(yours)), 0.1)
        self.assertEqual(sketches.similarity(sketch([]), sketch([])), 0.0)

    def test_sketches_of_different_plans_say_nothing_of_each_other(self):
        self.assertLess(sketches.similarity(sketch(chosen(1)), sketch(chosen(1), "01" * 32)), 0.1)

    def test_of_many_candidates_only_the_copies_are_found(self):
        results = {f"miner-{seed}": sketch(chosen(seed, 500)) for seed in range(200)}
        copied = chosen(7, 500)
        results["copy"] = sketch(copied)
        results["half-copy"] = sketch(copied[:250] + chosen(1000, 250))
        found = {(one, other) for one, other, _ in sketches.similar_pairs(results, threshold=0.25)}
        self.assertEqual(found, {("miner-7", "copy"), ("miner-7", "half-copy"), ("copy", "half-copy")})

    def test_of_independent_candidates_few_are_compared(self):
        results = {f"miner-{seed}": sketch(chosen(seed, 500)) for seed in range(400)}
        with mock.patch.object(sketches, "similarity", wraps=sketches.similarity) as compared:
            self.assertEqual(list(sketches.similar_pairs(results)), [])
        self.assertLess(compared.call_count, 400)


if __name__ == "__main__":
    unittest.main()
