"""The ONNX graph of a wrapped model."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scorer_client.export.tasks import Task

# What `scorer package` reads of the exporter's remarks. The others are most of the file, and hold paths of this machine.
REMARKS = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node")


def export(model: Any, samples: Mapping[str, Any], task: Task, names: Mapping[str, str], path: Path) -> None:
    """Writes the graph, and its weights beside it. The batch is free; every other size is that of the samples.

    Nothing is optimised: that merges and folds weights, which candidates could not change then, and ONNX Runtime
    optimises by itself.
    """
    path.parent.mkdir()
    batch = torch.export.Dim("batch")
    with quiet():
        program = torch.onnx.export(
            model,
            kwargs=dict(samples),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(samples),
            output_names=["logits" if task is Task.CAUSAL_LM else "loss"],
            dynamic_shapes={name: {0: batch} for name in samples},
        )
        graph = program.model.graph
        for name, value in list(graph.initializers.items()):
            if name in names:
                value.name = names[name]
        for node in graph.all_nodes():
            for key in [key for key in node.metadata_props if key not in REMARKS]:
                del node.metadata_props[key]
        program.save(path, external_data=True)


@contextlib.contextmanager
def quiet() -> Any:
    """The exporter warns of much that does not concern its caller; its errors are exceptions."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        yield
