"""The float64 reference of tinylm; what it shares with the other models is in scoring.py."""

import torch

from . import scoring, tinylm


def losses(checkpoint, windows):
    with torch.no_grad():
        logits = tinylm.load(checkpoint, torch.float64)(torch.from_numpy(windows.inputs))
    return windows.losses(logits.numpy())


def score(checkpoint, update, semantics, learning_rate, windows):
    updated = scoring.apply(checkpoint, update, semantics, learning_rate)
    before, after = losses(checkpoint, windows), losses(updated, windows)
    return scoring.summary(before, after, windows, checkpoint, updated, update)
