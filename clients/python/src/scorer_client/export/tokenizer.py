"""The tokenizer of a model, reduced to what shards need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scorer_client.export.steps import USAGE, Problem, described


class Tokenizer(Protocol):
    """`special` has the ids of eos, cls, sep, mask and pad, as far as the tokenizer has them."""

    @property
    def special(self) -> dict[str, int]: ...

    def encode(self, text: str) -> Sequence[int]:
        """Without special tokens."""


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    wrapped: Any
    special: dict[str, int]

    def encode(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def open_tokenizer(folder: Path) -> Tokenizer:
    import transformers

    try:
        wrapped = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise Problem(
            f"{folder} has no tokenizer that transformers {transformers.__version__} can load: {described(error)}",
            "set --tokenizer to a directory that has one, or give token files (.npy, .bin, .safetensors) as --shards",
            USAGE,
        ) from error
    ids = {name: getattr(wrapped, f"{name}_token_id", None) for name in ("eos", "cls", "sep", "mask", "pad")}
    return HuggingFaceTokenizer(wrapped, {name: number for name, number in ids.items() if number is not None})


def need(tokenizer: Tokenizer, name: str, what_for: str) -> int:
    number = tokenizer.special.get(name)
    if number is None:
        raise Problem(f"the tokenizer has no {name} token, which {what_for} need", "set --tokenizer to the model's own tokenizer")
    return number
