"""Training, and the gradients and optimiser steps that honest candidates are made of."""

import numpy as np
import torch
from torch.nn import functional as F

from . import tinylm

STEPS = 1200
BATCH = 32
PEAK_RATE = 4e-3
WARMUP = 100
SEED = 20_260_101


def batches(tokens, rows, rng):
    """An endless stream of [rows, CONTEXT+1] random windows."""
    span = np.arange(tinylm.CONTEXT + 1)
    while True:
        start = rng.integers(0, len(tokens) - tinylm.CONTEXT, size=rows)
        yield torch.from_numpy(tokens[start[:, None] + span])


def batch_loss(model, chunk, shift=1):
    """Mean negative log-likelihood of the token `shift` ahead, the contract's section 8."""
    logits = model(chunk[:, :-1])
    targets = chunk[:, shift:]
    return F.cross_entropy(logits[:, : targets.shape[1]].flatten(0, 1), targets.flatten())


def train(tokens, report):
    """A trained model: AdamW, linear warm-up, then a decay that ends well above zero.

    Stopping on a high rate leaves the model short of its minimum: honest gradients still help.
    """
    torch.manual_seed(SEED)
    model = tinylm.TinyLM()
    tinylm.initialise(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    stream = batches(tokens, BATCH, np.random.default_rng(SEED))
    for step in range(STEPS):
        decay = 1.0 - 0.8 * step / STEPS
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * min((step + 1) / WARMUP, decay)
        loss = batch_loss(model, next(stream))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == STEPS - 1:
            report(f"step {step:5d}  training loss {loss.item():.4f}")
    return model.eval()


def gradients(checkpoint, tokens, seed, rows=256, shift=1):
    """name -> float32 gradient of the mean loss over `rows` training windows."""
    model = tinylm.load(checkpoint)
    chunk = next(batches(tokens, rows, np.random.default_rng(seed)))
    batch_loss(model, chunk, shift).backward()
    return {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}


def differences(checkpoint, tokens, seed, steps=4, rate=3e-4, rows=64, shift=1):
    """name -> float32 (trained - checkpoint) after a few real optimiser steps."""
    model = tinylm.load(checkpoint)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    stream = batches(tokens, rows, np.random.default_rng(seed))
    for _ in range(steps):
        optimiser.zero_grad()
        batch_loss(model, next(stream), shift).backward()
        optimiser.step()
    after = tinylm.checkpoint_of(model)
    return {name: after[name] - before for name, before in checkpoint.items()}
