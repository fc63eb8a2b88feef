"""What the contract says a score is: windows, plan, the update, the statistics; for every model here.

Weights are updated in float32, each operation rounded, and rounded once more to their own type;
everything after is float64.
"""

import hashlib
import math

import numpy as np
from scipy import stats


def weights_id(checkpoint):
    whole = hashlib.sha256()
    for name in sorted(checkpoint):
        whole.update(hashlib.sha256(name.encode()).digest())
        whole.update(hashlib.sha256(raw(checkpoint[name])).digest())
    return whole.hexdigest()


def raw(weight):
    """The bytes as safetensors stores them, which is how a little-endian machine has them."""
    return np.ascontiguousarray(weight).tobytes()


def plan(entries):
    """Hex SHA-256 of (shard, row, start, length, label shift) of each window, in order."""
    whole = hashlib.sha256()
    for entry in entries:
        for value, size in zip(entry, (8, 4, 8, 4, 1), strict=True):
            whole.update(int(value).to_bytes(size, "big"))
    return whole.hexdigest()


class Windows:
    """The windows that a job reads, in the contract's order, and their plan."""

    def __init__(self, shards, length, nonce="", ids=None, shift=1, per_row=1):
        chunks, entries = [], []
        for shard in sorted(shards) if ids is None else ids:
            for row, tokens in enumerate(np.atleast_2d(shards[shard])):
                numel = len(tokens)
                if numel < length + 1:
                    continue
                for k in range(per_row):
                    key = hashlib.sha256(f"{nonce}:{shard}:{row}:{k}:{numel}:{length}".encode()).digest()
                    start = int.from_bytes(key[:8], "big") % (numel - length)
                    chunks.append(tokens[start : start + length + 1])
                    entries.append((shard, row, start, length, shift))
        self.chunks = np.stack(chunks).astype(np.int64)
        self.plan = plan(entries)
        self.inputs, self.targets = self.chunks[:, :length], self.chunks[:, shift:]

    def describe(self):
        return {"windows": len(self.chunks), "tokens": self.targets.size, "plan": self.plan}

    def losses(self, logits):
        """Mean negative log-likelihood of each window, in float64."""
        return negative_log_likelihood(logits[:, : self.targets.shape[1]], self.targets).mean(-1)


def negative_log_likelihood(logits, targets):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def apply(checkpoint, update, semantics, learning_rate):
    after = {name: weight.copy() for name, weight in checkpoint.items()}
    for name, (values, indices) in update.items():
        flat, step = after[name].reshape(-1), values.astype(np.float32)
        wide = flat[indices].astype(np.float32)
        wide = wide - np.float32(learning_rate) * step if semantics == "gradient" else wide + step
        with np.errstate(over="ignore"):
            flat[indices] = wide.astype(flat.dtype)
    return after


def summary(before, after, windows, checkpoint, updated, update):
    """The block of a scored result, from the two losses of each window."""
    difference, n = before - after, len(before)
    delta, stderr, ci95 = float(difference.mean()), None, None
    if n > 1:
        stderr = float(difference.std(ddof=1) / math.sqrt(n))
        reach = float(stats.t.ppf(0.975, n - 1)) * stderr
        ci95 = [delta - reach, delta + reach]
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
        "effective_entries": sum(changed(checkpoint[name], updated[name]) for name in checkpoint),
        "l2_norm": math.sqrt(squares),
    }


def changed(before, after):
    """How many entries have other bits."""
    bits = f"u{before.dtype.itemsize}"
    return int((before.view(bits) != after.view(bits)).sum())
