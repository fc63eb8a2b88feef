"""Finds candidates that change the same weights as others, by the sketches in their results.

A sketch is a list of 64 numbers or None, as `candidate.sketch` of a scored result has it; docs/candidates.md says what they are.
Only sketches from results with the same `plan` can be compared.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

Sketch = Sequence[int | None]

PLACES = 64
KEPT = (1 << 53) - 1
WORD = (1 << 64) - 1


def similarity(one: Sketch, other: Sketch) -> float:
    """Of the weights that either changes, the share that both change, 0 to 1; its standard error is at most 1/16."""
    pairs = [pair for pair in zip(one, other, strict=True) if pair != (None, None)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def alike(sketches: Mapping[str, Sketch], least: float = 0.25) -> Iterable[tuple[str, str, float]]:
    """Pairs of candidates at least so similar, each with the one that came first in front.

    Compared are only those that have two neighbouring numbers in common: nearly all of similarity 0.25, and of
    independent ones that change a hundredth of the weights, one pair in six hundred.
    """
    seen: dict[tuple[int, int | None, int | None], list[str]] = {}
    for name, sketch in sketches.items():
        pairs = zip(sketch, [*sketch[1:], sketch[0]], strict=True)
        places = [(place, *pair) for place, pair in enumerate(pairs) if pair != (None, None)]
        met = dict.fromkeys(earlier for place in places for earlier in seen.get(place, ()))
        for earlier in met:
            if (found := similarity(sketches[earlier], sketch)) >= least:
                yield earlier, name, found
        for place in places:
            seen.setdefault(place, []).append(name)


def sketch(changed: Mapping[str, Iterable[int]], plan: str) -> list[int | None]:
    """The sketch, in a result with this `plan`, of a candidate that changes these weights: by tensor, their indices."""
    salt = bytes.fromhex(plan)
    smallest: list[int | None] = [None] * PLACES
    for name, indices in changed.items():
        seed = int.from_bytes(hashlib.sha256(salt + name.encode()).digest()[:8], "big")
        for index in indices:
            number = _split_mix(seed, index)
            place, kept = number >> 58, number & KEPT
            known = smallest[place]
            smallest[place] = kept if known is None else min(known, kept)
    return smallest


def _split_mix(seed: int, index: int) -> int:
    z = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)
