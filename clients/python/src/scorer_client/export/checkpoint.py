"""A checkpoint as safetensors files, read and rewritten tensor by tensor, so that memory holds one of them at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scorer_client.export import safetensors_file
from scorer_client.export.precision import Precision
from scorer_client.export.steps import USAGE, Problem

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH = {Precision.FLOAT32: torch.float32, Precision.FLOAT16: torch.float16, Precision.BFLOAT16: torch.bfloat16}

# Indices and values by the tensor's name.
Update = Mapping[str, tuple[Any, Any]]


class Checkpoint:
    """Where each tensor is. `path` is the file or the index that names the files."""

    def __init__(self, path: Path, files: Mapping[str, Path]) -> None:
        self.path = path
        self._files = files

    @classmethod
    def of_folder(cls, folder: Path) -> "Checkpoint":
        if (folder / WHOLE).is_file():
            return cls.of_file(folder / WHOLE)
        if (folder / INDEX).is_file():
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return cls(folder / INDEX, {name: folder / file for name, file in places.items()})
        raise Problem(
            f"{folder} has neither {WHOLE} nor {INDEX}",
            "save the model with model.save_pretrained(DIR), which writes safetensors",
            USAGE,
        )

    @classmethod
    def of_file(cls, path: Path) -> "Checkpoint":
        with _open(path) as file:
            return cls(path, {name: path for name in file.keys()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def tensor(self, name: str) -> Any:
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def types(self) -> set[str]:
        """The types of the floats, as safetensors calls them."""
        return {dtype for dtype, _ in self.shapes().values() if "F" in dtype}

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        found = {}
        for path in set(self._files.values()):
            with _open(path) as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    found[name] = (str(view.get_dtype()), tuple(view.get_shape()))
        return {name: found[name] for name in self._files}

    def fits(self, precision: Precision) -> bool:
        """Whether `scorer package` can place these tensors in a graph of that precision: equal types, or exact widening."""
        exact = {"F32", "F16", "BF16"} if precision is Precision.FLOAT32 else {precision.stored}
        return self.types() <= exact


def _open(path: Path) -> AbstractContextManager[Any]:
    opened: AbstractContextManager[Any] = safe_open(path, framework="pt")
    return opened


def write(path: Path, tensors: Mapping[str, Any]) -> None:
    """Tensors that are in memory."""
    with path.open("wb") as file:
        file.write(safetensors_file.header({name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}))
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def rewrite(parts: Mapping[str, tuple[Checkpoint, str]], path: Path, precision: Precision, update: Update) -> None:
    """Writes one file: under each name a tensor of a checkpoint, with floats in `precision` and the update added.

    An update is added in float32 and rounded once, as workers do it.
    """
    shapes = {checkpoint: checkpoint.shapes() for checkpoint, _ in parts.values()}
    sizes = {}
    for name, (checkpoint, stored) in parts.items():
        dtype, shape = shapes[checkpoint][stored]
        sizes[name] = (precision.stored if "F" in dtype else dtype, shape)
    with path.open("wb") as file:
        file.write(safetensors_file.header(sizes))
        for name, (checkpoint, stored) in parts.items():
            tensor = checkpoint.tensor(stored)
            if tensor.is_floating_point():
                tensor = changed(tensor.to(TORCH[precision]), update.get(name))
            file.write(_bytes(tensor))


def changed(tensor: Any, entries: tuple[Any, Any] | None) -> Any:
    """A copy of the tensor with the entries added."""
    if entries is None:
        return tensor
    indices, values = entries
    flat = tensor.clone().contiguous().view(-1)
    flat[indices] = (flat[indices].float() + values).to(flat.dtype)
    return flat.view(tensor.shape)


def _bytes(tensor: Any) -> memoryview:
    flat = tensor.detach().contiguous().cpu().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if math.prod(tensor.shape) else memoryview(b"")
