"""Makes ../elsewhere: a model whose weights stand in Constant nodes and in the bodies of If and Loop, and the same with
every weight as an initializer of the graph.

Run by hand in the folder above, `python -m generator.elsewhere`; the results are committed and no test runs this.
It needs onnx, onnxruntime, numpy, ml_dtypes and safetensors. The same inputs give the same bytes.

Both branches call their bias `bias`; one branch gives a weight as it is. `in-function.onnx` has the head in a local
function, where nobody can patch it; `bfloat16.onnx` multiplies in bfloat16, for which ONNX Runtime's CPU provider has no kernel;
`random.onnx` adds noise, as dropout in training mode does; `wide.onnx` makes 40 MiB of each window, a batch of four of which no
longer fits into the smallest buffer of a GPU; `flat.onnx` gives the logits of all windows in one row after the
other, and `mean.onnx` one number for all of them.
"""

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from .handmade import MODEL, VOCAB, WIDTH, irregular, save, write

OUT = MODEL / "elsewhere"
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
SHAPES = {
    "embed.weight": (VOCAB, WIDTH), "head.weight": (WIDTH, VOCAB), "then.bias": (VOCAB,), "else.bias": (VOCAB,),
    "scale.a": (WIDTH,), "scale.b": (WIDTH,), "loop.weight": (WIDTH,),
}


def main():
    onnxruntime.set_default_logger_severity(3)
    (OUT / "shards").mkdir(parents=True, exist_ok=True)
    weights = {name: irregular(shape, 17 + 41 * at) for at, (name, shape) in enumerate(SHAPES.items())}
    tokens = np.array([[(row * 5 + i * i + i // 3) % VOCAB for i in range(40)] for row in range(4)], np.int32)
    save(weights, OUT / "checkpoint.safetensors")
    save({"tokens": tokens}, OUT / "shards" / "shard_1.safetensors")
    write(model(weights, plain=True), OUT / "initializers.onnx")
    write(model(weights, plain=False), OUT / "graph.onnx")
    write(in_function(weights), OUT / "in-function.onnx")
    write(in_bfloat16(weights), OUT / "bfloat16.onnx")
    write(random(weights), OUT / "random.onnx")
    write(wide(weights), OUT / "wide.onnx")
    write(other_output(weights, "logits", [None, VOCAB], ("Reshape", "rows")), OUT / "flat.onnx")
    write(other_output(weights, "loss", [], ("ReduceMean", None)), OUT / "mean.onnx")
    runs = [session(name).run(None, {"tokens": tokens.astype(np.int64)})[0] for name in ("initializers.onnx", "graph.onnx")]
    assert np.array_equal(*runs)


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def constant(output, array):
    return helper.make_node("Constant", [], [output], name=f"constant_{output}", value=numpy_helper.from_array(array))


def model(weights, plain):
    """`plain` has every weight as an initializer of the graph itself."""
    nodes = [helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed")]
    held = lambda name: [] if plain else [numpy_helper.from_array(weights[name], "bias")]
    bias = lambda name: name if plain else "bias"
    branch = lambda name, op: helper.make_graph(
        [helper.make_node(op, ["base", bias(name)], [f"{name}_out"])], name, [], [value(f"{name}_out", FLOAT, None)], held(name)
    )
    pick = lambda name: helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) if plain else constant(f"{name}_out", weights[name])],
        name, [], [value(f"{name}_out", FLOAT, [WIDTH])],
    )
    turns = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["go_on_again"]), helper.make_node("Add", ["before", "loop.weight"], ["after"])],
        "turns",
        [value("turn", INT64, []), value("go_on", BOOL, []), value("before", FLOAT, None)],
        [value("go_on_again", BOOL, []), value("after", FLOAT, None)],
        [] if plain else [numpy_helper.from_array(weights["loop.weight"], "loop.weight")],
    )
    nodes += [
        helper.make_node("If", ["yes"], ["scale"], name="pick", then_branch=pick("scale.a"), else_branch=pick("scale.b")),
        helper.make_node("Mul", ["embedded", "scale"], ["scaled"]),
        helper.make_node("Loop", ["two", "", "scaled"], ["looped"], name="turn", body=turns),
        *([] if plain else [constant("head.weight", weights["head.weight"])]),
        helper.make_node("MatMul", ["looped", "head.weight"], ["base"]),
        helper.make_node(
            "If", ["yes"], ["logits"], name="choose", then_branch=branch("then.bias", "Add"), else_branch=branch("else.bias", "Sub")
        ),
    ]
    own = weights if plain else {"embed.weight": weights["embed.weight"]}
    return of(nodes, own | {"yes": np.array(True), "two": np.array(2, np.int64)})


