"""Makes ../external: a graph whose tensors are in files wherever a tensor can stand, beside the same graph in one file.

Run by hand in the folder above, `python -m generator.external`; the results are committed and no test runs this.
It needs onnx, onnxruntime, numpy and safetensors. The same inputs give the same bytes.

The files have the names that a package gives its own (`weights.safetensors`, `model.json`, ...), and names with detours.
Large tensors are above what scorer takes into the graph itself (64 KiB), so that ONNX Runtime has to find their files.
"""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from .handmade import MODEL, irregular, save, write

OUT = MODEL / "external"
VOCAB, WIDTH, TALL = 16, 128, 130  # TALL x WIDTH floats are 66,560 bytes
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def main():
    onnxruntime.set_default_logger_severity(3)
    (OUT / "shards").mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "embed.weight": irregular((VOCAB, WIDTH), 17),
        "head.weight": irregular((WIDTH, VOCAB), 101) * np.float32(0.1),
    }
    whole = graph(checkpoint)
    write(whole, OUT / "inline.onnx")
    tokens = np.array([[(row * 5 + i * i + i // 3) % VOCAB for i in range(40)] for row in range(4)], np.int32)
    expected = session(OUT / "inline.onnx").run(None, {"tokens": tokens.astype(np.int64)})[0]
    scattered = onnx.ModelProto()
    scattered.CopyFrom(whole)
    scatter(scattered)
    (OUT / "graph.onnx").write_bytes(scattered.SerializeToString(deterministic=True))
    save(checkpoint, OUT / "checkpoint.safetensors")
    save({"tokens": tokens}, OUT / "shards" / "shard_1.safetensors")
    assert np.isfinite(expected).all() and expected.std() > 0.01, expected.std()


def table(seed):
    """One of the tall tables, of which a mean goes into the logits: a wrong file shows."""
    count = TALL * WIDTH
    drawn = (seed + 7919 * np.arange(1, count + 1, dtype=np.int64) ** 2) % 10007
    return (drawn.astype(np.float32) / np.float32(5003.5) - np.float32(1)).reshape(TALL, WIDTH)


def constant(name, array):
    return helper.make_node("Constant", [], [name], name=f"{name}_node", value=numpy_helper.from_array(array, name))


def rows(source, out):
    """A mean of each column, [WIDTH]."""
    return helper.make_node("ReduceMean", [source, "zero"], [out], keepdims=0)


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(checkpoint):
    branch = lambda seed, name: helper.make_graph(
        [rows(f"{name}_table", f"{name}_mean")], name, [], [value(f"{name}_mean", FLOAT, [WIDTH])],
        [numpy_helper.from_array(table(seed), f"{name}_table")],
    )
    turns = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_again"]),
            rows("loop_table", "loop_mean"),
            helper.make_node("Add", ["before", "loop_mean"], ["after"]),
        ],
        "turns",
        [value("turn", INT64, []), value("go_on", BOOL, []), value("before", FLOAT, [WIDTH])],
        [value("go_on_again", BOOL, []), value("after", FLOAT, [WIDTH])],
        [numpy_helper.from_array(table(3), "loop_table")],
    )
    step = helper.make_graph(
        [
            constant("scan_table", table(4)),
            rows("scan_table", "scan_mean"),
            helper.make_node("Add", ["sum_in", "row_in"], ["row_sum"]),
            helper.make_node("Add", ["row_sum", "scan_mean"], ["sum_out"]),
        ],
        "step",
        [value("sum_in", FLOAT, [WIDTH]), value("row_in", FLOAT, [WIDTH])],
        [value("sum_out", FLOAT, [WIDTH])],
    )
    shift = helper.make_function(
        "local", "Shift", ["x"], ["y"],
        [constant("function_table", table(5)), constant("first", np.zeros(1, np.int64)),
         helper.make_node("ReduceMean", ["function_table", "first"], ["function_mean"], keepdims=0),
         helper.make_node("Add", ["x", "function_mean"], ["y"])],
        [helper.make_opsetid("", 18)],
    )
    nodes = [
        constant("constant_table", table(6)),
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedded"], name="embed", axis=0),
        helper.make_node("If", ["cond"], ["if_mean"], name="choose", then_branch=branch(1, "then"), else_branch=branch(2, "else")),
        helper.make_node("Loop", ["trips", "", "if_mean"], ["looped"], name="turn", body=turns),
        helper.make_node("Scan", ["looped", "few_rows"], ["scanned"], name="scan", num_scan_inputs=1, body=step),
        rows("constant_table", "constant_mean"),
        helper.make_node("Add", ["scanned", "constant_mean"], ["biased"]),
        helper.make_node("Shift", ["biased"], ["shifted"], domain="local"),
        helper.make_node("Add", ["embedded", "shifted"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head.weight"], ["logits"]),
    ]
    small = {
        "cond": np.array(True), "trips": np.array(2, np.int64), "zero": np.zeros(1, np.int64),
        "few_rows": table(7)[:3],
    }
    main = helper.make_graph(
        nodes, "external", [value("tokens", INT64, ["batch", "seq"])], [value("logits", FLOAT, ["batch", "seq", VOCAB])],
        [numpy_helper.from_array(array, name) for name, array in (checkpoint | small).items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(main, opset_imports=opsets, functions=[shift], ir_version=10)


# Where each tensor's bytes go; what is not named stays in the graph.
FILES = {
    "then_table": "./weights.safetensors",
    "else_table": "weights.safetensors",
    "loop_table": "model.onnx",
    "scan_table": "parts/../model.json",
    "function_table": "parts/function.data",
    "constant_table": "./parts/./constant.data",
    "cond": "small.data",
    "few_rows": "small.data",
    "embed.weight": "small.data",
}


def scatter(model):
    """Puts tensors into files, aligned as exporters do."""
    written = {}
    for tensor in tensors(model):
        location = FILES.get(tensor.name)
        if location is None:
            continue
        path = (OUT / location).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        so_far = written.setdefault(path, b"")
        offset = len(so_far) + -len(so_far) % 64
        written[path] = so_far.ljust(offset, b"\0") + tensor.raw_data
        entries = {"location": location, "offset": str(offset), "length": str(len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in entries.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text
    for path, contents in written.items():
        path.write_bytes(contents)


def tensors(model):
    yield from of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from of_node(node)


def of_graph(graph):
    yield from graph.initializer
    for node in graph.node:
        yield from of_node(node)


def of_node(node):
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        if attribute.HasField("g"):
            yield from of_graph(attribute.g)


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
