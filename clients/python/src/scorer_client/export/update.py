"""A random sparse update of every trainable tensor, as a candidate and as torch adds it."""

from collections.abc import Mapping
from typing import Any

import torch

from scorer_client import candidates
from scorer_client.export.checkpoint import Checkpoint, Update

SEED = 22
SCALES = (1.0, 4.0, 16.0)  # The first that moves the loss by more than a comparison can miss.
SHARE, MOST = 8, 4096  # One entry in eight, at most so many of a tensor.
LEAST_STEP = 0.02  # For tensors whose values are all alike, such as new norms and biases.


def random_update(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], scale: float) -> dict[str, tuple[Any, Any]]:
    """Steps of `scale` times the tensor's own spread. A step is a multiple of 2^-12, so that every format holds it exactly."""
    chance = torch.Generator().manual_seed(SEED)
    update = {}
    for name in sorted(shapes):
        tensor = checkpoint.tensor(name).view(-1)[: 1 << 20].float()
        count = min(max(1, _numel(shapes[name]) // SHARE), MOST)
        indices = torch.randint(_numel(shapes[name]), (count,), generator=chance).unique()
        spread = float(tensor.std()) if len(tensor) > 1 else 0.0
        step = scale * max(spread, LEAST_STEP) * torch.randn(len(indices), generator=chance)
        update[name] = (indices, step.mul(4096).round().div(4096))
    return update


def candidate(update: Update, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    return candidates.safetensors({name: (shapes[name], *entries) for name, entries in update.items()})


def entries(update: Update) -> int:
    return sum(len(indices) for indices, _ in update.values())


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
