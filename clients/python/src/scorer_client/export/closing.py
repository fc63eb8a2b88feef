"""What an export says at its end."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scorer_client.console import counted
from scorer_client.export.proof import Proof

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Closing:
    """`commands` are the next three: check, run a worker, submit a candidate."""

    out: Path
    name: str
    version: int
    task: str
    dtype: str
    window: int | None
    windows: int
    tensors: int
    parameters: int
    sizes: Mapping[str, int]
    canary: Mapping[str, float]
    proof: Proof
    notes: Sequence[str]
    commands: Sequence[str]
    seconds: Mapping[str, float]

    def text(self) -> str:
        graph = sum(size for file, size in self.sizes.items() if file.startswith("model.onnx"))
        shards = sum(size for file, size in self.sizes.items() if file.startswith("shards/"))
        window = "" if self.window is None else f" of {counted(self.window, 'token')}"
        tensors, parameters = counted(self.tensors, "trainable tensor"), counted(self.parameters, "parameter")
        lines = [
            f"{self.out}: {self.name} version {self.version}, {self.task}, {self.dtype}, {readable(self.sizes['total'])}",
            f"  {tensors} with {parameters}; {counted(self.windows, 'window')}{window}",
            f"  graph {readable(graph)}, weights {readable(self.sizes['weights.safetensors'])}, shards {readable(shards)}",
            f"  canary: loss {self.canary['loss']:.6f} ± {self.canary['tolerance']:g}",
            f"  {self.proof.baseline}",
            f"  {self.proof.updated}",
            *(f"  {note}" for note in self.notes),
            f"  {sum(self.seconds.values()):.1f} s",
            "Next:",
            *(f"  {command}" for command in self.commands),
        ]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def next_commands(scorer: str, out: Path, provider: str, candidate: Path | None) -> list[str]:
    program, package = shlex.quote(scorer), shlex.quote(f"model.dir={out}")
    engine = f"--set {package} --set engine.execution_provider={provider}"
    update = "update.safetensors" if candidate is None else shlex.quote(str(candidate))
    return [
        f"{program} check {engine}",
        f"{program} run {engine}",
        f"{program} submit --set {package} --candidate {update} --format safetensors --semantics param_diff --wait",
    ]


def readable(size: int) -> str:
    number, unit = float(size), 0
    while number >= 1000 and unit + 1 < len(UNITS):
        number, unit = number / 1000, unit + 1
    return f"{size} B" if unit == 0 else f"{number:.1f} {UNITS[unit]}"
