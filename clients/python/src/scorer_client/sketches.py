"""Finds candidates that change the same weights as others, by comparing the sketches in their results.

A sketch is a list of 64 numbers or None: the field `candidate.sketch` of a scored result, defined in docs/candidates.md.
Sketches can only be compared if their results have the same `plan`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

Sketch = Sequence[int | None]

PLACES = 64
HASH_MASK = (1 << 53) - 1
WORD_MASK = (1 << 64) - 1


def similarity(one: Sketch, other: Sketch) -> float:
    """The estimated share, 0 to 1, of the weights changed by either that both change. Standard error: at most 1/16."""
    pairs = [pair for pair in zip(one, other, strict=True) if pair != (None, None)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def similar_pairs(sketches: Mapping[str, Sketch], threshold: float = 0.25) -> Iterable[tuple[str, str, float]]:
    """Pairs of candidates whose similarity reaches the threshold, the earlier of the two first.

    Only candidates that share two neighbouring numbers are compared. That finds nearly all pairs of similarity 0.25,
    and compares one in six hundred pairs of independent candidates that each change a hundredth of the weights.
    """
    table: dict[tuple[int, int | None, int | None], list[str]] = {}
    for name, sketch in sketches.items():
        pairs = zip(sketch, [*sketch[1:], sketch[0]], strict=True)
        places = [(place, *pair) for place, pair in enumerate(pairs) if pair != (None, None)]
        matches = dict.fromkeys(earlier for place in places for earlier in table.get(place, ()))
        for earlier in matches:
            if (found := similarity(sketches[earlier], sketch)) >= threshold:
                yield earlier, name, found
        for place in places:
            table.setdefault(place, []).append(name)


def sketch(changed: Mapping[str, Iterable[int]], plan: str) -> list[int | None]:
    """The sketch of a candidate, in a result with this `plan`. `changed` maps tensor names to indices of changed weights."""
    salt = bytes.fromhex(plan)
    smallest: list[int | None] = [None] * PLACES
    for name, indices in changed.items():
        seed = int.from_bytes(hashlib.sha256(salt + name.encode()).digest()[:8], "big")
        for index in indices:
            number = _split_mix(seed, index)
            place, hashed = number >> 58, number & HASH_MASK
            known = smallest[place]
            smallest[place] = hashed if known is None else min(known, hashed)
    return smallest


def _split_mix(seed: int, index: int) -> int:
    z = (seed + 0x9E3779B97F4A7C15 * (index + 1)) & WORD_MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD_MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD_MASK
    return z ^ (z >> 31)
