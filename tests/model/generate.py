"""Makes everything in this folder: the model, its two exports, shards, candidates, and cases.json.

Run by hand (README.md has the commands); the results are committed and no test runs this.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from generator import binary_v2, candidates, corpus, graphs, reference, tinylm, training

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint.safetensors"
SHARDS = range(59_996, 60_001)
ROWS, ROW_TOKENS, SINGLE_ROW_TOKENS = 4, 600, 5000
TOLERANCE = 1e-6  # ONNX Runtime's float32 loss against the float64 reference


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep-checkpoint", action="store_true", help="do not train again")
    keep = arguments.parse_args().keep_checkpoint
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    train_text, held_out = corpus.load()
    if not keep:
        trained = tinylm.checkpoint_of(training.train(train_text, print))
        save_file(trained, CHECKPOINT, metadata={"format": "pt"})
    checkpoint = load_file(CHECKPOINT)
    graphs.export(checkpoint, HERE)
    exports = {name: graphs.Patched(HERE / name, checkpoint) for name in (graphs.NAMED, graphs.FOLDED)}
    check_logits(exports, checkpoint, held_out)
    shards = write_shards(held_out)
    cases = candidates.build(checkpoint, train_text)
    write_candidates(cases)
    table = Table(checkpoint, shards, exports)
    document = {
        "model": describe(checkpoint),
        "baselines": [table.baseline(**wanted) for wanted in BASELINES],
        "cases": [table.case(case) for case in cases],
    }
    (HERE / "cases.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    report(document, table, exports)


BASELINES = [
    {},
    {"nonce": "epoch-42"},
    {"nonce": "époque 42"},  # hashed as UTF-8
    {"shards": (59_999, 59_997)},
    {"shards": (60_000, 59_996, 59_998), "nonce": "epoch-43"},
    {"shards": (60_000,)},
    {"label_shift": 2},
    {"label_shift": 2, "nonce": "epoch-42", "shards": (59_998,)},
]


def write_shards(held_out):
    """Four 2-D shards and, last, a 1-D one, cut from the held-out text without overlap."""
    (HERE / "shards").mkdir(exist_ok=True)
    shards, position = {}, 0
    for shard in SHARDS:
        last = shard == candidates.SINGLE_ROW_SHARD
        size = SINGLE_ROW_TOKENS if last else ROWS * ROW_TOKENS
        tokens = held_out[position : position + size].astype(np.int32)
        assert len(tokens) == size, "not enough held-out text"
        shards[shard] = tokens if last else tokens.reshape(ROWS, ROW_TOKENS)
        save_file({"tokens": shards[shard]}, HERE / "shards" / f"shard_{shard:06}.safetensors")
        position += size
    return shards


def write_candidates(cases):
    folder = HERE / "candidates"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for case in cases:
        (HERE / case.file).write_bytes(case.body)


def describe(checkpoint):
    return {
        "name": "tinylm",
        "version": candidates.VERSION,
        "window": reference.WINDOW,
        "windows_per_row": reference.WINDOWS_PER_ROW,
        "vocab": tinylm.VOCAB,
        "parameters": sum(weight.size for weight in checkpoint.values()),
        "weights_id": reference.weights_id(checkpoint),
    }


def check_logits(exports, checkpoint, held_out):
    """Both graphs give PyTorch's logits, for more than the shape they were exported with."""
    model = tinylm.load(checkpoint)
    for batch, seq in ((1, 128), (5, 128), (3, 50)):
        tokens = held_out[: batch * seq].reshape(batch, seq)
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)).numpy()
        for name, export in exports.items():
            worst = np.abs(export.logits(checkpoint, tokens) - expected).max()
            print(f"{name} {batch}x{seq}: logits within {worst:.1e} of PyTorch")
            assert worst < 1e-4


