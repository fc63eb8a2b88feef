"""The steps of an export: which one is running, how long each took, and which one failed."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scorer_client.console import printable

FAILED, USAGE, UNAVAILABLE = 1, 64, 69


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
    """The type and the first lines of a foreign error, whose text may run over pages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    shown = " / ".join(line.strip() for line in lines[:3])
    more = " / ..." if len(lines) > 3 else ""
    return f"{type(error).__name__}: {shown}{more}" if shown else type(error).__name__
