"""Where the model comes from: a Hugging Face directory, an adapter over one, or a function."""

import importlib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from scorer_client.export import checkpoint, names, wrapper
from scorer_client.export.checkpoint import TORCH, Checkpoint, Update
from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem, described, tell
from scorer_client.export.tasks import Task, task_of, window_limit

CONFIG, ADAPTER_CONFIG, ADAPTER = "config.json", "adapter_config.json", "adapter_model.safetensors"
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
AUTO = {
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Task.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
}


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


@dataclass
class HuggingFace:
    folder: Path
    precision: Precision
    config: Mapping[str, Any]
    task: Task
    widened: bool

    @classmethod
    def open(cls, folder: Path, precision: Precision, task: Task | None, widened: bool) -> "HuggingFace":
        config = _json(folder / CONFIG)
        return cls(folder, precision, config, task or task_of(config), widened)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def limit(self) -> int | None:
        return window_limit(self._text_config())

    @property
    def vocabulary(self) -> int | None:
        size = self._text_config().get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def tokenizer(self) -> Path | None:
        return self.folder

    def _text_config(self) -> Mapping[str, Any]:
        """What config.json leaves out is the default of the model's kind."""
        return transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True).get_text_config().to_dict()  # type: ignore[no-any-return]

    def load(self, changed: Path | None = None) -> Any:
        return wrapper.wrap(self.model(changed or self.folder), self.task, self.widened).eval()

    def model(self, folder: Path) -> Any:
        """Refuses a checkpoint that leaves parameters out: they would be random."""
        transformers.utils.logging.disable_progress_bar()
        auto = getattr(transformers, AUTO[self.task])
        model, told = auto.from_pretrained(
            folder, dtype=TORCH[self.precision], local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(told["missing_keys"])
        if missing:
            shown = ", ".join(missing[:5]) + (" and more" if len(missing) > 5 else "")
            raise Problem(
                f"the checkpoint lacks {len(missing)} parameters of {type(model).__name__}: {shown}",
                "check that --task and `architectures` in config.json name the class that was saved",
            )
        return of_type(model, self.precision)

    def weights(self, model: Any, folder: Path) -> Path:
        found, path = Checkpoint.of_folder(self.folder), folder / checkpoint.WHOLE
        merged = names.merged(model.m, set(found))
        if merged:
            shown = ", ".join(merged[:3]) + (" and more" if len(merged) > 3 else "")
            tell(f"    transformers keeps {len(merged)} tensors in another form than the checkpoint; candidates name these: {shown}")
            checkpoint.write(path, names.by_saved_name(model.m, set(found)))
        elif found.fits(self.precision):
            return found.path
        else:
            checkpoint.rewrite({name: (found, name) for name in found}, path, self.precision, {})
        return path

    def change(self, update: Update, weights: Path, folder: Path) -> None:
        found = Checkpoint.of_folder(weights.parent)
        checkpoint.rewrite({name: (found, name) for name in found}, folder / checkpoint.WHOLE, self.precision, update)
        shutil.copyfile(self.folder / CONFIG, folder / CONFIG)

    def names(self, model: Any) -> Mapping[str, str]:
        return names.of_transformers(model.m, set(Checkpoint.of_folder(self.folder)))

    def trainable(self) -> list[str] | None:
        return None


@dataclass
class Adapter:
    """A PEFT checkpoint over a frozen base. Its tensors have the names of its own file, and the base's have PEFT's prefix."""

    folder: Path
    base: HuggingFace

    @classmethod
    def open(cls, folder: Path, base: Path | None, precision: Precision, task: Task | None, widened: bool) -> "Adapter":
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise Problem("peft is not installed", "pip install 'scorer-client[export,peft]'", USAGE) from error
        named = _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        where = base or (Path(named) if named else None)
        if where is None or not (where / CONFIG).is_file():
            raise Problem(f"the base model of {folder} is not at {where}", "set --base to the directory of the base model", USAGE)
        if not (folder / ADAPTER).is_file():
            raise Problem(f"{folder} has no {ADAPTER}", "save the adapter with model.save_pretrained(DIR)", USAGE)
        return cls(folder, HuggingFace.open(where, precision, task, widened))

    @property
    def task(self) -> Task:
        return self.base.task

    @property
    def precision(self) -> Precision:
        return self.base.precision

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def limit(self) -> int | None:
        return self.base.limit

    @property
    def vocabulary(self) -> int | None:
        return self.base.vocabulary

    @property
    def tokenizer(self) -> Path | None:
        has_own = any(self.folder.glob("tokenizer*"))
        return self.folder if has_own else self.base.tokenizer

    def load(self, changed: Path | None = None) -> Any:
        import peft

        base = self.base.model(self.base.folder)
        model = peft.PeftModel.from_pretrained(base, changed or self.folder, autocast_adapter_dtype=False)
        return wrapper.wrap(of_type(model, self.precision), self.task, self.base.widened).eval()

    def weights(self, model: Any, folder: Path) -> Path:
        path = folder / checkpoint.WHOLE
        base, adapter = Checkpoint.of_folder(self.base.folder), Checkpoint.of_file(self.folder / ADAPTER)
        # A module that the adapter saves whole replaces the base's.
        parts = {f"{names.PEFT_PREFIX}{name}": (base, name) for name in base} | {name: (adapter, name) for name in adapter}
        checkpoint.rewrite(parts, path, self.precision, {})
        return path

    def change(self, update: Update, weights: Path, folder: Path) -> None:
        adapter = Checkpoint.of_file(self.folder / ADAPTER)
        checkpoint.rewrite({name: (adapter, name) for name in adapter}, folder / ADAPTER, self.precision, update)
        shutil.copyfile(self.folder / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)

    def names(self, model: Any) -> Mapping[str, str]:
        return names.of_peft(model.m, set(Checkpoint.of_folder(self.base.folder)))

    def trainable(self) -> list[str] | None:
        return sorted(Checkpoint.of_file(self.folder / ADAPTER))


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
        found = cls(matched[2], build, precision, Task.OWN, tokenizer)
        inputs = list(inspect.signature(found.load().forward).parameters)
        if inputs in (["tokens"], ["input_ids"]):
            found.task = Task.CAUSAL_LM
        return found

    def load(self, changed: Path | None = None) -> Any:
        model, self._built = self._built, None
        if model is None:
            model = self.build()
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
    return Function.open(words, precision, tokenizer)


def of_type(model: Any, precision: Precision) -> Any:
    """Every weight in one type, as the package has them; transformers keeps some in float32. Buffers stay what they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(TORCH[precision])
    return model


def once_each(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tied tensors under their first name only."""
    first: dict[object, str] = {}
    for name, tensor in state.items():
        first.setdefault(names.id_of(tensor) if tensor.numel() else name, name)
    kept = set(first.values())
    return {name: tensor for name, tensor in state.items() if name in kept}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"{path}: {described(error)}", "save the model again with model.save_pretrained(DIR)", USAGE) from error
    if not isinstance(found, dict):
        raise Problem(f"{path} is no JSON object", "save the model again with model.save_pretrained(DIR)", USAGE)
    return found
