"""The steps of an export: which one is running, how long each took, and which one failed."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scorer_client.console import printable

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
FAILED, USAGE, UNAVAILABLE, INTERRUPTED = 1, 64, 69, 130


class Problem(Exception):
    """What went wrong and what to do about it; `code` is the exit code."""

    def __init__(self, problem: str, advice: str, code: int = FAILED) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        self.code = code
        self.step: str | None = None

    def __str__(self) -> str:
        where = "" if self.step is None else f'the step "{self.step}" failed: '
        return f"{where}{self.problem}\n  What to do: {self.advice}"


@dataclass
class Steps:
    """Prints each step and its time to standard error. `seconds` has the times by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, advice: str) -> Iterator[None]:
        """Names the step in every failure inside; `advice` is for failures that bring none of their own."""
        tell(f"{name} ...")
        began = time.monotonic()
        try:
            yield
        except Problem as problem:
            problem.step = problem.step or name
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            unexpected = Problem(described(error), advice)
            unexpected.step = name
            raise unexpected from error
        self.seconds[name] = round(time.monotonic() - began, 3)
        tell(f"    {self.seconds[name]:.1f} s")


def tell(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def described(error: BaseException) -> str:
    """A foreign error, whose text may run over pages: its type and first line, and the same of what first caused it."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    return _line(error) if first is error else f"{_line(error)} (caused by {_line(first)})"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in COLOURS.sub("", str(error)).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
