"""Makes the two graphs that no exporter gave us: ../graph-two-places.onnx and the package source ../hazard.

Run by hand in the folder above, `python -m generator.handmade`; the results are committed and no test runs this.
It needs onnx, onnxruntime, numpy and safetensors, not torch. The same inputs give the same bytes.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

MODEL = Path(__file__).parent.parent

EMBEDDING = "model.embed_tokens.weight"
# The kind of name that exporters give to what they fold: it tells nothing, only the contents do.
FOLDED_HEAD = "onnx::MatMul_777"
TOLERANCE = 1e-6  # between the logits of the two graphs

VOCAB, WIDTH = 16, 8
SHARD, ROWS, ROW_TOKENS = 1, 2, 40


def main():
    onnxruntime.set_default_logger_severity(3)  # it warns of every node that it cannot fold
    two_places(MODEL / "graph-named.onnx", MODEL / "graph-two-places.onnx")
    hazard(MODEL / "hazard")


def two_places(source, target):
    """graph-named.onnx with the head's Transpose folded away, as constant-folding exporters do.

    The embedding then lives in the graph twice, once as it is and once transposed. Whoever patches
    only one of the two computes a loss that no model has.
    """
    checkpoint = load_file(MODEL / "checkpoint.safetensors")
    proto = onnx.load(source)
    graph = proto.graph
    [transpose] = [node for node in graph.node if node.op_type == "Transpose" and node.input[0] == EMBEDDING]
    runtime_head = transpose.output[0]
    [head] = [node for node in graph.node if runtime_head in node.input]
    assert head.op_type == "MatMul" and head.input[1] == runtime_head, head

    flipped = np.ascontiguousarray(checkpoint[EMBEDDING].T)
    graph.initializer.append(numpy_helper.from_array(flipped, FOLDED_HEAD))
    head.input[1] = FOLDED_HEAD
    graph.node.remove(transpose)

    readers = [node.op_type for node in graph.node if EMBEDDING in node.input]
    assert readers == ["Gather"], readers
    assert places(graph, checkpoint[EMBEDDING]) == [EMBEDDING, FOLDED_HEAD + " (transposed)"]
    write(proto, target)
    compare(source, target)


def places(graph, weight):
    found = []
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        if np.array_equal(array, weight):
            found.append(initializer.name)
        elif np.array_equal(array, weight.T):
            found.append(initializer.name + " (transposed)")
    return found


def compare(first, second):
    """The same logits, for two batch sizes of held-out text."""
    shard = load_file(MODEL / "shards" / "shard_059996.safetensors")["tokens"]
    for batch in (1, 4):
        feed = {"tokens": shard[:batch, :128].astype(np.int64)}
        worst = np.abs(session(first).run(["logits"], feed)[0] - session(second).run(["logits"], feed)[0]).max()
        print(f"{second.name}, batch {batch}: logits within {worst:.1e} of {first.name}")
        assert worst <= TOLERANCE, worst


def hazard(folder):
    """A model that is harmless as it is, and whose `size.weight` decides how much one node has to do.

        size   = size.weight where there is a token, else 0
        N      = int64(size), or 0 below -1000
        Z      = zeros [N, N]
        M      = int64(-size) below -1000, or 0
        logits = embed.weight[tokens] @ head.weight + size.weight * bias.weight + sum(Z @ Z) + M times 0

    A weight that decides a shape by itself could not be patched at all; this one does it together with the
    tokens, as the router of a mixture of experts does. The sums are always zero. ONNX Runtime looks at its terminate flag only between nodes, so a candidate
    that makes N large has one MatMul that cannot be ended, or zeros that no machine can hold; a negative
    N is an error. One that makes M large has a loop that takes long, and can be ended.
    """
    weights = {
        "embed.weight": irregular((VOCAB, WIDTH), 17),
        "head.weight": irregular((WIDTH, VOCAB), 101),
        "bias.weight": irregular((VOCAB,), 211),
        "size.weight": np.ones(1, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["embed.weight", "tokens"], ["embedding"], axis=0),
        helper.make_node("MatMul", ["embedding", "head.weight"], ["base"]),
        helper.make_node("Constant", [], ["nil"], value_floats=[0.0]),
        helper.make_node("Constant", [], ["limit"], value_floats=[-1000.0]),
        helper.make_node("Constant", [], ["no_token"], value_int=-1),
        helper.make_node("Greater", ["tokens", "no_token"], ["tokens_here"]),
        helper.make_node("Cast", ["tokens_here"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["ones"], ["one"], keepdims=0),
        helper.make_node("Mul", ["size.weight", "one"], ["size"]),
        helper.make_node("Less", ["size", "limit"], ["loops"]),
        helper.make_node("Where", ["loops", "nil", "size"], ["width"]),
        helper.make_node("Cast", ["width"], ["N"], to=TensorProto.INT64),
        helper.make_node("Concat", ["N", "N"], ["square"], axis=0),
        helper.make_node("ConstantOfShape", ["square"], ["Z"], value=numpy_helper.from_array(np.zeros(1, np.float32))),
        helper.make_node("MatMul", ["Z", "Z"], ["P"]),
        helper.make_node("ReduceSum", ["P"], ["nothing"], keepdims=0),
        helper.make_node("Mul", ["size.weight", "bias.weight"], ["bias"]),
        helper.make_node("Add", ["base", "bias"], ["biased"]),
        helper.make_node("Neg", ["size"], ["opposite"]),
        helper.make_node("Where", ["loops", "opposite", "nil"], ["rounds"]),
        helper.make_node("Cast", ["rounds"], ["M"], to=TensorProto.INT64),
        helper.make_node("Loop", ["M", "", "nothing"], ["still_nothing"], body=turns()),
        helper.make_node("Add", ["biased", "still_nothing"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hazard",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    # Squares spread over the vocabulary without a period that a window could hide.
    rows = [[(row * 5 + i * i + i // 3) % VOCAB for i in range(ROW_TOKENS)] for row in range(ROWS)]
    tokens = np.array(rows, np.int32)

    (folder / "shards").mkdir(parents=True, exist_ok=True)
    write(proto, folder / "graph.onnx")
    save(weights, folder / "checkpoint.safetensors")
    save({"tokens": tokens}, folder / "shards" / f"shard_{SHARD:06}.safetensors")
    check_hazard(folder / "graph.onnx", weights, tokens)


def turns():
    """The body of a loop that adds a value to itself, which is zero."""
    value = lambda name, kind: helper.make_tensor_value_info(name, kind, [])
    return helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["go_on_again"]),
            helper.make_node("Add", ["before", "before"], ["after"]),
        ],
        "turns",
        [value("turn", TensorProto.INT64), value("go_on", TensorProto.BOOL), value("before", TensorProto.FLOAT)],
        [value("go_on_again", TensorProto.BOOL), value("after", TensorProto.FLOAT)],
    )


def irregular(shape, seed):
    """Values in (-1, 1), no two of them equal; integers make them, so they are the same everywhere."""
    count = int(np.prod(shape))
    drawn = [(seed + 7919 * (i + 1) ** 2) % 10007 for i in range(count)]
    assert len(set(drawn)) == count, "choose another seed"
    return (np.array(drawn, np.float32) / np.float32(5003.5) - np.float32(1)).reshape(shape)


def check_hazard(path, weights, tokens):
    """The logits are what the formula says, for two shapes."""
    for batch, seq in ((1, 5), (2, ROW_TOKENS)):
        chosen = tokens[:batch, :seq].astype(np.int64)
        expected = weights["embed.weight"][chosen] @ weights["head.weight"] + weights["bias.weight"]
        worst = np.abs(session(path).run(["logits"], {"tokens": chosen})[0] - expected).max()
        print(f"hazard/{path.name}, {batch}x{seq}: logits within {worst:.1e} of the formula")
        assert worst < 1e-5, worst


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def write(proto, path):
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def save(tensors, path):
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main()
