"""Where an export works: a hidden folder beside the destination, which disappears if the export fails."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from scorer_client.export.steps import USAGE, Problem


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """SIGTERM and SIGHUP end the export as Ctrl-C does: what is unfinished is removed."""
    check(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.export-", dir=out.parent))
    except OSError as error:
        raise Problem(f"--out {out}: {out.parent} cannot be written: {error.strerror}", "give another directory", USAGE) from error
    previous = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in previous.items():
            signal.signal(number, handler)


def check(out: Path) -> None:
    if os.path.lexists(out):
        raise Problem(f"--out {out} exists already", "give another directory, or remove that one: a package never changes", USAGE)
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise Problem(f"--out {out}: {out.parent} is no directory that can be written", "make it first", USAGE)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
