"""Makes ../half: one small language model in float16 and in bfloat16, and what miners send to each.

Run in the folder above, `python -m generator.half`. It trains on the text in ../shards.
"""

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from . import scoring, small, wire
from .handmade import MODEL, save, write

VOCAB, WIDTH, HIDDEN, WINDOW = 256, 32, 48, 16
TEXT, HELD_OUT = (59996, 59997, 59999), 60000  # shards in ../shards
SHARDS = {1: (6, 64), 2: (200,), 3: (4, 64)}
STEPS, BATCH, RATE = 600, 512, 0.01
BATCH_OF_A_GRADIENT = 4096

EPS = float(np.float32(1e-5))  # what the graph holds
# As an exporter folds it: another name, and transposed.
PLACES = {"mlp.up.weight": "onnx::MatMul_31"}
SMALL_RATE = {"f16": 0.02, "bf16": 0.1}
# The largest float16 is 65504, and from 65520 on everything rounds to infinity; the largest bfloat16 is 3.39e38.
OVERFLOWS = {
    "f16": {"malformed-overflow": 70_000.0, "malformed-overflow-by-rounding": 65_520.0},
    "bf16": {"malformed-overflow-by-rounding": float(np.finfo(np.float32).max)},
}


class Precision:
    """`ulp_bits` is the number of explicit bits of the significand."""

    def __init__(self, name, dtype, kind, ulp_bits):
        self.name, self.dtype, self.kind, self.ulp_bits = name, np.dtype(dtype), kind, ulp_bits
        self.graph, self.checkpoint = f"graph-{name}.onnx", f"checkpoint-{name}.safetensors"

    def ulp(self, weights):
        """The distance from each weight to the next one in size, in float32."""
        exponent = np.frexp(weights.astype(np.float32))[1] - 1
        return np.ldexp(np.float32(1), exponent - self.ulp_bits)


PRECISIONS = (
    Precision("f16", np.float16, TensorProto.FLOAT16, 10),
    Precision("bf16", ml_dtypes.bfloat16, TensorProto.BFLOAT16, 7),
)


def main():
    out, train = small.options(__doc__, "half")
    text = np.concatenate([load(shard).ravel() for shard in TEXT])
    shards = write_shards(load(HELD_OUT).ravel(), out)
    weights = trained(text) if train else None
    described, baselines, cases, worst = [], [], [], []
    for precision in PRECISIONS:
        model = make(precision, weights, shards, out)
        files = {"precision": precision.name, "graph": precision.graph, "checkpoint": precision.checkpoint}
        described.append(files | {"weights_id": scoring.weights_id(model.checkpoint)})
        baselines += [files | model.baseline(nonce, None) for nonce in ("", small.NONCE)]
        cases += [files | model.record(case, out) for case in candidates(precision, model.checkpoint, text)]
        worst.append(f"{precision.name} {model.worst:.3g}")
    description = {
        "name": "half",
        "version": small.VERSION,
        "window": WINDOW,
        "windows_per_row": 1,
        **small.NEXT_TOKEN,
        "vocab": VOCAB,
        "parameters": sum(weight.size for weight in model.checkpoint.values()),
        "precisions": described,
    }
    small.write_table({"model": description, "baselines": baselines, "cases": cases}, out / "cases.json")
    print(f"{len(cases)} cases; ONNX Runtime is within {', '.join(worst)} of the reference")


def load(shard):
    return load_file(MODEL / "shards" / f"shard_{shard:06}.safetensors")["tokens"]


def write_shards(held_out, out):
    shards, position = {}, 0
    for shard, shape in SHARDS.items():
        size = int(np.prod(shape))
        shards[shard] = held_out[position : position + size].reshape(shape)
        save({"tokens": shards[shard]}, out / "shards" / f"shard_{shard:06}.safetensors")
        position += size
    return shards


