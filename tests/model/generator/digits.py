"""Makes ../digits: a vision model whose graph gives each example's loss, and what miners send to it.

Run in the folder above, `python -m generator.digits`. It needs scikit-learn, for its data alone.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from . import scoring, small, wire
from .handmade import MODEL, save, write

CLASSES, SIDE = 10, 8
FIRST, SECOND = 8, 16  # channels of the two convolutions
TRAINED_ON = 1437  # of 1797 examples; the others are held out
ROWS = {1: 40, 2: 40, 3: 33}  # of the held-out examples, those in shards
STEPS, BATCH, RATE = 120, 64, 0.01  # not to the end: an honest gradient should still help
BATCH_OF_A_GRADIENT = 1024


def main():
    out, train = small.options(__doc__, "digits")
    training, held_out = data()
    checkpoint = trained(training) if train else load_file(MODEL / "digits" / "checkpoint.safetensors")
    checkpoint = {name: checkpoint[name] for name in initial()}  # a file lists its tensors by name
    shards = write_shards(held_out, out)
    save(checkpoint, out / "checkpoint.safetensors")
    write(graph(checkpoint), out / "graph.onnx")

    def choose(nonce, ids):
        return Examples(shards, ids)

    def feed(examples):
        return {"image": examples.image, "label": examples.label}

    model = small.Model(out / "graph.onnx", checkpoint, choose, reference, feed)
    accuracy = {"training": accuracy_on(checkpoint, training), "held_out": accuracy_on(checkpoint, held_out)}
    description = {
        "name": "digits",
        "version": small.VERSION,
        "objective": "graph_loss",
        "inputs": {"image": [1, SIDE, SIDE], "label": []},
        "parameters": sum(weight.size for weight in checkpoint.values()),
        "weights_id": scoring.weights_id(checkpoint),
        "accuracy": accuracy,
    }
    baselines = [model.baseline("", ids) for ids in (None, [2], [3, 1])]
    cases = [model.record(case, out) for case in candidates(checkpoint, training)]
    small.write_table({"model": description, "baselines": baselines, "cases": cases}, out / "cases.json")
    print(f"accuracy {accuracy}; {len(cases)} cases; ONNX Runtime is within {model.worst:.3g} of the reference")


def data():
    """(training, held out), each (image float32 [n, 1, 8, 8] in 0..1, label int64 [n])."""
    digits = load_digits()
    order = np.random.default_rng(1).permutation(len(digits.target))
    image = (digits.images[order] / 16.0).astype(np.float32)[:, None]  # 17 grey values, all exact
    label = digits.target[order].astype(np.int64)
    return (image[:TRAINED_ON], label[:TRAINED_ON]), (image[TRAINED_ON:], label[TRAINED_ON:])


def write_shards(held_out, out):
    shards, position = {}, 0
    for shard, rows in ROWS.items():
        part = slice(position, position + rows)
        shards[shard] = {"image": held_out[0][part], "label": held_out[1][part]}
        save(shards[shard], out / "shards" / f"shard_{shard:06}.safetensors")
        position += rows
    return shards


class Examples:
    """The examples that a job reads: every row of its shards, whatever the nonce."""

    def __init__(self, shards, ids):
        ids = sorted(shards) if ids is None else ids
        self.image = np.concatenate([shards[shard]["image"] for shard in ids])
        self.label = np.concatenate([shards[shard]["label"] for shard in ids])
        rows = [(shard, row) for shard in ids for row in range(len(shards[shard]["label"]))]
        self.plan = scoring.plan((shard, row, 0, 0, 0) for shard, row in rows)

    def describe(self):
        return {"windows": len(self.label), "tokens": len(self.label), "plan": self.plan}

    def losses(self, output):
        assert output.dtype == np.float32 and output.shape == self.label.shape, output.shape
        return output.astype(np.float64)


# The model: two convolutions, each with a Relu and a 2x2 maximum, and a linear layer.


def initial():
    rng = np.random.default_rng(2)
    shapes = {"conv1": (FIRST, 1, 3, 3), "conv2": (SECOND, FIRST, 3, 3), "fc": (CLASSES, SECOND * (SIDE // 4) ** 2)}
    weights = {}
    for name, shape in shapes.items():
        reach = 1 / np.sqrt(np.prod(shape[1:]))
        weights[f"{name}.weight"] = rng.uniform(-reach, reach, shape)
        weights[f"{name}.bias"] = rng.uniform(-reach, reach, shape[0])
    return weights


def trained(training):
    rng = np.random.default_rng(3)

    def gradients(weights, _):
        chosen = rng.choice(TRAINED_ON, BATCH, replace=False)
        return gradient(weights, training[0][chosen], training[1][chosen])

    weights = small.adam(initial(), gradients, STEPS, RATE)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def convolve(x, weight, bias):
    """3x3, zeros around; gives the windows too, for the way back."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # [n, c, h, w, 3, 3]
    return np.einsum("nchwij,ocij->nohw", around, weight, optimize=True) + bias[:, None, None], around


