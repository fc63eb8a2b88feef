"""Makes ../half/merges.json: what merges of the candidates of `half` do, each coalition computed on its own, in float64.

Run in the folder above, after `python -m generator.half`: `python -m generator.merges`.
"""

import base64
import json
import zlib

import numpy as np
from safetensors.numpy import load_file

from . import half, scoring, small
from .handmade import MODEL

FOLDER = MODEL / "half"
# What the values mean, the rate, and id, candidate and weight of each member; two of the first merge are equal.
MERGES = (
    ("gradient", 1.0, (("a", "inverted", 0.5), ("b", "gradient", 0.25), ("c", "gradient-small-steps", -0.3), ("d", "gradient", 0.25))),
    ("param_diff", None, (("x", "difference-f16", 0.4), ("y", "difference-ties", 0.7), ("z", "difference-no-effect", 0.9))),
)


def main():
    shards = {int(path.stem.split("_")[1]): load_file(path)["tokens"] for path in (FOLDER / "shards").iterdir()}
    windows = scoring.Windows(shards, half.WINDOW)
    merges = [merge(precision, windows, *asked) for precision in half.PRECISIONS for asked in MERGES]
    small.write_table({"merges": merges}, FOLDER / "merges.json")


def merge(precision, windows, semantics, rate, members):
    checkpoint = load_file(FOLDER / precision.checkpoint)
    files = {name: f"candidates/{precision.name}-{name}.json" for _, name, _ in members}
    updates = {name: read(FOLDER / file) for name, file in files.items()}
    scale = 1.0 if rate is None else -rate

    def losses(chosen):
        steps = [(weight * scale, updates[name]) for _, name, weight in chosen]
        return half.reference(applied(checkpoint, steps), windows)

    before, joint = losses(()), losses(members)
    expected = []
    for at, member in enumerate(members):
        alone, last = before - losses([member]), losses(members[:at] + members[at + 1 :]) - joint
        both = (alone + last) / 2
        stderr = both.std(ddof=1) / np.sqrt(len(both))
        means = {"alone": alone.mean(), "last": last.mean(), "contribution": both.mean(), "stderr": stderr}
        name, weight = member[1:]
        described = {"id": member[0], "file": files[name], "weight": weight}
        expected.append(described | {key: float(value) for key, value in means.items()})
    return {
        "graph": precision.graph,
        "checkpoint": precision.checkpoint,
        "semantics": semantics,
        "learning_rate": rate,
        "loss_before": float(before.mean()),
        "loss_after": float(joint.mean()),
        "members": expected,
    }


def read(file):
    """Values and indices by tensor."""
    update = {}
    for name, entry in json.loads(file.read_text()).items():
        if isinstance(entry, dict):
            raw, count = zlib.decompress(base64.b64decode(entry["data"])), entry["k"]
            values = np.dtype("f2" if len(raw) == 6 * count else "f4")
            indices = np.frombuffer(raw, np.int32, count, values.itemsize * count)
            update[name] = (np.frombuffer(raw, values, count).astype(np.float64), indices)
    return update


def applied(checkpoint, steps):
    after = {}
    for name, weight in checkpoint.items():
        total = np.zeros(weight.size)
        for scale, update in steps:
            if name in update:
                values, indices = update[name]
                total[indices] += scale * values
        wide = weight.reshape(-1).astype(np.float64) + total
        after[name] = np.where(total == 0, weight.reshape(-1), nearest(wide, weight.dtype)).reshape(weight.shape)
    return after


def nearest(wide, dtype):
    """The nearest number of the type, of two the even one: looked for among the neighbours, whatever a cast does."""
    near = wide.astype(np.float32).astype(dtype)
    best = near
    for step in (-1, 1):
        other = (near.view(np.uint16).astype(np.int32) + step).astype(np.uint16).view(dtype)
        gain = np.abs(best.astype(np.float64) - wide) - np.abs(other.astype(np.float64) - wide)
        better = (gain > 0) | ((gain == 0) & (other.view(np.uint16) % 2 == 0))
        best = np.where(better, other, best)
    return best


if __name__ == "__main__":
    main()