class Table:
    """Expected values, each checked against ONNX Runtime on both exports as it is made."""

    def __init__(self, checkpoint, shards, exports):
        self.checkpoint, self.shards, self.exports = checkpoint, shards, exports
        self.before = {}  # plan digest -> (reference losses, {export: its losses})
        self.worst_loss = self.worst_delta = 0.0

    def plan(self, nonce, shards, label_shift):
        return reference.plan(self.shards, shards or sorted(self.shards), nonce, label_shift)

    def baseline_losses(self, plan):
        if plan.digest not in self.before:
            self.before[plan.digest] = (reference.losses(self.checkpoint, plan), self.runtime(self.checkpoint, plan))
        return self.before[plan.digest]

    def runtime(self, weights, plan):
        return {name: export.losses(weights, plan) for name, export in self.exports.items()}

    def baseline(self, nonce="", shards=None, label_shift=1):
        plan = self.plan(nonce, shards, label_shift)
        losses, runtime = self.baseline_losses(plan)
        self.compare_losses(losses, runtime)
        asked = {"nonce": nonce, "shards": shards, "label_shift": label_shift}
        return asked | counts(plan) | {"loss": float(losses.mean()), "losses": losses.tolist()}

    def case(self, case):
        keys = ("name", "kind", "file", "semantics", "learning_rate", "model_version", "nonce", "shards", "label_shift")
        job = {key: getattr(case, key) for key in keys} | {"sha256": case.sha256, "size": case.size}
        job["format"] = "binary_v2"
        return job | {"expect": self.refused(case) if case.code else self.scored(case)}

    def scored(self, case):
        entries = binary_v2.decode(case.body)
        plan = self.plan(case.nonce, case.shards, case.label_shift)
        updated, effective = reference.update(self.checkpoint, entries, case.semantics, case.learning_rate)
        assert all(np.isfinite(weight).all() for weight in updated.values()), case.name
        before, before_runtime = self.baseline_losses(plan)
        after, after_runtime = reference.losses(updated, plan), self.runtime(updated, plan)
        self.compare_losses(after, after_runtime)
        figures = reference.score(before, after)
        for name in self.exports:
            measured = (before_runtime[name] - after_runtime[name]).mean()
            self.worst_delta = max(self.worst_delta, abs(measured - figures["delta"]))
        check_kind(case, figures, effective)
        measures = {
            "tensors": len(entries),
            "entries": sum(len(indices) for indices, _ in entries.values()),
            "effective_entries": effective,
            "l2_norm": reference.l2_norm(entries),
        }
        return {"status": "scored"} | figures | counts(plan) | measures

    def refused(self, case):
        if case.code == "non_finite_loss":
            self.check_non_finite(case)
        return {"status": case.status, "code": case.code}

    def check_non_finite(self, case):
        """Finite weights, and no window of either export, or of PyTorch, with a finite loss."""
        plan = self.plan(case.nonce, case.shards, case.label_shift)
        updated, _ = reference.update(self.checkpoint, binary_v2.decode(case.body), case.semantics, None)
        assert all(np.isfinite(weight).all() for weight in updated.values())
        computed = [*self.runtime(updated, plan).values(), reference.losses(updated, plan, torch.float32)]
        assert not any(np.isfinite(losses).any() for losses in computed)

    def compare_losses(self, expected, runtime):
        for losses in runtime.values():
            worst = abs(losses.mean() - expected.mean())
            assert worst < TOLERANCE, worst
            self.worst_loss = max(self.worst_loss, worst)


def counts(plan):
    return {"windows": len(plan.chunks), "tokens": plan.tokens, "plan": plan.digest}


def check_kind(case, figures, effective):
    """A candidate that does not do what its kind says is a bad test: stop."""
    delta = figures["delta"]
    if case.kind in ("honest gradient", "training difference"):
        assert delta > 0, (case.name, delta)
    if case.kind == "inverted":
        assert delta < 0, (case.name, delta)
    assert (case.kind == "zero") == (effective == 0), case.name
    assert case.kind != "zero" or delta == 0.0, case.name


def report(document, table, exports):
    for case in document["cases"]:
        expect = case["expect"]
        print(f"{case['name']:32} {case['kind']:20} {expect.get('delta', expect.get('code'))}")
    print(Counter(case["kind"] for case in document["cases"]), len(document["cases"]))
    print("baseline", document["baselines"][0]["loss"], "parameters", document["model"]["parameters"])
    print(f"ONNX Runtime against the reference: loss within {table.worst_loss:.2e}, delta within {table.worst_delta:.2e}")
    for name, export in exports.items():
        print(name)
        for tensor, places in export.places.items():
            print(f"  {tensor}: " + ", ".join(i + (" (transposed)" if t else "") for i, t in places))


if __name__ == "__main__":
    main()
