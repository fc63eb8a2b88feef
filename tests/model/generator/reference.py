"""What the contract says a score is: windows, plan, loss, the update, the statistics.

Weights are updated in float32, each operation rounded; everything after is float64.
"""

import hashlib
import math

import numpy as np
import torch
from scipy import stats

from . import tinylm

L = tinylm.CONTEXT


def weights_id(checkpoint):
    whole = hashlib.sha256()
    for name in sorted(checkpoint):
        whole.update(hashlib.sha256(name.encode()).digest())
        whole.update(hashlib.sha256(checkpoint[name].astype("<f4").tobytes()).digest())
    return whole.hexdigest()


class Windows:
    """The windows that a job reads, in the contract's order, and their plan."""

    def __init__(self, shards, nonce="", ids=None, shift=1):
        self.shift = shift
        chunks, plan = [], hashlib.sha256()
        for shard in sorted(shards) if ids is None else ids:
            for row, tokens in enumerate(np.atleast_2d(shards[shard])):
                numel = len(tokens)
                if numel < L + 1:
                    continue
                key = hashlib.sha256(f"{nonce}:{shard}:{row}:0:{numel}:{L}".encode()).digest()
                start = int.from_bytes(key[:8], "big") % (numel - L)
                chunks.append(tokens[start : start + L + 1])
                for value, size in ((shard, 8), (row, 4), (start, 8), (L, 4), (shift, 1)):
                    plan.update(value.to_bytes(size, "big"))
        self.chunks = np.stack(chunks).astype(np.int64)
        self.plan = plan.hexdigest()
        self.inputs, self.targets = self.chunks[:, :L], self.chunks[:, shift:]

    def describe(self):
        return {"windows": len(self.chunks), "tokens": self.targets.size, "plan": self.plan}

    def losses(self, logits):
        """Mean negative log-likelihood of each window, in float64."""
        logits = logits[:, : self.targets.shape[1]].astype(np.float64)
        logits = logits - logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, self.targets[..., None], -1)[..., 0]
        return (np.log(np.exp(logits).sum(-1)) - chosen).mean(-1)


def losses(checkpoint, windows):
    with torch.no_grad():
        logits = tinylm.load(checkpoint, torch.float64)(torch.from_numpy(windows.inputs))
    return windows.losses(logits.numpy())


def apply(checkpoint, update, semantics, learning_rate):
    after = {name: weight.copy() for name, weight in checkpoint.items()}
    for name, (values, indices) in update.items():
        flat, step = after[name].reshape(-1), values.astype(np.float32)
        if semantics == "gradient":
            flat[indices] = flat[indices] - np.float32(learning_rate) * step
        else:
            flat[indices] = flat[indices] + step
    return after


def score(checkpoint, update, semantics, learning_rate, windows):
    updated = apply(checkpoint, update, semantics, learning_rate)
    before, after = losses(checkpoint, windows), losses(updated, windows)
    difference, n = before - after, len(before)
    delta, stderr, ci95 = float(difference.mean()), None, None
    if n > 1:
        stderr = float(difference.std(ddof=1) / math.sqrt(n))
        reach = float(stats.t.ppf(0.975, n - 1)) * stderr
        ci95 = [delta - reach, delta + reach]
    changed = sum(int((updated[t].view(np.uint32) != checkpoint[t].view(np.uint32)).sum()) for t in checkpoint)
    squares = sum(float((values.astype(np.float64) ** 2).sum()) for values, _ in update.values())
    return {
        "status": "scored",
        "loss_before": float(before.mean()),
        "loss_after": float(after.mean()),
        "delta": delta,
        "score": max(0.0, delta),
        "stderr": stderr,
        "ci95": ci95,
        **windows.describe(),
        "tensors": len(update),
        "entries": sum(len(values) for values, _ in update.values()),
        "effective_entries": changed,
        "l2_norm": math.sqrt(squares),
    }
