"""Numbers as a trainer holds them: tensors of torch, arrays of numpy, and plain sequences.

A tensor brings its own methods, so torch is never imported here. numpy is, once an array is handed over.
"""

import ctypes
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from scorer_client.console import counted

# By the codes of struct: what torch's conversion is called, and numpy's type.
CONVERSIONS = {"f": ("float", "<f4"), "e": ("half", "<f2"), "i": ("int", "<i4")}
CALLED = {"f": "float32", "e": "float16", "i": "32 bits"}
FLOATS, INTEGERS = ("float", "bfloat"), ("int", "uint")
INT32 = 1 << 31


class Array(ABC):
    """The elements of an array in row-major order, in main memory. `what` is its name in errors."""

    def __init__(self, what: str, shape: tuple[int, ...], dtype: str, place: object) -> None:
        self.what = what
        self.shape = shape
        self.dtype = dtype
        self.place = place  # Equal for arrays that are the same memory.

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(FLOATS)

    @property
    def is_integer(self) -> bool:
        return self.dtype.startswith(INTEGERS)

    @abstractmethod
    def pack(self, code: str) -> bytes:
        """Little-endian numbers of that code of struct."""

    @abstractmethod
    def numbers(self) -> list[Any]: ...

    @abstractmethod
    def bounds(self) -> tuple[Any, Any]:
        """The smallest element and the largest; there must be one."""

    def check_values(self) -> "Array":
        """Floats, or integers that stand for them."""
        if not (self.is_float or self.is_integer):
            raise TypeError(f"{self.what}: values of type {self.dtype}; they must be real numbers, such as float32")
        return self

    def check_indices(self, elements: int) -> "Array":
        """Integers within a tensor of so many elements."""
        if not self.is_integer and len(self):
            raise TypeError(f"{self.what}: indices of type {self.dtype}; they must be integers, such as int64")
        least, most = self.bounds() if len(self) else (0, 0)
        if least < 0 or most >= max(elements, 1):
            wrong = least if least < 0 else most
            raise ValueError(f"{self.what}: index {wrong}; the tensor has {counted(elements, 'element')}, counted from 0")
        if most >= INT32:
            raise ValueError(f"{self.what}: index {most} does not fit 32 bits")
        return self

    def unfit(self, code: str) -> ValueError:
        """What to raise if a value is not finite, or too large for the type."""
        numbers = self.numbers()
        at = next((at for at, number in enumerate(numbers) if not fits(number, code)), None)
        if at is None:
            return ValueError(f"{self.what}: values of type {self.dtype} cannot be written as {CALLED[code]}")
        why = "is not finite" if not math.isfinite(numbers[at]) else f"is too large for {CALLED[code]}"
        return ValueError(f"{self.what}: the value {float(numbers[at]):g} at place {at} ({self.dtype}) {why}")


def fits(number: Any, code: str) -> bool:
    try:
        struct.pack(f"<{code}", number)
    except (OverflowError, struct.error):
        return False
    return math.isfinite(number)


class Vector(Array):
    """An array of a library, which can compute. `flat` is the library's own, of one dimension."""

    flat: Any

    @abstractmethod
    def difference(self, before: "Vector") -> Any:
        """In float32 and in this array's shape."""

    @abstractmethod
    def changed(self) -> Any:
        """Indices of the elements that are not zero, ascending."""

    @abstractmethod
    def largest(self, count: int) -> Any:
        """Indices of so many elements of the largest magnitude, ascending."""

    @abstractmethod
    def joined(self, others: Sequence["Vector"]) -> "Vector":
        """This one and the others, one after another."""

    def take(self, indices: Any) -> "Vector":
        taken = vector(self.flat[indices], self.what)
        assert taken is not None
        return taken


