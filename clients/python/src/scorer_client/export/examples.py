"""Examples of models whose graph computes the loss: masked tokens, and targets after a source."""

import random
from array import array
from collections.abc import Sequence

from scorer_client.export.held_out import digest
from scorer_client.export.tokenizer import Tokenizer, need

Example = dict[str, "array[int]"]

NOT_COUNTED = -100  # What PyTorch's cross entropy leaves out.
MASKED_SHARE = 0.15  # As BERT was trained.


def masked(tokens: "array[int]", tokenizer: Tokenizer) -> Example:
    """A row between cls and sep. The row's own digest chooses which tokens are masked: always the same, at least one."""
    first, last, mask = (need(tokenizer, name, "masked rows") for name in ("cls", "sep", "mask"))
    rng = random.Random(digest(tokens.tobytes()))
    chosen = {number for number in range(len(tokens)) if rng.random() < MASKED_SHARE} or {rng.randrange(len(tokens))}
    seen = [mask if number in chosen else token for number, token in enumerate(tokens)]
    labels = [token if number in chosen else NOT_COUNTED for number, token in enumerate(tokens)]
    return {"input_ids": _long([first, *seen, last]), "labels": _long([NOT_COUNTED, *labels, NOT_COUNTED])}


def continued(tokens: "array[int]") -> Example:
    """The first half of a row is the source, the second half the target."""
    half = len(tokens) // 2
    return {"input_ids": _long(tokens[:half]), "labels": _long(tokens[half:])}


def paired(source: str, target: str, tokenizer: Tokenizer, window: int) -> Example:
    """Both cut or padded to the window. The model does not see the padding of the source, nor count that of the target."""
    pad, end = need(tokenizer, "pad", "pairs of different lengths"), tokenizer.special.get("eos")
    read, wanted = (_ended(tokenizer.encode(text), end, window) for text in (source, target))
    return {
        "attention_mask": _long(_filled([1] * len(read), 0, window)),
        "input_ids": _long(_filled(read, pad, window)),
        "labels": _long(_filled(wanted, NOT_COUNTED, window)),
    }


def _ended(tokens: Sequence[int], end: int | None, window: int) -> list[int]:
    return list(tokens)[:window] if end is None else [*list(tokens)[: window - 1], end]


def _filled(tokens: list[int], padding: int, window: int) -> list[int]:
    return tokens + [padding] * (window - len(tokens))


def _long(tokens: Sequence[int]) -> "array[int]":
    return array("q", tokens)
