"""Files of tokens: `.npy`, `.bin` and `.safetensors`, mapped instead of read."""

import ast
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scorer_client.console import counted
from scorer_client.export import safetensors_file
from scorer_client.export.safetensors_file import NotSafetensors
from scorer_client.export.steps import Problem

SUFFIXES = (".npy", ".bin", ".safetensors")
# Codes of memoryview.cast for numpy's and safetensors' integers. A .bin file has no header; uint16 is what trainers write.
Code = Literal["B", "h", "H", "i", "I", "q", "Q"]
NPY_CODES: dict[str, Code] = {"u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}
SAFETENSORS_CODES: dict[str, Code] = {"U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q"}
BIN_CODES: dict[str, Code] = {"uint16": "H", "uint32": "I", "int32": "i"}
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class TokenFile:
    """`row_length` is None for a file that is one long text."""

    tokens: memoryview
    row_length: int | None

    def documents(self, block: int) -> Iterator[memoryview]:
        """Rows, or blocks of this many tokens of a long text."""
        length = self.row_length or block
        for start in range(0, len(self.tokens), length):
            yield self.tokens[start : start + length]


def read(path: Path, bin_type: str) -> TokenFile:
    if sys.byteorder != "little":
        raise Problem("token files are little endian, and this machine is not", "export on another machine")
    match path.suffix:
        case ".npy":
            return _read_npy(path)
        case ".bin":
            return _cast(path, _map(path), BIN_CODES[bin_type], None)
        case _:
            return _read_safetensors(path)


def _read_npy(path: Path) -> TokenFile:
    whole = _map(path)
    advice = "save it with numpy.save as a one- or two-dimensional array of integers"
    if bytes(whole[:6]) != NPY_MAGIC:
        raise Problem(f"{path} does not begin as a .npy file", advice)
    width = 2 if whole[6] == 1 else 4
    start = 8 + width
    end = start + int.from_bytes(whole[8:start], "little")
    try:
        described = ast.literal_eval(bytes(whole[start:end]).decode("latin-1").strip())
        kind, fortran, shape = described["descr"], described["fortran_order"], described["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise Problem(f"{path} has no .npy header that can be read", advice) from error
    code = NPY_CODES.get(str(kind).lstrip("<|="))
    if code is None or len(shape) not in (1, 2) or (fortran and len(shape) == 2):
        raise Problem(f"{path} holds {kind} of shape {shape}{', column-major' if fortran else ''}", advice)
    return _cast(path, whole[end:], code, shape[1] if len(shape) == 2 else None)


def _read_safetensors(path: Path) -> TokenFile:
    advice = "save it with one tensor `tokens` of integers, [n] or [rows, n]"
    try:
        tensors = safetensors_file.read(path)
    except NotSafetensors as error:
        raise Problem(str(error), advice) from error
    tensor = tensors.get("tokens")
    if tensor is None:
        raise Problem(f"{path} holds {', '.join(tensors) or 'nothing'} and no tensor `tokens`", advice)
    code = SAFETENSORS_CODES.get(tensor.dtype)
    if code is None or len(tensor.shape) not in (1, 2):
        raise Problem(f"{path}: `tokens` is {tensor.dtype} of shape {list(tensor.shape)}", advice)
    return _cast(path, memoryview(tensor.data), code, tensor.shape[1] if len(tensor.shape) == 2 else None)


def _map(path: Path) -> memoryview:
    if path.stat().st_size == 0:
        raise Problem(f"{path} is empty", "give a file that holds tokens")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _cast(path: Path, data: memoryview, code: Code, row_length: int | None) -> TokenFile:
    try:
        return TokenFile(data.cast("B").cast(code), row_length)
    except (TypeError, ValueError) as error:
        advice = "check the file; --bin-type tells the type of a .bin file"
        raise Problem(f"{path}: its size, {counted(len(data), 'byte')}, is not a whole number of tokens", advice) from error
