"""Rows of tokens: cut from texts and token documents, at most so many, the same ones every time."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scorer_client.export.held_out import digest
from scorer_client.export.steps import Problem
from scorer_client.export.tokenizer import Tokenizer

Row = Sequence[int]


@dataclass(frozen=True)
class Cut:
    """Rows of `length` tokens that begin `stride` apart; at most `most` of them."""

    length: int
    stride: int
    most: int


@dataclass(frozen=True)
class Rows:
    rows: list["array[int]"]
    available: int


def packed(texts: Iterable[str], tokenizer: Tokenizer) -> "array[int]":
    """The tokens of all texts, one after another, with the end-of-sequence token between them if there is one."""
    end = tokenizer.special.get("eos")
    stream = array("i")
    for number, text in enumerate(texts):
        if number and end is not None:
            stream.append(end)
        stream.extend(tokenizer.encode(text))
    return stream


def cut(documents: Sequence["array[int]"], how: Cut) -> Rows:
    """Rows never run over the end of a document. Of too many, those with the smallest SHA-256 stay, in their order."""
    rows = [
        document[start : start + how.length]
        for document in documents
        for start in range(0, len(document) - how.length + 1, how.stride)
    ]
    if not rows:
        longest = max(map(len, documents), default=0)
        raise Problem(
            f"no document has the {how.length} tokens of a row; the longest has {longest}",
            "give more text, raise --held-out, or set a smaller --window",
        )
    by_digest = sorted(range(len(rows)), key=lambda number: digest(rows[number].tobytes()))
    return Rows([rows[number] for number in sorted(by_digest[: how.most])], len(rows))


def check_vocabulary(rows: Iterable[Row], size: int | None) -> None:
    """A token that the embedding lacks would read beyond it."""
    if size is None:
        return
    for row in rows:
        wrong = next((token for token in row if not 0 <= token < size), None)
        if wrong is not None:
            raise Problem(
                f"the shards would hold the token {wrong}, and the model's vocabulary has {size} tokens",
                "check that the tokenizer or the token files belong to this model; --bin-type tells the type of .bin files",
            )
