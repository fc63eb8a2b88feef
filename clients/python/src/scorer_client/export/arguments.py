"""The options of `export`."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem
from scorer_client.export.tasks import Task
from scorer_client.export.token_file import BIN_CODES

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_WINDOWS = 256


@dataclass(frozen=True)
class Request:
    model: str
    out: Path
    shards: Path
    name: str | None
    version: int
    task: Task | None
    precision: Precision
    widened: bool
    tokenizer: Path | None
    base: Path | None
    window: int | None
    row_tokens: int | None
    windows_per_row: int
    stride: int | None
    max_windows: int
    held_out: float
    rest: Path | None
    bin_type: str
    exclude: tuple[str, ...]
    scorer: Path | None
    provider: str
    candidate: Path | None
    json: bool

    @property
    def computed(self) -> Precision:
        """What the graph computes in."""
        return Precision.FLOAT32 if self.widened else self.precision


def add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("source", metavar="MODEL", help="a Hugging Face directory, a PEFT adapter's, or package.module:function")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="the package; must not exist")
    export.add_argument("--shards", required=True, type=Path, metavar="TEXT|DIR", help="text, token files, or ready shards")
    export.add_argument("--name", help="the model's name; default: that of the directory or function")
    export.add_argument("--version", type=whole(0), default=1, help="version of the weights (%(default)s)")
    tasks = [task.value for task in Task if task is not Task.OWN]
    export.add_argument("--task", choices=tasks, help="default: what `architectures` in config.json says")
    export.add_argument("--dtype", choices=[precision.value for precision in Precision], default="float32")
    export.add_argument(
        "--compute-float32", action="store_true", help="weights of 16 bits, arithmetic in float32: for every provider"
    )
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the model's")
    export.add_argument("--base", type=Path, metavar="DIR", help="the base of an adapter; default: what the adapter names")
    export.add_argument(
        "--window", type=whole(1), metavar="N", help="tokens that the model reads at once; default 128, or its limit"
    )
    export.add_argument(
        "--row-tokens", type=whole(2), metavar="N", help="longer rows than window + 1 let the nonce choose the window"
    )
    export.add_argument(
        "--windows-per-row", type=whole(1), metavar="N", default=1, help="windows taken from each such row (%(default)s)"
    )
    export.add_argument(
        "--stride", type=whole(1), metavar="N", help="tokens between the starts of two rows; default: the row's length"
    )
    export.add_argument("--max-windows", type=whole(1), metavar="N", default=MAX_WINDOWS, help="at most so many (%(default)s)")
    export.add_argument(
        "--held-out", type=share, metavar="SHARE", default=1.0, help="share of the documents that is held out, by hash (1)"
    )
    export.add_argument("--rest", type=Path, metavar="FILE", help="write the texts that are not held out, one JSON line each")
    export.add_argument("--bin-type", choices=tuple(BIN_CODES), default="uint16", help="type of .bin token files (%(default)s)")
    export.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="checkpoint tensors to leave out; repeatable"
    )
    export.add_argument("--scorer", type=Path, metavar="FILE", help="the program; default: $SCORER, PATH, target/*/scorer")
    export.add_argument("--provider", default="cpu", choices=("cpu", "cuda"), help="what proves the package (%(default)s)")
    export.add_argument("--candidate", type=Path, metavar="FILE", help="keep the random update of the proof, to submit it")
    export.add_argument("--json", action="store_true", help="print the result as JSON")


def request(arguments: argparse.Namespace) -> Request:
    """Checks what needs no model."""
    found = Request(
        model=arguments.source,
        out=arguments.out,
        shards=arguments.shards,
        name=arguments.name,
        version=arguments.version,
        task=Task(arguments.task) if arguments.task else None,
        precision=Precision(arguments.dtype),
        widened=arguments.compute_float32,
        tokenizer=arguments.tokenizer,
        base=arguments.base,
        window=arguments.window,
        row_tokens=arguments.row_tokens,
        windows_per_row=arguments.windows_per_row,
        stride=arguments.stride,
        max_windows=arguments.max_windows,
        held_out=arguments.held_out,
        rest=arguments.rest,
        bin_type=arguments.bin_type,
        exclude=tuple(arguments.exclude),
        scorer=arguments.scorer,
        provider=arguments.provider,
        candidate=arguments.candidate,
        json=arguments.json,
    )
    if found.name is not None and not NAME.fullmatch(found.name):
        raise Problem(f"--name {found.name} does not match {NAME.pattern}", "use small letters, digits, - and _", USAGE)
    if found.precision is Precision.BFLOAT16 and found.provider == "cpu" and not found.widened:
        raise Problem(
            "the CPU cannot compute bfloat16, so the package could not be proven",
            "add --compute-float32, or --provider cuda on a machine with a GPU; "
            "a bfloat16 checkpoint is exact in --dtype float32, too",
            USAGE,
        )
    if not found.shards.exists():
        raise Problem(f"--shards {found.shards} does not exist", "give a text, a token file, or a directory of them", USAGE)
    for option, file in (("--rest", found.rest), ("--candidate", found.candidate)):
        if file is not None and (file.exists() or not file.parent.is_dir()):
            raise Problem(f"{option} {file} exists already, or its directory does not", "give another file", USAGE)
    return found


def model_name(text: str) -> str:
    """A name that queues and keys can carry, made of any other."""
    plain = re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:64]
    return plain or "model"


class whole:
    """An integer of at least `least`. A class, so that argparse has a name for it."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.__name__ = f"integer of {least} or more"

    def __call__(self, text: str) -> int:
        number = int(text)
        if number < self.least:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of {self.least} or more")
        return number


def share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number
