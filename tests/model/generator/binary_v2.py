"""The seed system's JSON container: name -> base64(zlib(values ++ int32 indices)).

`entries` throughout is an ordered name -> (int32 indices, float16 or float32 values).
"""

import base64
import json
import zlib

import numpy as np


def pack(indices, values):
    width = "<f2" if values.dtype == np.float16 else "<f4"
    return values.astype(width).tobytes() + indices.astype("<i4").tobytes()


def entry(indices, values, shape):
    """One tensor's entry as a miner writes it."""
    return {"shape": list(shape), "k": len(indices), "data": encode_data(pack(indices, values))}


def encode_data(raw):
    return base64.b64encode(zlib.compress(raw, 1)).decode()


def encode(entries, shapes, form):
    """The whole body, as a dict (with the seed writers' extra keys) or as a list."""
    packed = {name: entry(*pair, shapes[name]) for name, pair in entries.items()}
    return document(packed, form)


def document(packed, form):
    if form == "list":
        tree = [{"name": name, **fields} for name, fields in packed.items()]
    else:
        tree = {"dtype": "torch.float32", "fmt": "binary_v2"}
        tree |= {name: fields | {"fmt": "binary_v2"} for name, fields in packed.items()}
    return json.dumps(tree).encode()


def decode(body):
    """What the container says, read back: the expected values are computed from this."""
    tree = json.loads(body)
    if isinstance(tree, dict):
        tree = [{"name": name, **fields} for name, fields in tree.items() if isinstance(fields, dict)]
    entries = {}
    for fields in tree:
        raw, k = zlib.decompress(base64.b64decode(fields["data"], validate=True)), fields["k"]
        width = {2 * k: "<f2", 4 * k: "<f4"}[len(raw) - 4 * k]
        values, indices = raw[: -4 * k], raw[-4 * k :]
        entries[fields["name"]] = (np.frombuffer(indices, "<i4"), np.frombuffer(values, width))
    return entries
