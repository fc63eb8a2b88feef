"""Makes ../inert: models of which some tensors have no effect on the loss, as people train and export them.

Run by hand in the folder above, `python -m generator.inert`; the results are committed and no test runs this.
It needs onnx, onnxruntime, numpy and safetensors, not torch. The same inputs give the same bytes.

Each takes `x` float32 [batch, 4] and gives `loss` float32 [batch], the mean of squares of what it computes.
"""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from .handmade import MODEL, irregular, save, write

FOLDER = MODEL / "inert"
# The first window goes to the first expert, the others to the second, none to the third.
EXAMPLES = np.array([[1, 0.5, -0.25, 2], [-1, 0.75, 0.5, -0.5], [-2, 0.25, 1, 0.125]], np.float32)


def main():
    onnxruntime.set_default_logger_severity(3)
    (FOLDER / "shards").mkdir(parents=True, exist_ok=True)
    save({"x": EXAMPLES}, FOLDER / "shards" / "shard_000001.safetensors")
    for make in (adapter, gate, steep, normalised, experts, copies):
        make()
    dropping()


def adapter():
    """A fresh LoRA adapter: its second half is zero, so its first has no effect."""
    weights = {
        "base.weight": irregular((4, 4), 3),
        "lora_A.weight": irregular((4, 2), 31),
        "lora_B.weight": np.zeros((2, 4), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "base.weight"], ["straight"]),
        helper.make_node("MatMul", ["x", "lora_A.weight"], ["down"]),
        helper.make_node("MatMul", ["down", "lora_B.weight"], ["up"]),
        helper.make_node("Add", ["straight", "up"], ["y"]),
    ]
    finish("adapter", nodes, weights)


def gate():
    """A residual branch behind a gate that is still zero, as of ReZero; the branch has no effect."""
    weights = {"branch.weight": irregular((4, 4), 5), "alpha": np.zeros(1, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "branch.weight"], ["branch"]),
        helper.make_node("Mul", ["alpha", "branch"], ["gated"]),
        helper.make_node("Add", ["x", "gated"], ["y"]),
    ]
    finish("gate", nodes, weights)


def steep():
    """The same beside a zero that must stay small: 1/128 - margin^2 has no root for a margin of 1/8."""
    weights = {
        "branch.weight": irregular((4, 4), 5),
        "alpha": np.zeros(1, np.float32),
        "margin": np.zeros(4, np.float32),
    }
    limit = numpy_helper.from_array(np.array([1 / 128], np.float32))
    nodes = [
        helper.make_node("MatMul", ["x", "branch.weight"], ["branch"]),
        helper.make_node("Mul", ["alpha", "branch"], ["gated"]),
        helper.make_node("Add", ["x", "gated"], ["open"]),
        helper.make_node("Constant", [], ["limit"], value=limit),
        helper.make_node("Mul", ["margin", "margin"], ["squared"]),
        helper.make_node("Sub", ["limit", "squared"], ["left"]),
        helper.make_node("Sqrt", ["left"], ["root"]),
        helper.make_node("Add", ["open", "root"], ["y"]),
    ]
    finish("steep", nodes, weights)


