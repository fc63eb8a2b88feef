"""The documents that --shards names: text, pairs of texts, or tokens."""

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scorer_client.export import token_file
from scorer_client.export.held_out import is_held_out
from scorer_client.export.steps import Problem

# A blank line ends a document. The line itself stays with the document, so that text that is kept whole stays as it is.
BLANK_LINES = re.compile(r"(?<=\n)(?:[ \t]*\n)+")
MIN_BLOCK = 4096  # Tokens that are held out together, where nothing says where a document ends.


@dataclass
class Corpus:
    """What is held out, and how much there was. Exactly one of `texts`, `pairs` and `tokens` is filled.

    `texts` has a text for each file or line, of the documents that are held out in it. `pairs` are sources and targets.
    """

    texts: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    tokens: list["array[int]"] = field(default_factory=list)
    documents: int = 0
    held_out: int = 0
    rest: list[dict[str, str]] = field(default_factory=list)  # The lines of what is not held out.


@dataclass(frozen=True)
class Split:
    """How a corpus is read: the share that is held out, how long a block of tokens is, and the type of .bin files."""

    fraction: float = 1.0
    block: int = MIN_BLOCK
    bin_type: str = "uint16"
    keep_rest: bool = False


def read(path: Path, split: Split) -> Corpus:
    corpus = Corpus()
    for file in files(path):
        if file.suffix in token_file.SUFFIXES:
            _add_tokens(corpus, file, split)
        elif file.suffix == ".jsonl":
            _add_lines(corpus, file, split)
        else:
            _add_text(corpus, file, split)
    kinds = [name for name, found in (("text", corpus.texts), ("pairs", corpus.pairs), ("tokens", corpus.tokens)) if found]
    if len(kinds) > 1:
        raise Problem(f"{path} holds {' and '.join(kinds)}", "give a directory with files of one kind")
    if not kinds:
        raise Problem(
            f"none of the {corpus.documents} documents of {path} is held out",
            "raise --held-out, or give more text; documents end at blank lines, or at the end of a line of .jsonl",
        )
    return corpus


def files(path: Path) -> list[Path]:
    """The file, or all files of the directory, in the order of their names; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    below = (file for file in sorted(path.rglob("*")) if file.is_file())
    found = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise Problem(f"{path} holds no files", "give a text, a token file, or a directory of such files or of shards")
    return found


def ready_shards(path: Path) -> list[Path]:
    """The shards of a directory that holds nothing else: they are used as they are."""
    if not path.is_dir():
        return []
    found = files(path)
    return found if all(file.suffix == ".safetensors" and file.parent == path for file in found) else []


def _add_text(corpus: Corpus, file: Path, split: Split) -> None:
    kept: list[str] = []
    for document in paragraphs(_text(file)):
        corpus.documents += 1
        if is_held_out(document.strip().encode(), split.fraction):
            kept.append(document)
        elif split.keep_rest:
            corpus.rest.append({"text": document})
    corpus.held_out += len(kept)
    if kept:
        corpus.texts.append("".join(kept))


def paragraphs(text: str) -> Iterator[str]:
    """The documents of a text, each with the blank lines that end it."""
    start = 0
    for blank in BLANK_LINES.finditer(text):
        if text[start : blank.start()].strip():
            yield text[start : blank.end()]
            start = blank.end()
    if text[start:].strip():
        yield text[start:]


def _add_lines(corpus: Corpus, file: Path, split: Split) -> None:
    advice = 'every line must be {"text": ...}, or {"source": ..., "target": ...} for a seq2seq model'
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise Problem(f"{file}, line {number}: {error}", advice) from error
        pair: tuple[str, str] | None
        match entry:
            case {"source": str() as source, "target": str() as target}:
                text, pair = f"{source}\n{target}", (source, target)
            case {"text": str() as text}:
                pair = None
            case _:
                raise Problem(f"{file}, line {number} has neither a text nor a source and a target", advice)
        corpus.documents += 1
        if not is_held_out(text.strip().encode(), split.fraction):
            if split.keep_rest:
                corpus.rest.append(entry)
        elif pair is None:
            corpus.held_out += 1
            corpus.texts.append(text)
        else:
            corpus.held_out += 1
            corpus.pairs.append(pair)


def _add_tokens(corpus: Corpus, file: Path, split: Split) -> None:
    for block in token_file.read(file, split.bin_type).documents(split.block):
        corpus.documents += 1
        try:
            tokens = array("i", block)
        except OverflowError as error:
            advice = "check the file; --bin-type tells the type of a .bin file"
            raise Problem(f"{file} holds a token that does not fit 32 bits", advice) from error
        if is_held_out(tokens.tobytes(), split.fraction):
            corpus.held_out += 1
            corpus.tokens.append(tokens)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        kinds = ", ".join(token_file.SUFFIXES)
        raise Problem(f"{file} is not UTF-8 text", f"give text, or tokens in a file that ends in {kinds}") from error
    except OSError as error:
        raise Problem(f"{file} cannot be read: {error.strerror}", "check the path and its permissions") from error
