"""The ONNX graph of a wrapped model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from scorer_client.export import wrapper
from scorer_client.export.quiet import quiet
from scorer_client.export.steps import tell
from scorer_client.export.tasks import Task

PREFIX = "m."  # Of all names in a wrapped model.
# What `scorer package` reads of the exporter's remarks. The others are most of the file, and hold paths of this machine.
REMARKS = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node")


def export(model: Any, samples: Mapping[str, Any], task: Task, names: Mapping[str, str], path: Path) -> None:
    """Writes the graph, and its weights beside it. The batch is free; every other size is that of the samples."""
    path.parent.mkdir()
    output = "logits" if task is Task.CAUSAL_LM else "loss"
    with quiet():
        try:
            program = traced(model, samples, output)
        except torch.onnx.OnnxExporterError:
            if not wrapper.make_plain(model):
                raise
            tell("    torch cannot export the model as it is; exporting its plain form, which computes the same")
            program = traced(model, samples, output)
        graph = program.model.graph
        for name, value in list(graph.initializers.items()):
            prefix = PREFIX if isinstance(model, wrapper.Wrapped) else ""
            live = name.removeprefix(prefix)
            if live in names:
                value.name = prefix + names[live]
        for node in graph.all_nodes():
            for key in [key for key in node.metadata_props if key not in REMARKS]:
                del node.metadata_props[key]
        if output == "loss":
            # The exporter takes the cross entropy of each row (reduction="none") for a single number.
            graph.outputs[0].shape = onnx_ir.Shape(["batch"])
        program.save(path, external_data=True)


def traced(model: Any, samples: Mapping[str, Any], output: str) -> Any:
    """Nothing is optimised: that merges and folds weights, which candidates could not change then, and ONNX Runtime
    optimises by itself."""
    batch = torch.export.Dim("batch")
    return torch.onnx.export(
        model,
        kwargs=dict(samples),
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=list(samples),
        output_names=[output],
        dynamic_shapes={name: {0: batch} for name in samples},
    )
