"""The shards of a package: made of what --shards names, or taken as they are."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scorer_client.console import counted
from scorer_client.export import documents, examples, rows, safetensors_file
from scorer_client.export.documents import Corpus, Split
from scorer_client.export.rows import Cut
from scorer_client.export.safetensors_file import Tensor
from scorer_client.export.steps import USAGE, Problem
from scorer_client.export.tasks import Task
from scorer_client.export.tokenizer import Tokenizer

ROWS_PER_SHARD = 64  # A job may name some of the shards; with the default of 256 windows there are four.
FEW_WINDOWS = 32
DTYPES = {"i": "I32", "q": "I64"}


@dataclass(frozen=True)
class Plan:
    """How shards are made: see the options of the same names."""

    task: Task
    window: int
    row_tokens: int | None
    stride: int | None
    max_windows: int
    split: Split
    vocabulary: int | None
    windows_per_row: int = 1

    def cut(self) -> Cut:
        """A row has one token more than its window, whose target it is; a masked one has cls and sep around it."""
        match self.task:
            case Task.MASKED_LM:
                length = self.window - 2
            case Task.SEQ2SEQ:
                length = 2 * self.window
            case Task.CAUSAL_LM | Task.IMAGE_CLASSIFICATION | Task.OWN:
                length = self.row_tokens or self.window + 1
        if length < 1:
            raise Problem(f"--window {self.window} leaves no tokens between cls and sep", "set a larger --window", USAGE)
        return Cut(length, self.stride or length, self.max_windows)


@dataclass(frozen=True)
class Shards:
    """Written shards. `told` says where they come from."""

    folder: Path
    told: list[str]
    windows: int
    rest: list[dict[str, str]]


def make(source: Path, plan: Plan, tokenizer: Tokenizer | None, folder: Path) -> Shards:
    """Cuts text or tokens into shards in `folder`."""
    if not plan.task.reads_text:
        raise Problem(
            f"{source} is no directory of shards, and shards cannot be made from text for this model",
            "give a directory of shard_N.safetensors files, each with a tensor [rows, ...] for each input of the graph",
            USAGE,
        )
    corpus = documents.read(source, plan.split)
    table, available = _table(corpus, plan, tokenizer)
    for number, start in enumerate(range(0, len(table), ROWS_PER_SHARD), 1):
        write(folder / f"shard_{number}.safetensors", table[start : start + ROWS_PER_SHARD])
    told = [f"held out: {corpus.held_out:,} of {counted(corpus.documents, 'document')} of {source}"]
    told.append(f"{len(table):,} of {counted(available, 'possible window')} of {counted(plan.window, 'token')}, as --max-windows allows")
    return Shards(folder, told + few(len(table), plan), len(table), corpus.rest)


def few(rows: int, plan: Plan) -> list[str]:
    """How many, why, and how to get more."""
    each = plan.windows_per_row if plan.task is Task.CAUSAL_LM else 1
    if rows * each >= FEW_WINDOWS:
        return []
    kept = rows >= plan.max_windows
    why = f"as many as --max-windows {plan.max_windows} keeps" if kept else "all that the text has"
    more = ["raise --max-windows" if kept else "give more text, or set a smaller --stride"]
    if plan.task is Task.CAUSAL_LM and plan.cut().length > plan.window + 1:
        more.append(f"set --windows-per-row {-(-FEW_WINDOWS // rows)}")
    return [
        f"warning: few windows ({rows * each}): below {FEW_WINDOWS}, scores have wide confidence intervals, and no evaluation "
        f"ends early. Why: windows from each row: {each}, rows: {rows}, {why}. To get more: {'; or '.join(more)}."
    ]


def _table(corpus: Corpus, plan: Plan, tokenizer: Tokenizer | None) -> tuple[Sequence[Mapping[str, "array[int]"]], int]:
    """The rows as columns by name, and how many there could have been."""
    if corpus.pairs:
        return _pairs(corpus, plan, tokenizer)
    found = rows.cut(corpus.tokens or [rows.packed(corpus.texts, _required(tokenizer))], plan.cut())
    rows.check_vocabulary(found.rows, plan.vocabulary)
    match plan.task:
        case Task.MASKED_LM:
            return [examples.masked(row, _required(tokenizer)) for row in found.rows], found.available
        case Task.SEQ2SEQ:
            return [examples.continued(row) for row in found.rows], found.available
        case Task.CAUSAL_LM | Task.IMAGE_CLASSIFICATION | Task.OWN:
            return [{"tokens": row} for row in found.rows], found.available


def _pairs(corpus: Corpus, plan: Plan, tokenizer: Tokenizer | None) -> tuple[Sequence[Mapping[str, "array[int]"]], int]:
    if plan.task is not Task.SEQ2SEQ:
        raise Problem("pairs of source and target are for seq2seq models", 'give lines with {"text": ...}', USAGE)
    chosen = corpus.pairs[: plan.max_windows]
    table = [examples.paired(source, target, _required(tokenizer), plan.window) for source, target in chosen]
    rows.check_vocabulary((row["input_ids"] for row in table), plan.vocabulary)
    return table, len(corpus.pairs)


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise Problem("there is no tokenizer", "set --tokenizer to a directory that has one, or give token files as --shards", USAGE)
    return tokenizer


def write(path: Path, table: Sequence[Mapping[str, "array[int]"]]) -> None:
    """One tensor [rows, n] for each column."""
    tensors = {
        name: Tensor(DTYPES[first.typecode], (len(table), len(first)), b"".join(row[name].tobytes() for row in table))
        for name, first in table[0].items()
    }
    safetensors_file.write(path, tensors)


def read(folder: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """Every shard with its id, the first number in its name, ascending."""
    found = [(shard_id(path), safetensors_file.read(path)) for path in sorted(folder.glob("*.safetensors"))]
    return sorted(found, key=lambda shard: shard[0])


def check(paths: Sequence[Path]) -> None:
    """Refuses files that no worker would take for shards."""
    for path in paths:
        shard_id(path)
        tensors = safetensors_file.read(path)
        if not tensors or any(not tensor.shape or 0 in tensor.shape for tensor in tensors.values()):
            raise Problem(f"{path} has no tensors, or one without rows", "give each shard a tensor [rows, ...] for each input")


def shard_id(path: Path) -> int:
    digits = "".join(character if character.isascii() and character.isdigit() else " " for character in path.name).split()
    if not digits:
        raise Problem(f"{path} has no number in its name, which is the shard's id", "name the files shard_1.safetensors and so on")
    return int(digits[0])
