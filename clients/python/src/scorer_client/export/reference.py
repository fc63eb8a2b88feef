"""Torch's own losses on the windows of the shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from scorer_client.console import counted
from scorer_client.export import shards
from scorer_client.export.safetensors_file import Tensor
from scorer_client.export.steps import Problem
from scorer_client.export.tasks import Task
from scorer_client.export.windows import starts

BATCH = 8
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def loss(model: Any, folder: Path, task: Task, window: int, each: int = 1) -> float:
    """The unweighted mean over all windows, as `scorer validate` measures it."""
    with torch.inference_mode():
        if task is Task.CAUSAL_LM:
            found = [_window_losses(model, batch) for batch in token_batches(folder, window, each)]
        else:
            found = [_row_losses(model, batch) for batch in example_batches(folder)]
    mean = torch.cat(found).double().mean().item()
    if mean != mean or mean in (float("inf"), float("-inf")):
        raise Problem(f"torch's own loss is {mean}", "check the weights and --dtype: float16 ends at 65504")
    return float(mean)


def samples(folder: Path, task: Task, window: int, tokens_name: str) -> dict[str, Any]:
    """Two rows to trace the model with; with one, the exporter would take the batch for a constant."""
    if task is Task.CAUSAL_LM:
        return {tokens_name: torch.zeros((2, window), dtype=torch.int64)}
    first = next(example_batches(folder))
    return {name: torch.cat([column, column])[:2] for name, column in first.items()}


def token_batches(folder: Path, window: int, each: int = 1) -> Iterator[Any]:
    """`each` windows of a row: chunks of window + 1 tokens, in the order of the plan."""
    chunks = []
    for shard, tensors in shards.read(folder):
        rows = _tensor(tensors["tokens"]).long()
        rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
        for number, row in enumerate(rows):
            chunks += [row[start : start + window + 1] for start in starts(shard, number, len(row), window, each)]
    for start in range(0, len(chunks), BATCH):
        yield torch.stack(chunks[start : start + BATCH])


def example_batches(folder: Path) -> Iterator[Mapping[str, Any]]:
    for _, tensors in shards.read(folder):
        columns = {name: _tensor(tensor) for name, tensor in sorted(tensors.items())}
        rows = min(len(column) for column in columns.values())
        for start in range(0, rows, BATCH):
            yield {name: column[start : start + BATCH] for name, column in columns.items()}


def _window_losses(model: Any, chunks: Any) -> Any:
    logits = model(chunks[:, :-1])
    if logits.dim() != 3:
        raise Problem(f"the model returns {list(logits.shape)}", "return logits [batch, seq, vocab]")
    each = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), chunks[:, 1:], reduction="none")
    return each.double().mean(1)


def _row_losses(model: Any, columns: Mapping[str, Any]) -> Any:
    losses = model(**columns)
    rows = len(next(iter(columns.values())))
    if not isinstance(losses, torch.Tensor) or list(losses.shape) != [rows]:
        shape = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise Problem(f"the model returns {shape} for {counted(rows, 'row')}", "return the loss of each row, [batch]: reduction='none'")
    return losses


def _tensor(tensor: Tensor) -> Any:
    return torch.frombuffer(bytearray(tensor.data), dtype=TYPES[tensor.dtype]).view(tensor.shape)
