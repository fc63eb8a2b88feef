"""What the small models share: options, a graph in ONNX Runtime, candidates, the table of cases."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from . import scoring, wire
from .handmade import MODEL

AGREEMENT = 1e-6  # ONNX Runtime in float32 against the float64 reference, mean loss
VERSION = 1
NEXT_TOKEN = {"label_shift": 1}
NONCE = "epoch-12/ü:3"


def options(doc, folder):
    """Where the results go, and whether to train; without training the committed weights are kept."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--train", action="store_true", help="train instead of keeping the weights")
    parser.add_argument("--out", type=Path, default=MODEL / folder)
    chosen = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)  # it warns of every node that it cannot fold
    for part in ("candidates", "shards"):
        (chosen.out / part).mkdir(parents=True, exist_ok=True)
    return chosen.out, chosen.train


class Case:
    """A candidate, and the job that names it; `code` is what the refusal of a bad one says."""

    def __init__(self, name, kind, update, rate=None, code=None, nonce="", shards=None):
        self.name, self.kind, self.update, self.rate, self.code = name, kind, update, rate, code
        self.semantics = "param_diff" if rate is None else "gradient"
        self.nonce, self.shards = nonce, shards


class Model:
    """One checkpoint in one graph, its float64 reference, and what its windows are.

    `choose(nonce, shards)` gives the windows of a job, `reference(checkpoint, windows)` their losses,
    `feed(windows)` the graph's inputs. `places` says which initializer holds a tensor, transposed, where
    it is not the one of its own name. `label` is what every job says of its targets, if it has any.
    """

    def __init__(self, graph, checkpoint, choose, reference, feed, places=None, label=None):
        self.proto, self.checkpoint = onnx.load(graph), checkpoint
        self.choose, self.reference, self.feed = choose, reference, feed
        self.places, self.label, self.worst = places or {}, label or {}, 0.0
        self.output = self.proto.graph.output[0].name
        self.check_places()

    def check_places(self):
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.proto.graph.initializer}
        for name, weight in self.checkpoint.items():
            here = held[self.places[name]].T if name in self.places else held[name]
            assert scoring.raw(here) == scoring.raw(weight), name

    def run(self, checkpoint, feed):
        patched = onnx.ModelProto()
        patched.CopyFrom(self.proto)
        weights = {self.places.get(name, name): (name, weight) for name, weight in checkpoint.items()}
        for tensor in patched.graph.initializer:
            if tensor.name in weights:
                name, weight = weights[tensor.name]
                weight = np.ascontiguousarray(weight.T) if name in self.places else weight
                tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(patched.SerializeToString(), settings, ["CPUExecutionProvider"])
        return session.run([self.output], feed)[0]

    def runtime(self, checkpoint, windows):
        with np.errstate(all="ignore"):
            return windows.losses(self.run(checkpoint, self.feed(windows)))

    def losses(self, checkpoint, windows):
        """The reference's losses, once ONNX Runtime has agreed."""
        expected = self.reference(checkpoint, windows)
        gap = abs(float(self.runtime(checkpoint, windows).mean() - expected.mean()))
        assert gap < AGREEMENT, gap
        self.worst = max(self.worst, gap)
        return expected

    def baseline(self, nonce, shards):
        windows = self.choose(nonce, shards)
        losses = self.losses(self.checkpoint, windows)
        found = {"nonce": nonce, "shards": shards, **self.label, **windows.describe()}
        return found | {"loss": float(losses.mean()), "losses": losses.tolist()}

    def record(self, case, out):
        """Writes the candidate, and gives its line of the table."""
        body = wire.encode(case.update, {name: weight.shape for name, weight in self.checkpoint.items()})
        file = f"candidates/{case.name}.json"
        (out / file).write_bytes(body)
        return {
            "name": case.name,
            "kind": case.kind,
            "file": file,
            "format": "binary_v2",
            "semantics": case.semantics,
            "learning_rate": case.rate,
            "model_version": VERSION,
            "nonce": case.nonce,
            "shards": case.shards,
            **self.label,
            "sha256": hashlib.sha256(body).hexdigest(),
            "size": len(body),
            "expect": self.score(case) if case.code is None else self.refuse(case),
        }

    def score(self, case):
        windows = self.choose(case.nonce, case.shards)
        updated = scoring.apply(self.checkpoint, case.update, case.semantics, case.rate)
        before, after = self.losses(self.checkpoint, windows), self.losses(updated, windows)
        expect = scoring.summary(before, after, windows, self.checkpoint, updated, case.update)
        check_kind(case, expect)
        return expect

    def refuse(self, case):
        """A case must really have the fault that its code names."""
        if case.code == "candidate_index_out_of_range":
            assert any(indices.max() >= self.checkpoint[name].size for name, (_, indices) in case.update.items())
            return {"status": "rejected", "code": case.code}
        updated = scoring.apply(self.checkpoint, case.update, case.semantics, case.rate)
        finite = all(np.isfinite(weight.astype(np.float32)).all() for weight in updated.values())
        if case.code == "candidate_non_finite":
            assert not finite, case.name
        else:
            assert case.code == "non_finite_loss" and finite, case.name
            losses = self.runtime(updated, self.choose(case.nonce, case.shards))
            print(f"{case.name:28} {(~np.isfinite(losses)).sum()} of {len(losses)} losses are not finite")
            assert not np.isfinite(losses).all(), case.name
        return {"status": "rejected", "code": case.code}


def check_kind(case, expect):
    """A case must show what its kind says, or it is not worth keeping."""
    delta, entries = expect["delta"], f"{expect['effective_entries']} of {expect['entries']}"
    print(f"{case.name:28} {delta:+.6f} ± {expect['stderr'] or 0:.6f}  {entries} entries changed")
    if case.kind in ("honest gradient", "training difference"):
        assert delta > 0.0, case.name
    elif case.kind in ("inverted", "noise"):
        assert delta < 0.0, case.name
    elif case.kind == "zero":
        assert delta == 0.0 and expect["effective_entries"] == 0, case.name
    elif case.kind == "partly without effect":
        assert 0 < expect["effective_entries"] < expect["entries"], case.name


def dense(tensors):
    """Every entry of every tensor, as a sparse update."""
    return {name: (flat(values), np.arange(values.size, dtype=np.int32)) for name, values in tensors.items()}


def flat(values):
    return values.ravel().astype(np.float32)


def noise(checkpoint, seed, deviation, ratio):
    rng, update = np.random.default_rng(seed), {}
    for name, weight in checkpoint.items():
        k = max(1, int(weight.size * ratio))
        indices = np.sort(rng.choice(weight.size, k, replace=False)).astype(np.int32)
        update[name] = (rng.normal(0.0, deviation, k).astype(np.float32), indices)
    return update


def adam(weights, gradients, steps, rate):
    """Trains in float64: `gradients(weights, step)` gives the loss and a gradient for each weight."""
    first = {name: np.zeros_like(weight) for name, weight in weights.items()}
    second = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, steps + 1):
        _, gradient = gradients(weights, step)
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.99 * second[name] + 0.01 * g * g
            direction = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.99**step)) + 1e-8)
            weights[name] = weights[name] - rate * (1 - (step - 1) / steps) * direction
    return weights


def write_table(document, path):
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