class Tensor(Vector):
    """torch's. It may be on any device, a view, sparse, and part of a graph of gradients."""

    def __init__(self, tensor: Any, what: str) -> None:
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{what}: a DTensor is spread over processes; call its full_tensor() in each of them, and give that")
        if tensor.device.type == "meta":
            raise TypeError(f"{what}: a tensor on the device meta has no values")
        strided = str(tensor.layout) == "torch.strided"
        place = (tensor.data_ptr(), tuple(tensor.stride())) if strided else id(tensor)
        super().__init__(what, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), (place, tuple(tensor.shape)))
        dense = tensor.detach() if strided else tensor.detach().to_dense()
        # A view may also negate lazily, and its memory then holds the opposite.
        self.flat = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)

    def pack(self, code: str) -> bytes:
        converted = getattr(self.flat, CONVERSIONS[code][0])()
        if code != "i" and not bool(converted.isfinite().all()):
            raise self.unfit(code)
        size = converted.numel() * converted.element_size()
        # Tensor.numpy() would need numpy, which torch does without.
        return ctypes.string_at(converted.data_ptr(), size) if size else b""

    def numbers(self) -> list[Any]:
        listed: list[Any] = self.flat.tolist()
        return listed

    def bounds(self) -> tuple[Any, Any]:
        return int(self.flat.min()), int(self.flat.max())

    def difference(self, before: Vector) -> Any:
        return (self.flat.float() - before.flat.float()).reshape(self.shape)

    def changed(self) -> Any:
        return self.flat.nonzero().reshape(-1)

    def largest(self, count: int) -> Any:
        return self.flat.float().abs().topk(min(count, len(self)), sorted=False).indices.sort().values

    def joined(self, others: Sequence[Vector]) -> Vector:
        import torch

        return Tensor(torch.cat([self.flat, *(other.flat for other in others)]), self.what)


class Numpy(Vector):
    """numpy's, or of a library whose arrays become numpy's."""

    def __init__(self, array: Any, what: str) -> None:
        import numpy

        given, array = array, numpy.asarray(array)
        # What another library's array becomes may be a copy, whose memory is used again.
        place = (array.__array_interface__["data"][0], array.shape, array.strides) if given is array else id(given)
        super().__init__(what, array.shape, array.dtype.name, place)
        self.flat = array.reshape(-1)

    def pack(self, code: str) -> bytes:
        import numpy

        with numpy.errstate(over="ignore"):
            converted = self.flat.astype(CONVERSIONS[code][1])
        if code != "i" and not numpy.isfinite(converted).all():
            raise self.unfit(code)
        packed: bytes = converted.tobytes()
        return packed

    def numbers(self) -> list[Any]:
        listed: list[Any] = self.flat.tolist()
        return listed

    def bounds(self) -> tuple[Any, Any]:
        return int(self.flat.min()), int(self.flat.max())

    def difference(self, before: Vector) -> Any:
        return (self.flat.astype("f4") - before.flat.astype("f4")).reshape(self.shape)

    def changed(self) -> Any:
        return self.flat.nonzero()[0]

    def largest(self, count: int) -> Any:
        import numpy

        if count >= len(self):
            return numpy.arange(len(self))
        # NaN counts as the largest, as in torch: whoever writes it is told, and nothing is hidden.
        magnitudes = numpy.nan_to_num(numpy.abs(self.flat.astype("f4")), nan=numpy.inf, posinf=numpy.inf)
        return numpy.sort(numpy.argpartition(-magnitudes, count)[:count])

    def joined(self, others: Sequence[Vector]) -> Vector:
        import numpy

        return Numpy(numpy.concatenate([self.flat, *(other.flat for other in others)]), self.what)


class Plain(Array):
    """A list or another sequence of numbers."""

    def __init__(self, sequence: Sequence[Any], what: str) -> None:
        whole = all(isinstance(number, int) or hasattr(number, "__index__") for number in sequence)
        super().__init__(what, (len(sequence),), "int" if whole else "float", id(sequence))
        self.sequence = sequence

    def pack(self, code: str) -> bytes:
        try:
            packed = struct.pack(f"<{len(self)}{code}", *self.sequence)
        except OverflowError as error:
            raise self.unfit(code) from error
        except (struct.error, TypeError) as error:
            raise TypeError(f"{self.what}: {error}") from error
        if code != "i" and not all(map(math.isfinite, self.sequence)):
            raise self.unfit(code)
        return packed

    def numbers(self) -> list[Any]:
        return list(self.sequence)

    def bounds(self) -> tuple[Any, Any]:
        return min(self.sequence), max(self.sequence)


def vector(given: Any, what: str) -> Vector | None:
    """None if it is of neither library. A tensor also knows how to become numpy's, so torch is asked first."""
    if hasattr(given, "data_ptr") and hasattr(given, "detach"):
        return Tensor(given, what)
    return Numpy(given, what) if hasattr(given, "__array__") else None


def array(given: Any, what: str) -> Array:
    found = vector(given, what)
    if found is None and not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise TypeError(f"{what}: a {type(given).__name__}; give a list, an array of numpy or a tensor of torch")
    return Plain(given, what) if found is None else found