def in_function(weights):
    head = helper.make_function(
        "local", "Head", ["x"], ["y"],
        [constant("table", weights["head.weight"]), helper.make_node("MatMul", ["x", "table"], ["y"])],
        [helper.make_opsetid("", 18)],
    )
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed"),
        helper.make_node("Head", ["embedded"], ["logits"], domain="local"),
    ]
    return of(nodes, {"embed.weight": weights["embed.weight"]}, [head])


def in_bfloat16(weights):
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed"),
        helper.make_node("Mul", ["embedded", "scale.a"], ["scaled"], name="scale"),
        helper.make_node("MatMul", ["scaled", "head.weight"], ["narrow"]),
        helper.make_node("Cast", ["narrow"], ["logits"], to=FLOAT),
    ]
    return of(nodes, {name: weights[name].astype(ml_dtypes.bfloat16) for name in ("embed.weight", "scale.a", "head.weight")})


def random(weights):
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed"),
        helper.make_node("RandomNormalLike", ["embedded"], ["noise"], name="noise"),
        helper.make_node("Add", ["embedded", "noise"], ["noisy"]),
        helper.make_node("MatMul", ["noisy", "head.weight"], ["logits"]),
    ]
    return of(nodes, {name: weights[name] for name in ("embed.weight", "head.weight")})


def wide(weights):
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed"),
        helper.make_node("MatMul", ["embedded", "head.weight"], ["base"], name="head"),
        helper.make_node("Unsqueeze", ["base", "last"], ["column"], name="column"),
        helper.make_node("Expand", ["column", "copies"], ["many"], name="copy"),
        helper.make_node("Less", ["many", "zero"], ["negative"], name="compare"),
        helper.make_node("Where", ["negative", "zero", "many"], ["positive"], name="choose"),
        helper.make_node("ReduceMax", ["positive", "last"], ["logits"], name="one", keepdims=0),
    ]
    held = {name: weights[name] for name in ("embed.weight", "head.weight")}
    sizes = {"last": np.array([-1], np.int64), "copies": np.array([1, 1, 1, 40960], np.int64), "zero": np.float32(0)}
    return of(nodes, held | sizes)


def other_output(weights, name, shape, last):
    op, shape_input = last
    options = {"keepdims": 0} if op == "ReduceMean" else {}
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed"),
        helper.make_node("MatMul", ["embedded", "head.weight"], ["base"]),
        helper.make_node(op, ["base", *([shape_input] if shape_input else [])], [name], **options),
    ]
    held = {key: weights[key] for key in ("embed.weight", "head.weight")}
    if shape_input:
        held[shape_input] = np.array([-1, VOCAB], np.int64)
    return of(nodes, held, output=value(name, FLOAT, shape))


def of(nodes, initializers, functions=(), output=None):
    output = output or value("logits", FLOAT, ["batch", "seq", VOCAB])
    graph = helper.make_graph(
        nodes, "elsewhere", [value("tokens", INT64, ["batch", "seq"])], [output],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [helper.make_opsetid("ai.onnx", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def session(name):
    return onnxruntime.InferenceSession(OUT / name, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
