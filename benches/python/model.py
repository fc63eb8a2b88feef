"""The bench's model as a Python scorer would run it: decode the candidate, apply it, run the graph, measure the loss.

From Python a weight of a live session cannot be changed, so each candidate takes a session of its own, made from the
graph in memory with its tensor replaced. BENCH_APPLY=0 leaves that out and runs the model as it is: less than scoring.
"""

import base64
import json
import os
import struct
import time
import zlib

import numpy
import onnxruntime

WINDOW = 16
FOLDER = os.environ["BENCH_MODEL"]
APPLY = os.environ.get("BENCH_APPLY") != "0"


def job():
    """The body of every job, as the aggregator sends it."""
    with open(os.environ["BENCH_JOB"], encoding="utf-8") as file:
        return json.load(file)


def read_tensors(path):
    """The tensors of a safetensors file."""
    kinds = {"F32": "<f4", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1"}
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        data = file.read()
    header.pop("__metadata__", None)
    tensors = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        tensors[name] = numpy.frombuffer(data[begin:end], kinds[tensor["dtype"]]).reshape(tensor["shape"])
    return tensors


def read_windows():
    """One window and its targets from each row of the shard."""
    (rows,) = read_tensors(f"{FOLDER}/shards/shard_000001.safetensors").values()
    rows = rows.astype(numpy.int64)
    return rows[:, :WINDOW], rows[:, 1 : WINDOW + 1]


class Model:
    """A session and its windows."""

    def __init__(self):
        with open(f"{FOLDER}/graph.onnx", "rb") as file:
            self.graph = file.read()
        self.weights = read_tensors(f"{FOLDER}/checkpoint.safetensors")
        self.tokens, self.targets = read_windows()
        self.live = self.session({})
        self.before = self.loss(self.live)

    def session(self, weights):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        for name, weight in weights.items():
            options.add_initializer(name, onnxruntime.OrtValue.ortvalue_from_numpy(weight))
        return onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])

    def loss(self, session):
        (logits,) = session.run(None, {"tokens": self.tokens})
        logits = logits.astype(numpy.float64)
        top = logits.max(axis=-1, keepdims=True)
        total = numpy.log(numpy.exp(logits - top).sum(axis=-1)) + top[..., 0]
        own = numpy.take_along_axis(logits, self.targets[..., None], axis=-1)[..., 0]
        return float((total - own).mean())

    def score(self, body):
        candidate = json.loads(base64.b64decode(body["candidate"]["data"]))
        entries, patched = 0, {}
        for name, tensor in candidate.items():
            count = tensor["k"]
            packed = zlib.decompress(base64.b64decode(tensor["data"]))
            values = numpy.frombuffer(packed, "<f4", count)
            indices = numpy.frombuffer(packed, "<i4", count, 4 * count)
            weight = self.weights[name].copy()
            if not numpy.isfinite(values).all() or (indices < 0).any() or (indices >= weight.size).any():
                raise ValueError("a malformed candidate")
            weight.reshape(-1)[indices] += values
            patched[name] = weight
            entries += count
        after = self.loss(self.session(patched) if APPLY else self.live)
        return {
            "v": 1,
            "submission_id": body["submission_id"],
            "status": "scored",
            "loss_before": self.before,
            "loss_after": after,
            "score": max(0.0, self.before - after),
            "entries": entries,
            "scored_at_ms": int(time.time() * 1000),
        }
