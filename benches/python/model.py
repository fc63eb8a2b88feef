"""The bench's model as a Python scorer would run it: decode the candidate, run the graph, measure the loss.

The candidate is not applied: onnxruntime cannot change a weight of a live session from Python, so these workers do
less than they would have to.
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


def job():
    """The body of every job, as the aggregator sends it."""
    with open(os.environ["BENCH_JOB"], encoding="utf-8") as file:
        return json.load(file)


def read_tokens():
    """The first tensor of the shard: one window and its targets from each row."""
    with open(f"{FOLDER}/shards/shard_000001.safetensors", "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        (tensor,) = header.values()
        kind = {"I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1"}[tensor["dtype"]]
        rows = numpy.frombuffer(file.read(), kind).reshape(tensor["shape"]).astype(numpy.int64)
    return rows[:, :WINDOW], rows[:, 1 : WINDOW + 1]


class Model:
    """A session and its windows."""

    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            f"{FOLDER}/graph.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.tokens, self.targets = read_tokens()
        self.before = self.loss()

    def loss(self):
        (logits,) = self.session.run(None, {"tokens": self.tokens})
        logits = logits.astype(numpy.float64)
        top = logits.max(axis=-1, keepdims=True)
        total = numpy.log(numpy.exp(logits - top).sum(axis=-1)) + top[..., 0]
        own = numpy.take_along_axis(logits, self.targets[..., None], axis=-1)[..., 0]
        return float((total - own).mean())

    def score(self, body):
        candidate = json.loads(base64.b64decode(body["candidate"]["data"]))
        entries = 0
        for tensor in candidate.values():
            count = tensor["k"]
            packed = zlib.decompress(base64.b64decode(tensor["data"]))
            values = numpy.frombuffer(packed, "<f4", count)
            indices = numpy.frombuffer(packed, "<i4", count, 4 * count)
            if not numpy.isfinite(values).all() or (indices < 0).any():
                raise ValueError("a malformed candidate")
            entries += count
        after = self.loss()
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