def convolve_back(back, weight, around):
    flipped = weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    before = convolve(back, flipped, np.zeros(weight.shape[1]))[0]
    return before, np.einsum("nohw,nchwij->ocij", back, around, optimize=True), back.sum((0, 2, 3))


def pool(x):
    """The maximum of each 2x2, and where it is (the first of equals)."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
    return blocks.max(-1), np.eye(4)[blocks.argmax(-1)]


def pool_back(back, where):
    n, c, h, w, _ = where.shape
    blocks = (back[..., None] * where).reshape(n, c, h, w, 2, 2)
    return blocks.transpose(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * h, 2 * w)


def forward(weights, image):
    """The logits, and what the way back needs; in float64."""
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x, kept = image.astype(np.float64), []
    for name in ("conv1", "conv2"):
        x, around = convolve(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        positive = x > 0
        x, where = pool(x * positive)
        kept.append((name, around, positive, where))
    features = x.reshape(len(x), -1)
    return features @ weights["fc.weight"].T + weights["fc.bias"], features, kept


def gradient(weights, image, label):
    """The mean loss and its gradient for every weight."""
    logits, features, kept = forward(weights, image)
    loss = scoring.negative_log_likelihood(logits, label).mean()
    back = np.exp(logits - logits.max(-1, keepdims=True))
    back = (back / back.sum(-1, keepdims=True) - np.eye(CLASSES)[label]) / len(label)
    found = {"fc.weight": back.T @ features, "fc.bias": back.sum(0)}
    back = (back @ weights["fc.weight"]).reshape(len(label), SECOND, SIDE // 4, SIDE // 4)
    for name, around, positive, where in reversed(kept):
        back = pool_back(back, where) * positive
        back, *found_here = convolve_back(back, weights[f"{name}.weight"], around)
        found[f"{name}.weight"], found[f"{name}.bias"] = found_here
    return loss, {name: found[name] for name in weights}


def reference(weights, examples):
    return scoring.negative_log_likelihood(forward(weights, examples.image)[0], examples.label)


def accuracy_on(weights, part):
    return float((forward(weights, part[0])[0].argmax(-1) == part[1]).mean())


def graph(weights):
    def convolution(name, x):
        pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        return [
            helper.make_node("Conv", [x, f"{name}.weight", f"{name}.bias"], [f"{name}.out"], **pads),
            helper.make_node("Relu", [f"{name}.out"], [f"{name}.relu"]),
            helper.make_node("MaxPool", [f"{name}.relu"], [f"{name}.pool"], kernel_shape=[2, 2], strides=[2, 2]),
        ]

    nodes = [
        *convolution("conv1", "image"),
        *convolution("conv2", "conv1.pool"),
        helper.make_node("Flatten", ["conv2.pool"], ["features"]),
        helper.make_node("Gemm", ["features", "fc.weight", "fc.bias"], ["logits"], transB=1),
        helper.make_node("LogSoftmax", ["logits"], ["log_probabilities"], axis=1),
        helper.make_node("Unsqueeze", ["label", "axis"], ["column"]),
        helper.make_node("GatherElements", ["log_probabilities", "column"], ["chosen"], axis=1),
        helper.make_node("Neg", ["chosen"], ["losses"]),
        helper.make_node("Squeeze", ["losses", "axis"], ["loss"]),
    ]
    constants = {"axis": np.array([1], np.int64)}
    proto = helper.make_graph(
        nodes,
        "digits",
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [helper.make_tensor_value_info("loss", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(array, name) for name, array in (weights | constants).items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


# The candidates.


def candidates(checkpoint, training):
    def gradients(seed, weights=checkpoint):
        chosen = np.random.default_rng(seed).choice(TRAINED_ON, BATCH_OF_A_GRADIENT, replace=False)
        return gradient(weights, training[0][chosen], training[1][chosen])[1]

    def only(update, *names):
        return {name: update[name] for name in names}

    full = small.dense(gradients(101))
    opposite = {name: (-values, indices) for name, (values, indices) in full.items()}
    honest, step = "honest gradient", "training difference"
    yield small.Case("gradient-dense", honest, full, 0.02)
    yield small.Case("gradient-other-nonce", honest, full, 0.02, nonce=small.NONCE)
    yield small.Case("gradient-sparse-f16", honest, wire.top_k(gradients(102), 0.1, np.float16), 0.02)
    yield small.Case("gradient-bias-only", honest, only(small.dense(gradients(103)), "fc.bias"), 0.1)
    yield small.Case("gradient-one-shard", honest, wire.top_k(gradients(104), 0.25), 0.02, shards=[2])
    yield small.Case("gradient-shard-order", honest, wire.top_k(gradients(105), 0.25), 0.02, shards=[3, 1])
    yield small.Case("difference-sparse", step, wire.top_k(steps(checkpoint, gradients), 0.2))
    yield small.Case("inverted-gradient", "inverted", opposite, 0.02)
    yield small.Case("noise-difference", "noise", small.noise(checkpoint, 401, 0.2, 0.2))

    indices = np.arange(0, 60, 3, dtype=np.int32)
    zeros = np.zeros(len(indices), np.float32)
    yield small.Case("zero-values", "zero", {"conv1.weight": (zeros, indices), "fc.weight": (zeros, indices)}, 0.1)

    bad = "malformed"
    values = np.array([0.5, -0.25, 0.125], np.float32)
    beyond = np.array([0, 3, CLASSES], np.int32)
    yield small.Case("malformed-index-numel", bad, {"fc.bias": (values, beyond)}, 0.1, "candidate_index_out_of_range")
    not_a_number = np.array([0.5, np.nan], np.float32)
    update = {"conv1.bias": (not_a_number, np.array([1, 2], np.int32))}
    yield small.Case("malformed-nan", bad, update, 0.1, "candidate_non_finite")
    # Finite weights, but the logit of class 0 overflows for every example.
    row = np.arange(checkpoint["fc.weight"].shape[1], dtype=np.int32)
    update = {"fc.weight": (np.full(len(row), 3e38, np.float32), row)}
    yield small.Case("malformed-huge-weights", bad, update, None, "non_finite_loss")
    # It overflows only where this one feature is large; the other losses are finite.
    overflows = forward(checkpoint, training[0])[1] > np.finfo(np.float32).max / 3e38
    feature = np.abs(overflows.mean(0) - 0.5).argmin()
    update = {"fc.weight": (np.array([3e38], np.float32), np.array([feature], np.int32))}
    yield small.Case("malformed-huge-weight", bad, update, None, "non_finite_loss")


def steps(checkpoint, gradients):
    """What five steps of plain descent change."""
    weights = {name: weight.astype(np.float64) for name, weight in checkpoint.items()}
    for seed in range(201, 206):
        weights = {name: weights[name] - 0.02 * found for name, found in gradients(seed, weights).items()}
    return {name: weights[name] - checkpoint[name] for name in checkpoint}


if __name__ == "__main__":
    main()
