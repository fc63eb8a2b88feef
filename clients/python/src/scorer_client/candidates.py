"""Writes an update as a candidate, in each format that the workers read.

An update maps tensor names to entries. An entry is a dense array in the tensor's own shape, or (shape, indices, values):
indices are those of the changed elements in the flattened (row-major) tensor, each at most once. An array is a tensor of
torch, on any device and of any float type, or one of numpy; indices and values may also be lists. `param_diff`, `gradient`
and `largest` make updates. Only `zstd` and arrays need more than the standard library.
"""

import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scorer_client.arrays import Array
from scorer_client.updates import Entry, Update, entries, gradient, largest, param_diff

__all__ = ["Update", "binary_v2", "gradient", "largest", "param_diff", "pt_chunks", "pt_chunks_compact", "safetensors", "zstd"]

# Type names in safetensors and in struct, in the order in which the safetensors library writes tensors.
TYPES = {"F32": "f", "I32": "i", "F16": "e"}


def binary_v2(update: Update, half: bool = False) -> bytes:
    """JSON of {NAME: {shape, k, data}}, where data is base64(zlib(k values as f32 or f16, then k indices as i32))."""
    document = {}
    for entry in entries(update):
        data = base64.b64encode(_packed(entry, half)).decode()
        document[entry.name] = {"shape": list(entry.shape), "k": len(entry.indices), "data": data}
    return json.dumps(document, separators=(",", ":")).encode()


def safetensors(update: Update, half: bool = False, dense: bool = False) -> bytes:
    """A safetensors file with NAME::indices (I32) and NAME::values (F32 or F16) for each tensor.

    If dense: one tensor NAME instead, in its own shape, with zero where the update has no element.
    """
    floats = "F16" if half else "F32"
    tensors = sorted(_tensors(update, floats, dense), key=lambda tensor: ([*TYPES].index(tensor[0]), tensor[1]))
    header, body = {}, bytearray()
    for dtype, name, shape, data in tensors:
        start = len(body)
        body += data
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(body)]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _tensors(update: Update, floats: str, dense: bool) -> Iterator[tuple[str, str, Sequence[int], bytes]]:
    for entry in entries(update, dense):
        if dense:
            yield floats, entry.name, entry.shape, entry.dense(TYPES[floats])
        else:
            yield floats, f"{entry.name}::values", [len(entry.values)], entry.values.pack(TYPES[floats])
            yield "I32", f"{entry.name}::indices", [len(entry.indices)], entry.indices.pack("i")


def pt_chunks(update: Update, old_version: int, new_version: int) -> bytes:
    """What torch.save writes for {old_version, new_version, chunks: [{name, indices, values, shape}]}.

    Indices are int32 tensors and values float32 tensors. Each has its own storage, the entry data/N of the zip.
    """
    storages: list[bytes] = []

    def tensor(kind: str, code: str, numbers: Array) -> _Call:
        storage = _Storage(("storage", _Name("torch", kind), str(len(storages)), "cpu", len(numbers)))
        storages.append(numbers.pack(code))
        no_hooks = _Call(_Name("collections", "OrderedDict"), ())
        view = (storage, 0, (len(numbers),), (1,), False, no_hooks)
        return _Call(_Name("torch._utils", "_rebuild_tensor_v2"), view)

    chunks = []
    for entry in entries(update):
        tensors = {"indices": tensor("IntStorage", "i", entry.indices), "values": tensor("FloatStorage", "f", entry.values)}
        chunks.append({"name": entry.name, **tensors, "shape": tuple(entry.shape)})
    return _torch_zip(old_version, new_version, chunks, storages)


def pt_chunks_compact(update: Update, old_version: int, new_version: int) -> bytes:
    """The same with chunks {name, k, data}, where data is zlib(k values as f16, then k indices as i32), without tensors."""
    chunks = [
        {"name": entry.name, "k": len(entry.indices), "data": _packed(entry, half=True)} for entry in entries(update)
    ]
    return _torch_zip(old_version, new_version, chunks, [])


def zstd(body: bytes) -> bytes:
    """Compresses a whole candidate of any format into one zstd frame. Its job must say compression "zstd"."""
    import zstandard

    return zstandard.compress(body)


def _packed(entry: Entry, half: bool) -> bytes:
    return zlib.compress(entry.values.pack("e" if half else "f") + entry.indices.pack("i"), 1)


def _torch_zip(old_version: int, new_version: int, chunks: list[dict[str, Any]], storages: list[bytes]) -> bytes:
    root = {"old_version": old_version, "new_version": new_version, "chunks": chunks}
    entries = {"data.pkl": b"\x80\x02" + _pickled(root, {}) + b".", "byteorder": b"little"}
    entries |= {f"data/{key}": storage for key, storage in enumerate(storages)}
    entries["version"] = b"3\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            # A ZipInfo's default time, so that the same update always gives the same bytes.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return file.getvalue()


@dataclass(frozen=True)
class _Name:
    module: str
    name: str


@dataclass(frozen=True)
class _Call:
    name: _Name
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Storage:
    description: tuple[Any, ...]


def _pickled(value: Any, memo: dict[Any, int]) -> bytes:
    """Pickle protocol 2 as torch.save uses it. The pickle module would have to import torch to refer to its names."""

    def all_of(values: Iterable[Any]) -> bytes:
        return b"".join(_pickled(value, memo) for value in values)

    def memoized(code: bytes, key: Any = None) -> bytes:
        memo[key or object()] = number = len(memo)
        return code + (b"q%c" % number if number < 256 else b"r" + struct.pack("<I", number))

    match value:
        case str() | _Name() if value in memo:
            number = memo[value]
            return b"h%c" % number if number < 256 else b"j" + struct.pack("<I", number)
        case str():
            text = value.encode()
            return memoized(b"X" + struct.pack("<I", len(text)) + text, value)
        case bytes():  # Protocol 2 has only text: one character for each byte.
            return _pickled(_Call(_Name("_codecs", "encode"), (value.decode("latin1"), "latin1")), memo)
        case False:
            return b"\x89"
        case int():
            sizes = (b"K", "<B", 8), (b"M", "<H", 16), (b"J", "<i", 31), (b"\x8a\x08", "<q", 63)
            code, layout = next((code, layout) for code, layout, bits in sizes if value < 1 << bits)
            return code + struct.pack(layout, value)
        case list():
            return memoized(b"]") + b"(" + all_of(value) + b"e"
        case ():
            return b")"
        case tuple() if len(value) > 3:
            return memoized(b"(" + all_of(value) + b"t")
        case tuple():
            return memoized(all_of(value) + (b"\x85", b"\x86", b"\x87")[len(value) - 1])
        case dict():
            return memoized(b"}") + b"(" + all_of(part for pair in value.items() for part in pair) + b"u"
        case _Name(module, name):
            return memoized(f"c{module}\n{name}\n".encode(), value)
        case _Call(name, arguments):
            return memoized(all_of((name, arguments)) + b"R")
        case _Storage(description):
            return _pickled(description, memo) + b"Q"
    raise TypeError(f"a candidate cannot hold a {type(value).__name__}")
