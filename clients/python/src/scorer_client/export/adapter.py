"""A PEFT adapter over a frozen base."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer_client.export import checkpoint, names, wrapper
from scorer_client.export.checkpoint import Checkpoint, Update
from scorer_client.export.huggingface import CONFIG, HuggingFace, of_type, read_config
from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem
from scorer_client.export.tasks import Task

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


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
        named = read_config(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
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
