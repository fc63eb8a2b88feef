"""Typed access to the fields of an untrusted map: a missing field or a wrong type raises an error that names the field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

T = TypeVar("T")


class Malformed(ValueError):
    """Says which field of which message is wrong."""


@dataclass(frozen=True)
class Fields:
    """A map, and the name that error messages give it."""

    name: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, value: Any) -> "Fields":
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return cls(name, value)
        raise Malformed(f"{name} is not a map with text keys.")

    def part(self, key: str) -> "Fields":
        return Fields.read(f"{key} of {self.name}", self.values.get(key))

    def text(self, key: str) -> str:
        return self._of_type(key, str, "text")

    def texts(self, key: str) -> frozenset[str]:
        values = self._of_type(key, list, "a list of texts")
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of texts")
        return frozenset(values)

    def flag(self, key: str) -> bool:
        return self._of_type(key, bool, "true or false")

    def whole(self, key: str) -> int:
        """An integer of 0 or more; a float without a fraction counts as one."""
        value = self.values.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(key, "an integer of 0 or more")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not _finite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def digest(self, key: str) -> str:
        digest = self.text(key)
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise self.wrong(key, "a SHA-256 of 64 lower-case hexadecimal digits")
        return digest

    def interval_or_none(self, key: str) -> tuple[float, float] | None:
        if not self.has(key):
            return None
        bounds = self.values[key]
        if not isinstance(bounds, list) or len(bounds) != 2:
            raise self.wrong(key, "a list of two numbers")
        ends = Fields(f"{key} of {self.name}", dict(zip(("the start", "the end"), bounds, strict=True)))
        start, end = ends.number("the start"), ends.number("the end")
        if start > end:
            raise self.wrong(key, "a list of two numbers in ascending order")
        return start, end

    def has(self, key: str) -> bool:
        """False for null too."""
        return self.values.get(key) is not None

    def wrong(self, key: str, wanted: str) -> Malformed:
        if key not in self.values:
            return Malformed(f"{key} of {self.name} is missing; it must be {wanted}.")
        return Malformed(f"{key} of {self.name} is {self.values[key]!r:.60}; it must be {wanted}.")

    def _of_type(self, key: str, kind: type[T], wanted: str) -> T:
        value = self.values.get(key)
        if not isinstance(value, kind):
            raise self.wrong(key, wanted)
        return value


def _finite(value: float | Decimal) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # An integer beyond the range of a float.
        return False
