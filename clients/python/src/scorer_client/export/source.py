"""Where the model comes from: a Hugging Face directory, an adapter over one, or a function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from scorer_client.export.adapter import ADAPTER_CONFIG, Adapter
from scorer_client.export.checkpoint import Update
from scorer_client.export.function import Function
from scorer_client.export.huggingface import CONFIG, HuggingFace
from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem
from scorer_client.export.tasks import Task


class Source(Protocol):
    """A model that can be loaded again with other weights."""

    @property
    def task(self) -> Task: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def name(self) -> str: ...

    @property
    def limit(self) -> int | None:
        """The longest window."""

    @property
    def vocabulary(self) -> int | None: ...

    @property
    def tokenizer(self) -> Path | None: ...

    def load(self, changed: Path | None = None) -> Any:
        """The wrapped model in evaluation mode; with the weights of a folder that `change` has filled, if one is given."""

    def weights(self, model: Any, folder: Path) -> Path:
        """The checkpoint that gives candidates their names. It is written to the folder if it is not there yet."""

    def change(self, update: Update, weights: Path, folder: Path) -> None:
        """Writes the checkpoint with an update to the folder."""

    def names(self, model: Any) -> Mapping[str, str]:
        """The names in the checkpoint of the live parameters that have another one there."""

    def trainable(self) -> list[str] | None:
        """Globs of the tensors that candidates may change; None for all."""


def open_source(
    words: str, base: Path | None, precision: Precision, task: Task | None, tokenizer: Path | None, widened: bool
) -> HuggingFace | Adapter | Function:
    folder = Path(words)
    if (folder / ADAPTER_CONFIG).is_file():
        return Adapter.open(folder, base, precision, task, widened)
    if (folder / CONFIG).is_file():
        return HuggingFace.open(folder, precision, task, widened)
    if folder.is_dir():
        raise Problem(f"{folder} has neither {CONFIG} nor {ADAPTER_CONFIG}", "save the model with model.save_pretrained(DIR)", USAGE)
    if widened:
        advice = "widen the weights in the module's forward"
        raise Problem("--compute-float32 is for Hugging Face directories and adapters", advice, USAGE)
    return Function.open(words, precision, tokenizer)
