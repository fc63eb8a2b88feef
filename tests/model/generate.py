"""Makes everything in this directory; see README.md.

    python generate.py [--checkpoint weights.pt] [--out DIR]
"""

import argparse
import hashlib
import json
import pathlib

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from generator import candidates, corpus, graphs, reference, scoring, tinylm, training

SHARD_IDS = range(59_996, 60_001)
FLAT_SHARD = 59_998  # the one that is a single 1-D row
AGREEMENT = 1e-6  # ONNX Runtime in float32 against the float64 reference, mean loss


def main():
    here = pathlib.Path(__file__).parent
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--checkpoint", type=pathlib.Path, help="trained weights to reuse: .safetensors, or .pt")
    options.add_argument("--save-trained", type=pathlib.Path, help="keep freshly trained weights here")
    options.add_argument("--out", type=pathlib.Path, default=here)
    options = options.parse_args()

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    out = options.out
    text, held_out = corpus.load()
    checkpoint = weights(options, text)
    save_file(checkpoint, out / "checkpoint.safetensors")
    shards = write_shards(held_out, out)
    named = graphs.export(checkpoint, out / "graph-named.onnx", optimize=False)
    graphs.assert_named(named, checkpoint)
    graphs.export(checkpoint, out / "graph-folded.onnx", optimize=True)
    runtimes = {name: graphs.Graph(out / f"{name}.onnx", checkpoint) for name in ("graph-named", "graph-folded")}
    for name, graph in runtimes.items():
        places = [place for where in graph.places.values() for place in where]
        print(f"{name}: {len(places)} places, {sum(transposed for _, transposed in places)} transposed")

    found = candidates.everything(checkpoint, text)
    worst = write_cases(checkpoint, shards, found, runtimes, out)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600
    print(f"{len(found)} cases; ONNX Runtime is within {worst:.3g} of the reference")


def weights(options, text):
    source = options.checkpoint
    if source is None:
        checkpoint = tinylm.checkpoint_of(training.train(text, print))
        if options.save_trained:
            save_file(checkpoint, options.save_trained)
        return checkpoint
    if source.suffix == ".safetensors":
        loaded = load_file(source)
        # A file lists its tensors by name; noise is drawn in the model's own order.
        return {name: loaded[name] for name in tinylm.checkpoint_of(tinylm.TinyLM())}
    return torch.load(source, weights_only=False)  # our own file, a dict of numpy arrays


def write_shards(held_out, out):
    (out / "shards").mkdir(exist_ok=True)
    shards, position = {}, 0
    for shard in SHARD_IDS:
        shape = (3000,) if shard == FLAT_SHARD else (4, 600)
        size = int(np.prod(shape))
        shards[shard] = held_out[position : position + size].astype(np.int32).reshape(shape)
        position += size
        save_file({"tokens": shards[shard]}, out / "shards" / f"shard_{shard:06}.safetensors")
    return shards


def write_cases(checkpoint, shards, found, runtimes, out):
    """Scores each sound candidate, checks it in both graphs, and returns the worst difference seen."""
    (out / "candidates").mkdir(exist_ok=True)
    gaps, cases = [], []

    def compare(weights, windows, expected):
        for name, graph in runtimes.items():
            gap = abs(float(graph.losses(weights, windows).mean()) - expected)
            assert gap < AGREEMENT, (name, gap)
            gaps.append(gap)

    baselines = []
    for nonce, ids, shift in (("", None, 1), ("epoch-12/ü:3", None, 1), ("", [60000, 59996], 1), ("", None, 2)):
        windows = scoring.Windows(shards, tinylm.CONTEXT, nonce, ids, shift)
        losses = reference.losses(checkpoint, windows)
        compare(checkpoint, windows, losses.mean())
        baselines.append(
            {"nonce": nonce, "shards": ids, "label_shift": shift, **windows.describe()}
            | {"loss": float(losses.mean()), "losses": losses.tolist()}
        )

    for candidate in found:
        file = f"candidates/{candidate.name}.json"
        (out / file).write_bytes(candidate.body)
        job, digest = candidate.job, hashlib.sha256(candidate.body).hexdigest()
        windows = scoring.Windows(shards, tinylm.CONTEXT, job["nonce"], job["shards"], job["label_shift"])
        if candidate.code is None:
            how = (candidate.update, candidate.semantics, candidate.learning_rate)
            expect = reference.score(checkpoint, *how, windows)
            check_kind(candidate, expect)
            compare(scoring.apply(checkpoint, *how), windows, expect["loss_after"])
        else:
            failed = candidate.code == "model_version_unavailable"
            expect = {"status": "failed" if failed else "rejected", "code": candidate.code}
        if candidate.code == "candidate_digest_mismatch":
            digest = hashlib.sha256(b"other bytes").hexdigest()
        if candidate.code == "non_finite_loss":
            huge = checkpoint | {candidates.NORM: checkpoint[candidates.NORM] + np.float32(3e38)}
            assert np.isfinite(huge[candidates.NORM]).all()
            for graph in runtimes.values():
                assert not np.isfinite(graph.losses(huge, windows)).any()
        cases.append(
            {"name": candidate.name, "kind": candidate.kind, "file": file, "format": "binary_v2"}
            | {"semantics": candidate.semantics, "learning_rate": candidate.learning_rate, **job}
            | {"sha256": digest, "size": len(candidate.body), "expect": expect}
        )

    model = {
        "name": "tinylm",
        "version": candidates.VERSION,
        "window": tinylm.CONTEXT,
        "windows_per_row": 1,
        "vocab": tinylm.VOCAB,
        "parameters": sum(weight.size for weight in checkpoint.values()),
        "weights_id": scoring.weights_id(checkpoint),
    }
    document = {"model": model, "baselines": baselines, "cases": cases}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "cases.json").write_text(text + "\n", encoding="utf-8")
    return max(gaps)


def check_kind(candidate, expect):
    """A case must show what its kind says, or it is not worth keeping."""
    delta = expect["delta"]
    print(f"{candidate.name:28} {delta:+.6f} ± {expect['stderr'] or 0:.6f}  {len(candidate.body):6} bytes")
    if candidate.kind in ("honest gradient", "training difference"):
        assert delta > 0.0, candidate.name
    elif candidate.kind == "inverted":
        assert delta < 0.0, candidate.name
    elif candidate.kind == "zero":
        assert delta == 0.0 and expect["effective_entries"] == 0, candidate.name


if __name__ == "__main__":
    main()
