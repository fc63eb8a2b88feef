"""A module that a function of the user's returns."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scorer_client.export import checkpoint, names
from scorer_client.export.checkpoint import TORCH, Checkpoint, Update
from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem, described
from scorer_client.export.tasks import Task

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


@dataclass
class Function:
    """`package.module:function`, which returns a torch module. Its `forward` has an argument for each input of the graph."""

    name: str
    build: Callable[[], Any]
    precision: Precision
    task: Task
    tokenizer: Path | None
    limit: int | None = None
    vocabulary: int | None = None
    _built: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, words: str, precision: Precision, tokenizer: Path | None) -> "Function":
        matched = FUNCTION.fullmatch(words)
        if matched is None:
            raise Problem(f"{words} is neither a directory nor package.module:function", "check the path", USAGE)
        sys.path.insert(0, os.getcwd())  # As `python3 -m` has it, and an installed command does not.
        try:
            build = getattr(importlib.import_module(matched[1]), matched[2])
        except (ImportError, AttributeError) as error:
            raise Problem(f"{words}: {described(error)}", "run the command where `import` finds the module", USAGE) from error
        found = cls(f"{matched[1].rpartition('.')[2]}-{matched[2]}", build, precision, Task.OWN, tokenizer)
        inputs = list(inspect.signature(found.load().forward).parameters)
        if inputs in (["tokens"], ["input_ids"]):
            found.task = Task.CAUSAL_LM
        return found

    def load(self, changed: Path | None = None) -> Any:
        model, self._built = self._built, None
        if model is None:
            try:
                model = self.build()
            except SystemExit as error:
                advice = "return a torch.nn.Module, and raise an exception for what is wrong"
                raise Problem(f"{self.name}() ended the program: exit {error.code}", advice, USAGE) from error
            if not isinstance(model, torch.nn.Module):
                raise Problem(f"{self.name}() returns {type(model).__name__}", "return a torch.nn.Module", USAGE)
            model = model.to(TORCH[self.precision]).eval()
        if changed is None:
            return model
        saved = Checkpoint.of_folder(changed)
        model.load_state_dict({name: saved.tensor(name) for name in saved}, strict=False)
        return model

    def weights(self, model: Any, folder: Path) -> Path:
        path = folder / checkpoint.WHOLE
        checkpoint.write(path, once_each(model.state_dict()))
        return path

    def change(self, update: Update, weights: Path, folder: Path) -> None:
        found = Checkpoint.of_file(weights)
        checkpoint.rewrite({name: (found, name) for name in found}, folder / checkpoint.WHOLE, self.precision, update)

    def names(self, model: Any) -> Mapping[str, str]:
        """Tied parameters have several names; the checkpoint has the first."""
        saved = set(once_each(model.state_dict()))
        return {
            name: next(first for first in same if first in saved)
            for same in names.tied(model)
            for name in same
            if name not in saved and not saved.isdisjoint(same)
        }

    def trainable(self) -> list[str] | None:
        return None


def once_each(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tied tensors under their first name only."""
    first: dict[object, str] = {}
    for name, tensor in state.items():
        first.setdefault(names.id_of(tensor) if tensor.numel() else name, name)
    kept = set(first.values())
    return {name: tensor for name, tensor in state.items() if name in kept}
