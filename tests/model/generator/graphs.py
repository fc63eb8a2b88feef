"""The two ONNX graphs, and a check that ONNX Runtime agrees with the reference."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from . import tinylm


def export(checkpoint, path, optimize):
    """optimize=False keeps every parameter as an initializer; True folds and renames them."""
    model = tinylm.load(checkpoint)
    program = torch.onnx.export(
        model,
        (torch.zeros((2, tinylm.CONTEXT), dtype=torch.int64),),
        dynamo=True,
        optimize=optimize,
        input_names=["tokens"],
        output_names=["logits"],
        dynamic_shapes={"tokens": {0: torch.export.Dim("batch")}},
        external_data=False,
        verbose=False,
    )
    proto = program.model_proto
    strip(proto)
    rename(proto.graph, "lm_head.weight", "model.embed_tokens.weight")
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return proto


def strip(proto):
    """Drops stack traces and local paths: they are a third of the file and differ by machine."""
    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for function in proto.functions:
        for item in (function, *function.node, *function.value_info):
            item.ClearField("metadata_props")
            item.ClearField("doc_string")


def rename(graph, old, new):
    """The exporter names a tied tensor after its last use; the checkpoint after its first."""
    names = {tensor.name for tensor in graph.initializer}
    if old not in names or new in names:
        return
    for item in (*graph.initializer, *graph.value_info):
        if item.name == old:
            item.name = new
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def places(proto, checkpoint):
    """name -> [(initializer position, transposed)], by contents."""
    found = {name: [] for name in checkpoint}
    for position, tensor in enumerate(proto.graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.dtype != np.float32:
            continue
        for name, weight in checkpoint.items():
            if np.array_equal(array, weight):
                found[name].append((position, False))
            elif weight.ndim == 2 and np.array_equal(array, weight.T):
                found[name].append((position, True))
    missing = [name for name, where in found.items() if not where]
    if missing:
        raise SystemExit(f"not in the graph: {missing}")
    return found


class Graph:
    """A graph whose weights can be replaced, run by ONNX Runtime in float32."""

    def __init__(self, path, checkpoint):
        self.proto = onnx.load(path)
        self.places = places(self.proto, checkpoint)

    def losses(self, checkpoint, windows):
        patched = onnx.ModelProto()
        patched.CopyFrom(self.proto)
        for name, where in self.places.items():
            for position, transposed in where:
                tensor = patched.graph.initializer[position]
                weight = checkpoint[name].T if transposed else checkpoint[name]
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), tensor.name))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(patched.SerializeToString(), options, ["CPUExecutionProvider"])
        with np.errstate(all="ignore"):
            return windows.losses(session.run(["logits"], {"tokens": windows.inputs})[0])


def assert_named(proto, checkpoint):
    """graph-named: each tensor once, under its own name and shape, and the head shares the embedding."""
    initializers = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    for name, weight in checkpoint.items():
        assert initializers.get(name) == weight.shape, (name, initializers.get(name))
    for name, where in places(proto, checkpoint).items():
        assert len(where) == 1, (name, where)
