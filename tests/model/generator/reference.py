"""The contract's arithmetic, written from its text: windows, plan, update, loss, score.

Updates are float32, as the contract says; the forward pass is float64, so that the table
holds the true loss of the updated weights and not one more rounding of it.
"""

import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student

from . import tinylm

WINDOW = tinylm.CONTEXT
WINDOWS_PER_ROW = 1


@dataclass(frozen=True)
class Plan:
    """The chosen windows: `chunks` [n, WINDOW+1], `digest` names them exactly."""

    chunks: np.ndarray
    digest: str
    shift: int

    @property
    def tokens(self):
        return len(self.chunks) * (WINDOW + 1 - self.shift)


def plan(shards, ids, nonce, shift):
    """Section 8's windows of the shards `ids`, in the order given."""
    chunks, digest = [], hashlib.sha256()
    for shard in ids:
        for row, tokens in enumerate(np.atleast_2d(shards[shard])):
            numel = len(tokens)
            if numel < WINDOW + 1:
                continue
            for k in range(WINDOWS_PER_ROW):
                seed = hashlib.sha256(f"{nonce}:{shard}:{row}:{k}:{numel}:{WINDOW}".encode()).digest()
                start = int.from_bytes(seed[:8], "big") % (numel - WINDOW)
                chunks.append(tokens[start : start + WINDOW + 1])
                digest.update(struct.pack(">QIQIB", shard, row, start, WINDOW, shift))
    return Plan(np.stack(chunks).astype(np.int64), digest.hexdigest(), shift)


def window_losses(log_probabilities, plan):
    """Mean negative log-likelihood of each window; sums in float64."""
    targets = plan.chunks[:, plan.shift :]
    picked = np.take_along_axis(log_probabilities[:, : targets.shape[1]], targets[..., None], axis=-1)
    return -picked[..., 0].astype(np.float64).mean(axis=1)


def losses(weights, plan, dtype=torch.float64):
    """Per-window losses of float32 `weights`; float64 is the truth of the table."""
    model = tinylm.load(weights, dtype)
    with torch.no_grad():
        logits = model(torch.from_numpy(plan.chunks[:, :WINDOW]))
        return window_losses(logits.log_softmax(-1).numpy(), plan)


def update(weights, entries, semantics, learning_rate):
    """(updated weights, entries that changed a weight): each operation once, in float32."""
    updated, effective = dict(weights), 0
    for name, (indices, values) in entries.items():
        flat = weights[name].reshape(-1).copy()
        old, sent = flat[indices], values.astype(np.float32)
        with np.errstate(over="ignore"):
            new = old - np.float32(learning_rate) * sent if semantics == "gradient" else old + sent
        assert new.dtype == np.float32
        flat[indices] = new
        effective += int(np.count_nonzero(new != old))
        updated[name] = flat.reshape(weights[name].shape)
    return updated, effective


def score(before, after):
    """The score block's figures from paired per-window losses."""
    paired = before - after
    delta, n = float(paired.mean()), len(paired)
    stderr = ci95 = None
    if n >= 2:
        stderr = float(paired.std(ddof=1)) / math.sqrt(n)
        half = float(student.ppf(0.975, n - 1)) * stderr
        ci95 = [delta - half, delta + half]
    return {
        "loss_before": float(before.mean()),
        "loss_after": float(after.mean()),
        "delta": delta,
        "score": max(0.0, delta),
        "stderr": stderr,
        "ci95": ci95,
    }


def l2_norm(entries):
    """Of the values as sent, before any learning rate."""
    return math.sqrt(sum(float(np.square(values.astype(np.float64)).sum()) for _, values in entries.values()))


def weights_id(weights):
    """Section 5: SHA-256 over SHA-256(name) ++ SHA-256(bytes), names ascending."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(hashlib.sha256(name.encode()).digest())
        whole.update(hashlib.sha256(weights[name].astype("<f4").tobytes()).digest())
    return whole.hexdigest()
