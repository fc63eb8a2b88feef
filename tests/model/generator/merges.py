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
# Id, candidate, weight and rate of each member; without a rate the values are differences. Two of the first merge are equal.
MERGES = (
    (
        ("a", "inverted", 0.5, 1.0),
        ("b", "gradient", 0.25, 1.0),
        ("c", "gradient-small-steps", -0.3, 1.0),
        ("d", "gradient", 0.25, 1.0),
    ),
    (
        ("x", "difference-f16", 0.4, None),
        ("y", "difference-ties", 0.7, None),
        ("z", "difference-no-effect", 0.9, None),
    ),
)


def main():
    shards = {int(path.stem.split("_")[1]): load_file(path)["tokens"] for path in (FOLDER / "shards").iterdir()}
    windows = scoring.Windows(shards, half.WINDOW)
    merges = []
    for precision in half.PRECISIONS:
        checkpoint = load_file(FOLDER / precision.checkpoint)
        for asked in MERGES:
            members = [(key, f"{precision.name}-{name}", *rest) for key, name, *rest in asked]
            found = merge(FOLDER, checkpoint, members, lambda weights: half.reference(weights, windows))
            merges.append({"graph": precision.graph, "checkpoint": precision.checkpoint} | found)
    small.write_table({"merges": merges}, FOLDER / "merges.json")


def merge(folder, checkpoint, members, losses_of):
    """What the members do; `losses_of` gives the losses of the windows with other weights."""
    updates = {name: read(folder / f"candidates/{name}.json") for _, name, _, _ in members}

    def losses(chosen):
        steps = [(weight * (1.0 if rate is None else -rate), updates[name]) for _, name, weight, rate in chosen]
        return losses_of(applied(checkpoint, steps))

    before, joint = losses(()), losses(members)
    expected = []
    for at, member in enumerate(members):
        alone, last = before - losses([member]), losses(members[:at] + members[at + 1 :]) - joint
        both = (alone + last) / 2
        stderr = both.std(ddof=1) / np.sqrt(len(both))
        means = {"alone": alone.mean(), "last": last.mean(), "contribution": both.mean(), "stderr": stderr}
        key, name, weight, rate = member
        described = {
            "id": key,
            "file": f"candidates/{name}.json",
            "weight": weight,
            "semantics": "param_diff" if rate is None else "gradient",
            "learning_rate": rate,
        }
        expected.append(described | {field: float(value) for field, value in means.items()})
    return {"loss_before": float(before.mean()), "loss_after": float(joint.mean()), "members": expected}


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
    if dtype == np.float32:
        return wide.astype(dtype)  # the processor's own rounding; the types below it have casts by way of float32
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
