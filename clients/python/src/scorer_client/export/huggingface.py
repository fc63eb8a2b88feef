"""A model in a Hugging Face directory."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from scorer_client.console import counted
from scorer_client.export import checkpoint, names, wrapper
from scorer_client.export.checkpoint import TORCH, Checkpoint, Update
from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem, described, tell
from scorer_client.export.tasks import Task, task_of, window_limit

CONFIG = "config.json"
AUTO = {
    Task.CAUSAL_LM: "AutoModelForCausalLM",
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQ2SEQ: "AutoModelForSeq2SeqLM",
    Task.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
}


@dataclass
class HuggingFace:
    folder: Path
    precision: Precision
    config: Mapping[str, Any]
    task: Task
    widened: bool

    @classmethod
    def open(cls, folder: Path, precision: Precision, task: Task | None, widened: bool) -> "HuggingFace":
        config = read_config(folder / CONFIG)
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
        config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
        found: Mapping[str, Any] = config.get_text_config().to_dict()
        return found

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
                f"the checkpoint lacks {counted(len(missing), 'parameter')} of {type(model).__name__}: {shown}",
                "check that --task and `architectures` in config.json name the class that was saved",
            )
        return of_type(model, self.precision)

    def weights(self, model: Any, folder: Path) -> Path:
        found, path = Checkpoint.of_folder(self.folder), folder / checkpoint.WHOLE
        merged = names.merged(model.m, set(found))
        if merged:
            shown = ", ".join(merged[:3]) + (" and more" if len(merged) > 3 else "")
            tell(f"    transformers keeps {counted(len(merged), 'tensor')} in another form than the checkpoint.")
            tell(f"    Candidates name these: {shown}")
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


def of_type(model: Any, precision: Precision) -> Any:
    """Every weight in one type, as the package has them; transformers keeps some in float32. Buffers stay what they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(TORCH[precision])
    return model


def read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"{path}: {described(error)}", "save the model again with model.save_pretrained(DIR)", USAGE) from error
    if not isinstance(found, dict):
        raise Problem(f"{path} is no JSON object", "save the model again with model.save_pretrained(DIR)", USAGE)
    return found
