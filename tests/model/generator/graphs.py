"""The two ONNX exports, and ONNX Runtime run on them with any weights put in."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper

from . import reference, tinylm

NAMED = "graph-named.onnx"
FOLDED = "graph-folded.onnx"


def export(checkpoint, folder):
    model = tinylm.load(checkpoint)
    # A batch of 2: a dimension of 1 would be specialised.
    example = torch.zeros((2, tinylm.CONTEXT), dtype=torch.int64)
    names = {"input_names": ["tokens"], "output_names": ["logits"]}
    torch.onnx.export(
        model,
        (example,),
        folder / NAMED,
        dynamo=False,
        do_constant_folding=False,
        opset_version=18,
        dynamic_axes={"tokens": {0: "batch", 1: "seq"}, "logits": {0: "batch", 1: "seq"}},
        **names,
    )
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq", min=2, max=tinylm.CONTEXT)
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: batch, 1: seq},), verbose=False, **names)
    program.save(folder / FOLDED, external_data=False)
    drop_stack_traces(folder / FOLDED)


def drop_stack_traces(path):
    """They hold the paths of whoever exported, and nothing that runs."""
    graph = onnx.load(path)
    for node in graph.graph.node:
        kept = [prop for prop in node.metadata_props if prop.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def place(graph, checkpoint):
    """name -> [(initializer, transposed)]: where each checkpoint tensor lives, by its contents."""
    places = {name: [] for name in checkpoint}
    for initializer in graph.graph.initializer:
        array = numpy_helper.to_array(initializer)
        for name, weight in checkpoint.items():
            if np.array_equal(array, weight):
                places[name].append((initializer.name, False))
            elif np.array_equal(array, weight.T):
                places[name].append((initializer.name, True))
    lost = [name for name, found in places.items() if not found]
    assert not lost, lost
    return places


class Patched:
    """One export whose initializers can be replaced by other weights, a session for each."""

    def __init__(self, path, checkpoint):
        self.proto = onnx.load(path)
        self.places = place(self.proto, checkpoint)
        self.initializers = {one.name: one for one in self.proto.graph.initializer}

    def logits(self, weights, tokens):
        for name, places in self.places.items():
            for initializer, transposed in places:
                array = np.ascontiguousarray(weights[name].T if transposed else weights[name])
                self.initializers[initializer].CopyFrom(numpy_helper.from_array(array, initializer))
        session = onnxruntime.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"tokens": tokens})[0]

    def losses(self, weights, plan):
        """As the contract has a worker do it: float32 log-softmax, float64 sums."""
        logits = self.logits(weights, plan.chunks[:, : reference.WINDOW])
        return reference.window_losses(torch.from_numpy(logits).log_softmax(-1).numpy(), plan)
