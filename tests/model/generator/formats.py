"""Makes ../candidates/formats: one update in every container, as torch and safetensors themselves write it.

Run by hand in the folder above, `python -m generator.formats`; the results are committed and no test runs this.
"""

import argparse
import base64
import datetime
import fractions
import io
import json
import os
import types
import uuid
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import zstandard
from safetensors.torch import save
from torch import nn

from . import wire

CANDIDATES = Path(__file__).parent.parent / "candidates"
FOLDER = CANDIDATES / "formats"
CUT_FROM = "difference-few-steps.json"
TENSORS = ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight")
VERSIONS = {"old_version": 7, "new_version": 8}
PRECISIONS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
WIDTHS = {"i32": torch.int32, "i64": torch.int64}


def main():
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    update, shapes = source()
    files = Files()
    dense = {name: every_element(update[name], shapes[name]) for name in TENSORS if len(shapes[name]) == 1}
    files.add("source.json", "binary_v2", wire.encode(update, shapes), "f32")
    files.add("source-dense.json", "binary_v2", wire.encode(dense, shapes), "f32", source="source-dense.json")
    files.add("source-python.json", "binary_v2", python_json(update, shapes), "f32")
    for name, body, precision in torch_files(update, shapes):
        files.add(f"{name}.pt", "pt_chunks", body, precision)
    for indices, values in (("i32", "f32"), ("i64", "f32"), ("i32", "f16"), ("i64", "bf16"), ("i64", "f16")):
        body = save(pairs(update, indices, values))
        files.add(f"pairs-{indices}-{values}.safetensors", "safetensors", body, values)
    body = save(pairs(update, "i32", "f32"), metadata={"format": "pt", "made by": "a miner"})
    files.add("pairs-metadata.safetensors", "safetensors", body, "f32")
    body = save({f"module.{name}": tensor for name, tensor in (pairs(update, "i32", "f32") | counters()).items()})
    files.add("pairs-whole-update.safetensors", "safetensors", body, "f32")
    for precision in ("f32", "f16", "bf16"):
        body = save({name: torch.tensor(values).to(PRECISIONS[precision]) for name, (values, _) in dense.items()})
        files.add(f"dense-{precision}.safetensors", "safetensors", body, precision, source="source-dense.json")
    for name in ("source.json", "pairs-i32-f32.safetensors", "torch-i32-f32.pt", "torch-compact-bytes.pt"):
        files.add_compressed(name)
    for name, body in refused(chunks(update, shapes)):
        files.refuse(f"{name}.pt", "pt_chunks", body)
    files.write_index()


