"""Makes ../inputs: a language model that takes the inputs exporters add, and a graph that takes one too many.

Run in the folder above, `python -m generator.inputs`. It trains on the text in ../shards.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from . import scoring, small, wire
from .handmade import MODEL, save, session, write

VOCAB, WIDTH, WINDOW = 64, 16, 16
TEXT, HELD_OUT = (59996, 59997, 59999), 60000  # shards in ../shards
SHARDS = {1: (20, 48), 2: (100,), 3: (20, 48)}
STEPS, BATCH, RATE = 100, 64, 0.01
BATCH_OF_A_GRADIENT = 2048

ROOT = 4.0  # of the width, which scales the attention; exact in any type
LOWEST = float(np.finfo(np.float32).min)  # the score of what may not be seen, as exporters write it
UNKNOWN = "past_key_values.0.key"


def main():
    out, train = small.options(__doc__, "inputs")
    text = [load(shard) for shard in TEXT]
    checkpoint = trained(text) if train else load_file(MODEL / "inputs" / "checkpoint.safetensors")
    checkpoint = {name: checkpoint[name] for name in initial()}  # a file lists its tensors by name
    shards = write_shards(load(HELD_OUT).ravel(), out)
    save(checkpoint, out / "checkpoint.safetensors")
    write(graph(checkpoint), out / "graph.onnx")
    write(with_unknown(graph(checkpoint)), out / "graph-unknown.onnx")

    def choose(nonce, ids):
        return scoring.Windows(shards, WINDOW, nonce, ids)

    def feed(windows):
        return feed_of(windows.inputs)

    model = small.Model(out / "graph.onnx", checkpoint, choose, reference, feed, label=small.NEXT_TOKEN)
    check_inputs(model, choose("", None), out)
    description = {
        "name": "inputs",
        "version": small.VERSION,
        "window": WINDOW,
        "windows_per_row": 1,
        **small.NEXT_TOKEN,
        "vocab": VOCAB,
        "parameters": sum(weight.size for weight in checkpoint.values()),
        "weights_id": scoring.weights_id(checkpoint),
        "inputs": [item.name for item in model.proto.graph.input],
        "unknown_input": UNKNOWN,
    }
    baselines = [model.baseline(nonce, None) for nonce in ("", small.NONCE)]
    cases = [model.record(case, out) for case in candidates(checkpoint, text)]
    small.write_table({"model": description, "baselines": baselines, "cases": cases}, out / "cases.json")
    print(f"{len(cases)} cases; ONNX Runtime is within {model.worst:.3g} of the reference")


def load(shard):
    """The text as 64 tokens: each byte's lower six bits."""
    tokens = load_file(MODEL / "shards" / f"shard_{shard:06}.safetensors")["tokens"]
    return tokens % VOCAB


def write_shards(held_out, out):
    shards, position = {}, 0
    for shard, shape in SHARDS.items():
        size = int(np.prod(shape))
        shards[shard] = held_out[position : position + size].reshape(shape)
        save({"tokens": shards[shard]}, out / "shards" / f"shard_{shard:06}.safetensors")
        position += size
    return shards


def feed_of(tokens, mask=None, positions=None):
    """What a scorer feeds: nothing masked, positions from zero."""
    everywhere = np.ones_like(tokens) if mask is None else mask
    counted = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    return {"input_ids": tokens, "attention_mask": everywhere, "position_ids": np.ascontiguousarray(counted)}


# The model: token and position embeddings, one attention head, a head of its own.


def initial():
    rng = np.random.default_rng(1)
    square = ("attention.query", "attention.key", "attention.value", "attention.output")
    shapes = {"tokens.weight": (VOCAB, WIDTH), "positions.weight": (WINDOW, WIDTH)}
    shapes |= {f"{name}.weight": (WIDTH, WIDTH) for name in square} | {"head.weight": (VOCAB, WIDTH)}
    return {name: rng.normal(0.0, 0.3, shape) for name, shape in shapes.items()}


