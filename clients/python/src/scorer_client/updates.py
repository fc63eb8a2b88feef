"""Updates, and how they are made: from two states of a model, from gradients, by their largest elements."""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scorer_client.arrays import Array, Vector, array, vector

# Names, and for each a dense array or (shape, indices, values). Arrays have any type, because no library is imported.
Update = Mapping[str, Any]
MOST_NAMED = 3


@dataclass(frozen=True)
class Entry:
    """The changed elements of a tensor."""

    name: str
    shape: Sequence[int]
    indices: Array
    values: Array

    def dense(self, code: str) -> bytes:
        """Every element of the tensor."""
        body = bytearray(struct.calcsize(f"<{code}") * math.prod(self.shape))
        # The bits as they are: as integers they are neither widened nor rounded.
        bits: Literal["I", "H"] = "I" if code == "f" else "H"
        elements = memoryview(body).cast(bits)
        for index, value in zip(self.indices.numbers(), memoryview(self.values.pack(code)).cast(bits), strict=True):
            elements[index] = value
        return bytes(body)


@dataclass(frozen=True)
class Whole(Entry):
    """A dense array, whose elements are all there."""

    def dense(self, code: str) -> bytes:
        return self.values.pack(code)


def entries(update: Update, dense: bool = False) -> Iterator[Entry]:
    """Of a dense array, the elements that are not zero; or the array as it is."""
    for name, given in update.items():
        found = vector(given, _tensor(name))
        if found is None:
            yield _sparse(name, given)
        elif dense:
            found.check_values()
            yield Whole(name, found.shape, found, found)
        else:
            yield _of_dense(name, found, _changed(found))


def param_diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> Update:
    """What training changed, from two state dicts, in float32: `after` minus `before`.

    Take `before` as copies: `{name: tensor.clone() for name, tensor in model.state_dict().items()}`. Tensors that did not
    change are left out, integers and booleans (counters, masks) too, and of those that share memory in `after`, all but the
    first: they are tied.
    """
    _check_same_names(before, after)
    update: dict[str, Any] = {}
    seen: dict[object, Any] = {}  # With the tensors, so that no memory is used again meanwhile.
    for name in before:
        old, new = _vector(name, before[name], "before"), _vector(name, given := after[name], "after")
        _check_same_kind(name, old, new)
        if not new.is_float or not len(new) or new.place in seen:
            continue
        if old.place == new.place:
            raise ValueError(f"tensor {name!r}: before and after are the same memory; take before as a copy, with clone()")
        seen[new.place] = given
        found = new.difference(old)
        if len(_changed(_vector(name, found))):
            update[name] = found
    if not update:
        raise ValueError("no tensor changed between before and after")
    return update


def gradient(named_parameters: Iterable[tuple[str, Any]]) -> Update:
    """The gradients of `model.named_parameters()`. Parameters without one, or with zeros only, are left out."""
    update: dict[str, Any] = {}
    for name, parameter in named_parameters:
        found = getattr(parameter, "grad", None)
        if found is not None and len(_changed(_vector(name, found, "gradient"))):
            update[name] = found
    if not update:
        raise ValueError("no parameter has a gradient that is not zero: call this between backward() and zero_grad()")
    return update


def largest(update: Update, count: int, per_tensor: bool = False) -> Update:
    """Of an update of dense arrays, so many elements of the largest magnitude: of all tensors together, or of each."""
    if count < 1:
        raise ValueError(f"count is {count}, and must be at least 1")
    found = {}
    for name, given in update.items():
        dense = _vector(name, given)
        changed = _changed(dense)
        values = dense.take(changed)
        # No more of one tensor than of all: what is joined below stays small.
        chosen = values.largest(count)
        found[name] = (dense.shape, changed[chosen], values.take(chosen))
    if not per_tensor and found:
        found = _largest_of_all(found, count)
    return {name: (shape, indices, values.flat) for name, (shape, indices, values) in found.items() if len(values)}


_Taken = dict[str, tuple[tuple[int, ...], Any, Vector]]


def _largest_of_all(found: _Taken, count: int) -> _Taken:
    first, *others = (values for _, _, values in found.values())
    for other in others:
        if type(other) is not type(first):
            raise TypeError(f"{other.what}: an update holds arrays of torch or of numpy, and not of both")
    chosen = first.joined(others).largest(count)
    taken, start = {}, 0
    for name, (shape, indices, values) in found.items():
        end = start + len(values)
        here = chosen[(chosen >= start) & (chosen < end)] - start
        taken[name] = (shape, indices[here], values.take(here))
        start = end
    return taken


def _sparse(name: str, given: Any) -> Entry:
    tensor = _tensor(name)
    if not (isinstance(given, (tuple, list)) and len(given) == 3):
        raise TypeError(f"{tensor}: a {type(given).__name__}; give a dense array, or (shape, indices, values)")
    shape = tuple(int(size) for size in given[0])
    indices, values = array(given[1], f"{tensor}, indices"), array(given[2], f"{tensor}, values")
    for part in (indices, values):
        if len(part.shape) != 1:
            raise ValueError(f"{part.what}: shape {list(part.shape)}; they must have one dimension")
    if len(indices) != len(values):
        raise ValueError(f"{tensor}: {len(indices)} indices and {len(values)} values")
    return Entry(name, shape, indices.check_indices(math.prod(shape)), values.check_values())


def _of_dense(name: str, dense: Vector, indices: Any) -> Entry:
    return Entry(name, dense.shape, array(indices, dense.what).check_indices(len(dense)), dense.take(indices))


def _changed(dense: Vector) -> Any:
    dense.check_values()
    return dense.changed()


def _vector(name: str, given: Any, which: str = "") -> Vector:
    what = f"{_tensor(name)}, {which}" if which else _tensor(name)
    found = vector(given, what)
    if found is None:
        raise TypeError(f"{what}: a {type(given).__name__}; give an array of numpy or a tensor of torch")
    return found


def _tensor(name: str) -> str:
    return f"tensor {name!r}"


def _check_same_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for here, there, which in ((before, after, "before"), (after, before, "after")):
        alone = [name for name in here if name not in there]
        if alone:
            more = ", ..." if len(alone) > MOST_NAMED else ""
            names = ", ".join(map(repr, alone[:MOST_NAMED]))
            raise ValueError(f"only {which} has {len(alone)} of the tensors: {names}{more}")


def _check_same_kind(name: str, old: Vector, new: Vector) -> None:
    if type(old) is not type(new):
        raise TypeError(f"{_tensor(name)}: one of before and after is a tensor of torch, the other is not")
    if old.shape != new.shape:
        raise ValueError(f"{_tensor(name)}: shape {list(old.shape)} before, {list(new.shape)} after")
    if old.is_float != new.is_float:
        raise TypeError(f"{_tensor(name)}: {old.dtype} before, {new.dtype} after")