class Files:
    """What was written, for the index."""

    def __init__(self):
        self.files, self.refused = [], []

    def add(self, file, container, body, precision, compression=None, source="source.json"):
        (FOLDER / file).write_bytes(body)
        entry = {"file": file, "format": container, "compression": compression, "precision": precision}
        self.files.append(entry | {"source": source})

    def add_compressed(self, file):
        entry = next(entry for entry in self.files if entry["file"] == file)
        body = zstandard.compress((FOLDER / file).read_bytes())
        self.add(f"{file}.zst", entry["format"], body, entry["precision"], "zstd")

    def refuse(self, file, container, body):
        (FOLDER / file).write_bytes(body)
        self.refused.append({"file": file, "format": container, "compression": None, "code": "candidate_malformed"})

    def write_index(self):
        listed = {"semantics": "param_diff", **VERSIONS, "files": self.files, "refused": self.refused}
        (FOLDER / "index.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def source():
    """A few tensors of a scored candidate: values and indices, and their shapes."""
    document, update, shapes = json.loads((CANDIDATES / CUT_FROM).read_text()), {}, {}
    for name in TENSORS:
        entry = document[name]
        update[name], shapes[name] = wire.unpacked(entry), tuple(entry["shape"])
    return update, shapes


def every_element(entries, shape):
    values, indices = entries
    dense = np.zeros(shape, np.float32)
    dense.flat[indices] = values
    return dense, np.arange(dense.size, dtype=np.int32)


def pairs(update, indices, values):
    tensors = {}
    for name, (numbers, places) in update.items():
        tensors[f"{name}::indices"] = torch.tensor(places).to(WIDTHS[indices])
        tensors[f"{name}::values"] = torch.tensor(numbers).to(PRECISIONS[values])
    return tensors


def chunks(update, shapes, indices="i32", values="f32"):
    tensors = pairs(update, indices, values)
    return [
        {"name": name, "indices": tensors[f"{name}::indices"], "values": tensors[f"{name}::values"], "shape": shape}
        for name, shape in shapes.items()
    ]


def torch_files(update, shapes):
    """Names, bodies and the values' precision."""

    def body(chunks, **how):
        return saved({**VERSIONS, "chunks": chunks}, **how)

    for indices, values in (("i64", "f32"), ("i32", "f32"), ("i32", "f16"), ("i64", "bf16"), ("i64", "f64")):
        yield f"torch-{indices}-{values}", body(chunks(update, shapes, indices, values)), values
    plain = chunks(update, shapes)
    yield "torch-views", body(views(plain)), "f32"
    yield "torch-compact-bytes", body(compact(update)), "f16"
    as_text = [chunk | {"data": base64.b64encode(chunk["data"]).decode()} for chunk in compact(update)]
    yield "torch-compact-text", body(as_text), "f16"
    yield "torch-protocol-4", body(plain, pickle_protocol=4), "f32"
    yield "torch-protocol-4-compact", body(compact(update), pickle_protocol=4), "f16"
    yield "torch-ordered", saved(OrderedDict(VERSIONS, chunks=[OrderedDict(chunk) for chunk in plain])), "f32"
    yield "torch-size", body([chunk | {"shape": torch.Size(chunk["shape"])} for chunk in plain]), "f32"
    yield "torch-parameter", body([chunk | {"values": nn.Parameter(chunk["values"])} for chunk in plain]), "f32"
    # What writers add for themselves, of every plain type.
    remarks = {"made_at": 1.5e9, "note": None, "scaled": True, "offset": -1, "large": 1 << 40, "nothing": []}
    remarked = [chunk | {"indices_dtype": "int32", "scale": torch.tensor(1.0)} for chunk in plain]
    yield "torch-remarks", saved({**VERSIONS, **remarks, "chunks": remarked}), "f32"
    for protocol in (2, 3, 4, 5):
        remarks = plain_remarks(protocol)
        remarked = [chunk | remarks for chunk in plain[:1]] + plain[1:]
        root = {**VERSIONS, **remarks, "remarks": remarks, "chunks": remarked}
        yield f"torch-plain-remarks-{protocol}", saved(root, pickle_protocol=protocol), "f32"
    # Whole numbers as other languages and libraries have them, and what is as good as what is usual.
    counted = [chunk | {"k": float(chunk["k"])} for chunk in compact(update)]
    counted = [chunk | {"shape": [float(n) for n in shapes[chunk["name"]]]} for chunk in counted]
    versions = {key: float(version) for key, version in VERSIONS.items()}
    yield "torch-whole-floats", saved({**versions, "chunks": tuple(counted)}), "f16"
    counted = [chunk | {"k": np.int64(chunk["k"]), "data": bytearray(chunk["data"])} for chunk in compact(update)]
    counted[0]["k"], counted[1]["k"] = np.uint16(counted[0]["k"]), np.float64(counted[1]["k"])
    for protocol in (2, 5):
        yield f"torch-numpy-{protocol}", saved({**VERSIONS, "chunks": counted}, pickle_protocol=protocol), "f16"
    yield "torch-buffer", body_of_buffers(plain), "f32"
    # Of a wrapped model, with what is no weight.
    whole = [chunk | {"name": f"_orig_mod.module.{chunk['name']}"} for chunk in [*plain, *counter_chunks()]]
    yield "torch-whole-update", body(whole), "f32"


def body_of_buffers(chunks):
    noted = [chunk | {"values": nn.Buffer(chunk["values"])} for chunk in chunks]
    noted[0]["indices"].note = "a tensor with an attribute"
    return saved({**VERSIONS, "chunks": noted})


def plain_remarks(protocol):
    """What is built without running code, of every kind that writers were seen to add, or may."""
    at = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    remarks = {
        "types": [torch.float16, torch.bool, torch.uint16, torch.float8_e4m3fn, torch.per_tensor_affine, int, torch.Tensor],
        "devices": (torch.device("cuda", 0), torch.device("cpu"), torch.strided),
        "sets": [{1, 2}, set(), frozenset({"a"}), frozenset()],
        "numbers": [1 + 2j, 1 << 70, -(1 << 70), 1 << 3000, float("nan"), float("inf"), Decimal("1.5"), fractions.Fraction(1, 3)],
        "bytes": [b"", b"abc", bytearray(), bytearray(b"abc")],
        "maps": [defaultdict(list, {"a": [1]}), Counter("aab"), OrderedDict(a=1)],
        "lists": [deque([1, 2], maxlen=3), range(3), slice(1, 2), ..., ()],
        "numpy": [np.int64(7), np.float32(1.5), np.bool_(True), np.str_("x"), np.dtype("f4"), np.arange(3)],
        "times": [at, at.date(), at.time(), datetime.timedelta(1)],
        "spaces": [types.SimpleNamespace(a=1), argparse.Namespace(rate=0.1)],
        "others": [uuid.UUID(int=7), PurePosixPath("/a/b"), torch.Size(range(9))],
        "tensors": [
            torch.tensor([True]),
            torch.ones(2).to(torch.float8_e4m3fn),
            torch.eye(3).to_sparse(),
            torch.ones(2, device="meta"),
            torch.ones(2, dtype=torch.complex64),
        ],
    }
    if protocol >= 4:
        remarks["devices"] += (torch.channels_last,)
    remarks["recursive"] = [remarks["numbers"]]
    remarks["recursive"].append(remarks["recursive"])
    return remarks


def counters():
    """What a whole update has besides weights."""
    return {
        "bn.num_batches_tracked": torch.tensor(7),
        "embeddings.position_ids": torch.arange(8).reshape(1, 8),
        "attn.causal": torch.ones(2, 2, dtype=torch.bool),
        "bn.steps::indices": torch.tensor([0]),
        "bn.steps::values": torch.tensor([1]),
    }


def counter_chunks():
    zero = torch.tensor([0])
    yield {"name": "bn.num_batches_tracked", "indices": zero, "values": torch.tensor([1]), "shape": ()}
    yield {"name": "attn.causal", "indices": zero, "values": torch.tensor([True]), "shape": (2, 2)}


def python_json(update, shapes):
    """As Python's json writes it: NaN in remarks, whole floats, and the names of a wrapped model."""
    entries = json.loads(wire.encode(update, shapes))
    document = {"loss": float("nan"), "best": [float("inf"), -float("inf")], "large": 10**400, "note": 'NaN "NaN"'}
    for name, entry in entries.items():
        if isinstance(entry, dict):
            entry |= {"k": float(entry["k"]), "shape": [float(n) for n in entry["shape"]], "scale": float("nan")}
            name = f"base_model.model.{name}"
        document[name] = entry
    return json.dumps(document).encode()


def views(chunks):
    """All indices in one larger tensor, all values in another: every second element, from the fourth on."""
    for field in ("indices", "values"):
        parts = [chunk[field] for chunk in chunks]
        together = torch.cat(parts)
        larger = together.new_full((2 * len(together) + 3,), -1)
        larger[3::2] = together
        parts = larger[3::2].split([len(part) for part in parts])
        chunks = [chunk | {field: part} for chunk, part in zip(chunks, parts, strict=True)]
    return chunks


def compact(update):
    made = []
    for name, (values, indices) in update.items():
        data = zlib.compress(wire.packed(values.astype(np.float16), indices), 1)
        made.append({"name": name, "k": len(values), "data": data})
    return made


def saved(root, **how):
    body = io.BytesIO()
    torch.save(root, body, **how)
    return body.getvalue()


class RunsACommand:
    def __reduce__(self):
        return os.system, ("echo this should not have been run",)


class GetsAnAttribute:
    def __reduce__(self):
        return getattr, (PurePosixPath("/a"), "parent")


def without(chunk, field):
    return {key: value for key, value in chunk.items() if key != field}


def refused(chunks):
    """Torch files that hold code, or are of another time or kind."""
    root = {**VERSIONS, "chunks": chunks}
    yield "hostile-os-system", saved(root | {"note": RunsACommand()})
    yield "hostile-module", saved(root | {"model": nn.Linear(2, 2)})
    yield "hostile-getattr", saved(root | {"note": GetsAnAttribute()})
    # Of today, and still no candidates.
    yield "state-dict", saved({chunk["name"]: chunk["values"] for chunk in chunks})
    yield "misspelt-list", saved({**VERSIONS, "chunk": chunks})
    yield "misspelt-field", saved({**VERSIONS, "chunks": [without(chunks[0], "indices") | {"idx": chunks[0]["indices"]}]})
    yield "without-values", saved({**VERSIONS, "chunks": [without(chunks[0], "values") | {"values": None}]})
    yield "beside-the-list", saved({**root, chunks[0]["name"]: without(chunks[0], "name")})
    yield "fraction", saved({**VERSIONS, "chunks": [{"name": chunks[0]["name"], "k": 7.5, "data": b""}]})
    yield "legacy", saved(root, _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