def draw(text, rng, count):
    """Inputs and targets at random places of the training rows."""
    rows = np.concatenate(text)
    chosen = rng.integers(len(rows), size=count)
    starts = rng.integers(rows.shape[1] - WINDOW, size=count)
    chunks = np.stack([rows[row, start : start + WINDOW + 1] for row, start in zip(chosen, starts, strict=True)])
    return chunks[:, :-1].astype(np.int64), chunks[:, 1:].astype(np.int64)


def trained(text):
    rng = np.random.default_rng(2)

    def gradients(weights, _):
        return gradient(weights, *draw(text, rng, BATCH))

    weights = small.adam(initial(), gradients, STEPS, RATE)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def forward(weights, input_ids, attention_mask, position_ids):
    """The logits, and what the way back needs; in float64."""
    w = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = w["tokens.weight"][input_ids] + w["positions.weight"][position_ids]
    query, key, value = (x @ w[f"attention.{part}.weight"].T for part in ("query", "key", "value"))
    seen = np.tri(x.shape[1], dtype=bool) & (attention_mask[:, None, :] != 0)
    scores = np.where(seen, query @ key.transpose(0, 2, 1) / ROOT, LOWEST)
    chance = np.exp(scores - scores.max(-1, keepdims=True))
    chance = chance / chance.sum(-1, keepdims=True)
    mixed = chance @ value
    y = x + mixed @ w["attention.output.weight"].T
    return y @ w["head.weight"].T, (w, x, query, key, value, chance, mixed, y)


def gradient(weights, tokens, targets):
    """The mean loss and its gradient for every weight."""
    feed = feed_of(tokens)
    logits, (w, x, query, key, value, chance, mixed, y) = forward(weights, **feed)
    loss = scoring.negative_log_likelihood(logits, targets).mean()
    back = np.exp(logits - logits.max(-1, keepdims=True))
    back = (back / back.sum(-1, keepdims=True) - np.eye(VOCAB)[targets]) / targets.size

    def weight_of(outer, inner):
        return np.einsum("bti,btj->ij", outer, inner, optimize=True)

    found = {"head.weight": weight_of(back, y)}
    back = back @ w["head.weight"]
    found["attention.output.weight"] = weight_of(back, mixed)
    back_mixed = back @ w["attention.output.weight"]
    back_chance = back_mixed @ value.transpose(0, 2, 1)
    back_scores = chance * (back_chance - (back_chance * chance).sum(-1, keepdims=True)) / ROOT
    parts = {
        "query": back_scores @ key,
        "key": back_scores.transpose(0, 2, 1) @ query,
        "value": chance.transpose(0, 2, 1) @ back_mixed,
    }
    for part, part_back in parts.items():
        found[f"attention.{part}.weight"] = weight_of(part_back, x)
        back = back + part_back @ w[f"attention.{part}.weight"]
    for name, ids in (("tokens.weight", tokens), ("positions.weight", feed["position_ids"])):
        found[name] = np.zeros_like(w[name])
        np.add.at(found[name], ids, back)
    return loss, {name: found[name] for name in weights}


def reference(weights, windows):
    return windows.losses(forward(weights, **feed_of(windows.inputs))[0])