def make(precision, weights, shards, out):
    """Writes one checkpoint and its graph."""
    if weights is None:
        checkpoint = load_file(MODEL / "half" / precision.checkpoint)
        checkpoint = {name: checkpoint[name] for name in initial()}  # a file lists its tensors by name
    else:
        checkpoint = {name: weight.astype(precision.dtype) for name, weight in weights.items()}
    save(checkpoint, out / precision.checkpoint)
    write(graph(precision, checkpoint), out / precision.graph)

    def choose(nonce, ids):
        return scoring.Windows(shards, WINDOW, nonce, ids)

    def feed(windows):
        return {"tokens": windows.inputs}

    return small.Model(out / precision.graph, checkpoint, choose, reference, feed, PLACES, small.NEXT_TOKEN)


# The model: an embedding, a gateless MLP beside it, RMSNorm, and a head of its own. It sees one token at a time.


def initial():
    rng = np.random.default_rng(1)
    shapes = {
        "embed.weight": (VOCAB, WIDTH),
        "mlp.up.weight": (HIDDEN, WIDTH),
        "mlp.down.weight": (WIDTH, HIDDEN),
        "head.weight": (VOCAB, WIDTH),
    }
    weights = {name: rng.normal(0.0, 0.1, shape) for name, shape in shapes.items()}
    return weights | {"norm.weight": 1 + rng.normal(0.0, 0.1, WIDTH)}


def trained(text):
    rng = np.random.default_rng(2)

    def gradients(weights, _):
        at = rng.choice(len(text) - 1, BATCH, replace=False)
        return gradient(weights, text[at], text[at + 1])

    return small.adam(initial(), gradients, STEPS, RATE)


