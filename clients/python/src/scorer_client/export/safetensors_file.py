"""Safetensors files by the standard library: what shards need, and no more."""

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U16": 2, "U32": 4, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER = 100 << 20  # The limit of the format's own library.


class NotSafetensors(ValueError):
    """Says what is wrong with the file."""


@dataclass(frozen=True)
class Tensor:
    """`data` is little endian, row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def header(sizes: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file whose tensors follow one another without gaps, in the order given."""
    entries, end = {}, 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with path.open("wb") as file:
        file.write(header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            file.write(tensor.data)


def read(path: Path) -> dict[str, Tensor]:
    """The file is mapped, not copied."""
    with path.open("rb") as file:
        if path.stat().st_size < 8:
            raise NotSafetensors(f"{path} is not a safetensors file: it has less than 8 bytes")
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (length,) = struct.unpack("<Q", whole[:8])
    if length > min(MAX_HEADER, len(whole) - 8):
        raise NotSafetensors(f"{path} is not a safetensors file: its header would have {length} bytes")
    try:
        entries = json.loads(bytes(whole[8 : 8 + length]))
        body = whole[8 + length :]
        return {name: _tensor(entry, body) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotSafetensors(f"{path} is not a safetensors file: {type(error).__name__}: {error}") from error


def _tensor(entry: dict[str, object], body: memoryview) -> Tensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError("a tensor without dtype, shape and data_offsets")
    start, end = offsets
    if dtype in SIZES and end - start != math.prod(shape) * SIZES[dtype] or not 0 <= start <= end <= len(body):
        raise ValueError("the size of a tensor is not that of its shape")
    return Tensor(dtype, tuple(shape), body[start:end])