def graph(weights):
    def node(kind, inputs, output, **attributes):
        return helper.make_node(kind, inputs, [output], **attributes)

    def linear(name, x, output):
        return [
            node("Transpose", [f"{name}.weight"], f"{name}.transposed", perm=[1, 0]),
            node("MatMul", [x, f"{name}.transposed"], output),
        ]

    nodes = [
        node("Gather", ["tokens.weight", "input_ids"], "token", axis=0),
        node("Gather", ["positions.weight", "position_ids"], "position", axis=0),
        node("Add", ["token", "position"], "x"),
        *linear("attention.query", "x", "query"),
        *linear("attention.key", "x", "key"),
        *linear("attention.value", "x", "value"),
        node("Transpose", ["key"], "key_columns", perm=[0, 2, 1]),
        node("MatMul", ["query", "key_columns"], "products"),
        node("Div", ["products", "root"], "scaled"),
        # What a position may see: itself and what is before it, where the mask is not 0.
        node("Shape", ["input_ids"], "seq", start=1, end=2),
        node("Squeeze", ["seq"], "length"),
        node("Range", ["zero", "length", "one"], "steps"),
        node("Unsqueeze", ["steps", "last"], "rows"),
        node("LessOrEqual", ["steps", "rows"], "causal"),
        node("Cast", ["attention_mask"], "kept", to=TensorProto.BOOL),
        node("Unsqueeze", ["kept", "middle"], "kept_columns"),
        node("And", ["causal", "kept_columns"], "seen"),
        node("Where", ["seen", "scaled", "lowest"], "scores"),
        node("Softmax", ["scores"], "chance", axis=-1),
        node("MatMul", ["chance", "value"], "mixed"),
        *linear("attention.output", "mixed", "attended"),
        node("Add", ["x", "attended"], "y"),
        *linear("head", "y", "logits"),
    ]
    constants = {
        "root": np.array(ROOT, np.float32),
        "lowest": np.array(LOWEST, np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "middle": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
    }
    proto = helper.make_graph(
        nodes,
        "inputs",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in feed_of(np.ones((1, 1)))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCAB])],
        [numpy_helper.from_array(array, name) for name, array in (weights | constants).items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def with_unknown(proto):
    """The same with the keys of earlier tokens as a further input; the sum of them is added to each key."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = proto.graph
    graph.input.append(helper.make_tensor_value_info(UNKNOWN, TensorProto.FLOAT, ["batch", "past", WIDTH]))
    [position] = [at for at, node in enumerate(graph.node) if node.output[0] == "key_columns"]
    graph.node[position].input[0] = "key_and_past"
    graph.node.insert(position, helper.make_node("Add", ["key", "past"], ["key_and_past"]))
    graph.node.insert(position, helper.make_node("ReduceSum", [UNKNOWN, "middle"], ["past"], keepdims=1))
    return proto


def check_inputs(model, windows, out):
    """Mask and positions matter, and mean in the graph what they mean in the reference."""
    tokens = windows.inputs
    plain = model.run(model.checkpoint, feed_of(tokens))
    mask = np.ones_like(tokens)
    mask[:, :3] = 0
    reversed_positions = np.arange(WINDOW)[::-1] + np.zeros_like(tokens)
    for what, feed in (("mask", feed_of(tokens, mask)), ("positions", feed_of(tokens, None, reversed_positions))):
        logits = model.run(model.checkpoint, feed)
        gap, moved = np.abs(logits - forward(model.checkpoint, **feed)[0]).max(), np.abs(logits - plain).max()
        print(f"other {what}: logits within {gap:.1e} of the reference, up to {moved:.2f} from the plain ones")
        assert gap < 1e-4 and moved > 0.1, (what, gap, moved)
    past = np.zeros((len(tokens), 0, WIDTH), np.float32)
    unknown = session(out / "graph-unknown.onnx").run(["logits"], feed_of(tokens) | {UNKNOWN: past})[0]
    assert np.array_equal(unknown, plain)


def candidates(checkpoint, text):
    def gradients(seed):
        return gradient(checkpoint, *draw(text, np.random.default_rng(seed), BATCH_OF_A_GRADIENT))[1]

    honest = "honest gradient"
    positions = {"positions.weight": small.dense(gradients(102))["positions.weight"]}
    yield small.Case("gradient-sparse", honest, wire.top_k(gradients(103), 0.1), 0.2)
    yield small.Case("gradient-positions-only", honest, positions, 0.5, nonce=small.NONCE)
    yield small.Case("inverted-gradient", "inverted", wire.top_k(gradients(104), 0.1, np.float16, scale=-1.0), 0.2)
    yield small.Case("noise-difference", "noise", small.noise(checkpoint, 401, 0.3, 0.1), shards=[3, 1])


if __name__ == "__main__":
    main()