def forward(weights, tokens):
    """The logits, and what the way back needs; in float64 on the weights as they are stored."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["embed.weight"][tokens]
    up = np.maximum(x @ w["mlp.up.weight"].T, 0)
    y = x + up @ w["mlp.down.weight"].T
    scale = 1 / np.sqrt((y * y).mean(-1, keepdims=True) + EPS)
    unit = y * scale
    return (unit * w["norm.weight"]) @ w["head.weight"].T, (w, x, up, scale, unit)


def gradient(weights, tokens, targets):
    """The mean loss of single tokens, and its gradient for every weight."""
    logits, (w, x, up, scale, unit) = forward(weights, tokens)
    loss = scoring.negative_log_likelihood(logits, targets).mean()
    back = np.exp(logits - logits.max(-1, keepdims=True))
    back = (back / back.sum(-1, keepdims=True) - np.eye(VOCAB)[targets]) / len(tokens)
    found = {"head.weight": back.T @ (unit * w["norm.weight"])}
    back = back @ w["head.weight"]
    found["norm.weight"] = (back * unit).sum(0)
    back = back * w["norm.weight"]
    back = scale * (back - unit * (back * unit).mean(-1, keepdims=True))
    found["mlp.down.weight"] = back.T @ up
    inner = (back @ w["mlp.down.weight"]) * (up > 0)
    found["mlp.up.weight"] = inner.T @ x
    found["embed.weight"] = np.zeros_like(w["embed.weight"])
    np.add.at(found["embed.weight"], tokens, back + inner @ w["mlp.up.weight"])
    return loss, {name: found[name] for name in weights}


def reference(weights, windows):
    return windows.losses(forward(weights, windows.inputs)[0])


def graph(precision, weights):
    """Every weight is stored in its own type and goes through a Cast, so any provider can run it."""

    def node(kind, inputs, output, **attributes):
        return helper.make_node(kind, inputs, [output], **attributes)

    stored = {PLACES.get(name, name): weight.T if name in PLACES else weight for name, weight in weights.items()}
    up = PLACES["mlp.up.weight"]
    nodes = [node("Cast", [name], f"{name}.wide", to=TensorProto.FLOAT) for name in stored] + [
        node("Gather", ["embed.weight.wide", "tokens"], "x", axis=0),
        node("MatMul", ["x", f"{up}.wide"], "hidden"),
        node("Relu", ["hidden"], "up"),
        node("Transpose", ["mlp.down.weight.wide"], "down_proj", perm=[1, 0]),
        node("MatMul", ["up", "down_proj"], "down"),
        node("Add", ["x", "down"], "y"),
        node("Mul", ["y", "y"], "squares"),
        node("ReduceMean", ["squares", "last"], "mean", keepdims=1),
        node("Add", ["mean", "eps"], "safe"),
        node("Sqrt", ["safe"], "root"),
        node("Div", ["y", "root"], "unit"),
        node("Mul", ["unit", "norm.weight.wide"], "normed"),
        node("Transpose", ["head.weight.wide"], "head_proj", perm=[1, 0]),
        node("MatMul", ["normed", "head_proj"], "logits"),
    ]
    constants = {"last": np.array([-1], np.int64), "eps": np.array(EPS, np.float32)}
    held = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in (stored | constants).items()]
    proto = helper.make_graph(
        nodes,
        f"half-{precision.name}",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", WINDOW])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", WINDOW, VOCAB])],
        held,
    )
    assert all(tensor.data_type == precision.kind for tensor in held[: len(stored)])
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


# The candidates.


def candidates(precision, checkpoint, text):
    def case(name, kind, *rest, **job):
        return small.Case(f"{precision.name}-{name}", kind, *rest, **job)

    def gradients(seed, weights=checkpoint):
        at = np.random.default_rng(seed).choice(len(text) - 1, BATCH_OF_A_GRADIENT, replace=False)
        return gradient(weights, text[at], text[at + 1])[1]

    def sparse(seed, ratio, dtype=np.float32, scale=1.0):
        return wire.top_k(gradients(seed), ratio, dtype, scale)

    steps = {name: -0.5 * found for name, found in gradients(103).items()}
    yield case("gradient", "honest gradient", sparse(101, 0.05), 1.0)
    yield case("gradient-f16", "honest gradient", sparse(102, 0.05, np.float16), 0.5, nonce=small.NONCE)
    yield case("difference-f16", "training difference", wire.top_k(steps, 0.05, np.float16))
    yield case("inverted", "inverted", sparse(104, 0.05, scale=-1.0), 1.0, shards=[3, 1])
    # Steps near half a unit in the last place: some entries change, some do not.
    yield case("gradient-small-steps", "partly without effect", sparse(105, 0.05), SMALL_RATE[precision.name])
    yield case("difference-ties", "partly without effect", ties(precision, checkpoint))
    yield case("difference-no-effect", "zero", below_half(precision, checkpoint))
    zeros = (np.zeros(8, np.float32), np.arange(8, dtype=np.int32))
    yield case("gradient-zero-values", "zero", {"norm.weight": zeros}, 0.1)
    # Finite in float32, infinite in the weight's own type. A positive weight, so that it cannot bring the sum down.
    indices = np.array([checkpoint["mlp.down.weight"].argmax()], np.int32)
    for name, least in OVERFLOWS[precision.name].items():
        update = {"mlp.down.weight": (np.array([least], np.float32), indices)}
        yield case(name, "malformed", update, None, "candidate_non_finite")


def chosen(weights, seed, count):
    """Some entries of a good size: no subnormals near, in any of the types."""
    solid = np.flatnonzero(np.abs(weights.ravel().astype(np.float32)) > 2e-2)
    return np.sort(np.random.default_rng(seed).choice(solid, count, replace=False)).astype(np.int32)


def ties(precision, checkpoint):
    """Away from zero by just half a unit in the last place: odd significands change, even ones do not."""
    update = {}
    for name in ("embed.weight", "mlp.up.weight", "head.weight"):
        indices = chosen(checkpoint[name], 106, 200)
        weights = checkpoint[name].ravel()[indices]
        update[name] = (np.sign(weights.astype(np.float32)) * precision.ulp(weights) / 2, indices)
    return update


def below_half(precision, checkpoint):
    """Less than half a unit in the last place, either way; nothing changes."""
    update = {}
    for name in ("embed.weight", "mlp.up.weight", "head.weight"):
        indices = chosen(checkpoint[name], 107, 150)
        reach = precision.ulp(checkpoint[name].ravel()[indices])
        # Towards zero a power of two has a neighbour at half the distance, so a fifth.
        share = np.random.default_rng(108).uniform(-0.2, 0.49, len(indices)).astype(np.float32)
        update[name] = (np.sign(checkpoint[name].ravel()[indices].astype(np.float32)) * reach * share, indices)
    return update


if __name__ == "__main__":
    main()