def normalised():
    """A bias that is taken away again, as a normalisation does after it; here so that not even a last bit stays."""
    weights = {"bias": np.full(4, 0.5, np.float32), "head.weight": irregular((4, 4), 7)}
    nodes = [
        helper.make_node("Add", ["nil", "bias"], ["biased"]),
        helper.make_node("Sub", ["biased", "bias"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["normal"]),
        helper.make_node("MatMul", ["normal", "head.weight"], ["y"]),
    ]
    finish("normalised", nodes, weights, {"nil": np.zeros(1, np.float32)})


def experts():
    """Each window goes to one of three experts, weighted by how sure the router is; the third is never chosen."""
    weights = {
        "router.weight": np.array([[4, -4, 0], [1, 0.5, 0], [0, 1, 0.5], [0.25, 0, 0]], np.float32),
        "router.bias": np.array([0, 0, -20], np.float32),
        **{f"experts.{e}.weight": irregular((4, 4), 11 + 2 * e) for e in range(3)},
    }
    nodes = [
        helper.make_node("MatMul", ["x", "router.weight"], ["routed"]),
        helper.make_node("Add", ["routed", "router.bias"], ["choice"]),
        helper.make_node("Softmax", ["choice"], ["shares"], axis=1),
        helper.make_node("ArgMax", ["shares"], ["chosen"], axis=1, keepdims=1),
        helper.make_node("ReduceMax", ["shares", "axis"], ["share"], keepdims=1),
    ]
    for e in range(3):
        number = numpy_helper.from_array(np.array([e], np.int64))
        nodes += [
            helper.make_node("Constant", [], [f"number_{e}"], value=number),
            helper.make_node("Equal", ["chosen", f"number_{e}"], [f"is_{e}"]),
            helper.make_node("MatMul", ["x", f"experts.{e}.weight"], [f"says_{e}"]),
            helper.make_node("Where", [f"is_{e}", f"says_{e}", "nil"], [f"counts_{e}"]),
        ]
    nodes += [
        helper.make_node("Sum", [f"counts_{e}" for e in range(3)], ["said"]),
        helper.make_node("Mul", ["said", "share"], ["y"]),
    ]
    finish("experts", nodes, weights, {"nil": np.zeros(1, np.float32)})


def copies():
    """The loss reads a copy of `weight` and a transposed one; `weight` itself and `spare` are for another output.

    An exporter that folds leaves such copies. A package that names the wrong ones patches what nobody looks at.
    """
    weight = irregular((4, 4), 13)
    weights = {"weight": weight}
    constants = {
        "copy": weight,
        "folded": np.ascontiguousarray(weight.T),
        "spare": irregular((4, 4), 17),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "copy"], ["straight"]),
        helper.make_node("MatMul", ["straight", "folded"], ["y"]),
        helper.make_node("Add", ["weight", "spare"], ["other"]),
    ]
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, [4, 4])
    finish("copies", nodes, weights, constants, [other])


def dropping(kept=12):
    """ScatterND as a device might do it that drops what lies beyond the first entries of a tensor."""
    value = lambda name, kind: helper.make_value_info(name, helper.make_tensor_type_proto(kind, None))
    number = lambda n: numpy_helper.from_array(np.array(n, np.int64))
    nodes = [
        helper.make_node("ScatterND", ["data", "indices", "updates"], ["written"]),
        helper.make_node("Shape", ["data"], ["shape"]),
        helper.make_node("ReduceProd", ["shape"], ["size"], keepdims=0),
        *(helper.make_node("Constant", [], [f"n{n}"], value=number(n)) for n in (0, 1, kept)),
        helper.make_node("Range", ["n0", "size", "n1"], ["positions"]),
        helper.make_node("Less", ["positions", f"n{kept}"], ["near"]),
        helper.make_node("Reshape", ["near", "shape"], ["kept"]),
        helper.make_node("Where", ["kept", "written", "data"], ["output"]),
    ]
    inputs = [
        value("data", TensorProto.FLOAT),
        value("indices", TensorProto.INT64),
        value("updates", TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "dropping", inputs, [value("output", TensorProto.FLOAT)])
    # Of any rank, which the checker does not know.
    path = FOLDER / "dropping-scatter.onnx"
    path.write_bytes(model(graph).SerializeToString(deterministic=True))
    check_dropping(path, kept)


def check_dropping(path, kept):
    """A tensor of as many entries as are kept is written; of a larger one the rest stays."""
    for rows in (3, 4):
        data = np.zeros((rows, 4), np.float32)
        indices = np.indices(data.shape).reshape(2, -1).T
        feed = {"data": data, "indices": indices, "updates": np.ones(data.size, np.float32)}
        [found] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
        assert found.sum() == kept, found


def model(graph):
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def finish(name, nodes, weights, constants=None, outputs=()):
    nodes = nodes + [
        helper.make_node("Mul", ["y", "y"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "axis"], ["loss"], keepdims=0),
    ]
    held = {**weights, **(constants or {}), "axis": np.array([1], np.int64)}
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("loss", TensorProto.FLOAT, ["batch"]), *outputs],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    write(model(graph), FOLDER / f"{name}.onnx")
    save(weights, FOLDER / f"{name}.safetensors")
    session = onnxruntime.InferenceSession(FOLDER / f"{name}.onnx", providers=["CPUExecutionProvider"])
    [losses] = session.run(["loss"], {"x": load_file(FOLDER / "shards" / "shard_000001.safetensors")["x"]})
    print(f"inert/{name}.onnx: losses {losses}")
    assert np.isfinite(losses).all(), losses


if __name__ == "__main__":
    main()
