"""binary_v2 as the seed writes it: JSON of base64(zlib(values ++ int32 indices)).

A *sparse update* is an ordered mapping: tensor name -> (values float16|float32 [k], indices int32 [k]).
"""

import base64
import json
import math
import zlib

import numpy as np


def packed(values, indices):
    return values.astype(values.dtype.newbyteorder("<")).tobytes() + indices.astype("<i4").tobytes()


def unpacked(fields):
    """The values and indices of one tensor of a candidate; whether the values have two bytes or four, its length tells."""
    k, raw = fields["k"], zlib.decompress(base64.b64decode(fields["data"]))
    split = len(raw) - 4 * k
    return np.frombuffer(raw[:split], f"<f{split // k}"), np.frombuffer(raw[split:], "<i4")


def entry(shape, values, indices, **override):
    """One tensor of a candidate; `override` replaces fields, to make malformed ones."""
    data = base64.b64encode(zlib.compress(packed(values, indices), 1)).decode()
    return {"shape": list(shape), "k": len(values), "data": data, **override}


def dict_form(entries):
    head = {"dtype": "torch.float32", "fmt": "binary_v2"}
    return dumps(head | {name: {**fields, "fmt": "binary_v2"} for name, fields in entries.items()})


def list_form(entries):
    return dumps([{"name": name, **fields} for name, fields in entries.items()])


def decode(body):
    """The sparse update of a sound candidate in either form."""
    document = json.loads(body)
    if isinstance(document, dict):
        document = [fields | {"name": name} for name, fields in document.items() if isinstance(fields, dict)]
    return {fields["name"]: unpacked(fields) for fields in document}


def dumps(document):
    return json.dumps(document, separators=(",", ":")).encode()


def encode(update, shapes, form=dict_form):
    return form({name: entry(shapes[name], values, indices) for name, (values, indices) in update.items()})


def top_k(dense, ratio=0.01, dtype=np.float32, scale=1.0, shuffle=None):
    """The largest-magnitude `ratio` of every tensor, indices ascending or, with `shuffle`, in random order."""
    update = {}
    for name, tensor in dense.items():
        flat = tensor.ravel()
        k = max(1, math.ceil(flat.size * ratio))
        order = np.argsort(-np.abs(flat), kind="stable")[:k]
        order = np.sort(order) if shuffle is None else shuffle.permutation(order)
        update[name] = ((flat[order] * np.float32(scale)).astype(dtype), order.astype(np.int32))
    return update
