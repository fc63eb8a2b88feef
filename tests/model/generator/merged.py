"""Makes ../merged: a model whose untrained tensors an exporter merges, exported in the ways that exporters do.

Run by hand in the folder above, `python -m generator.merged`; the results are committed and no test runs this.
torch makes the graphs only. The expected losses are numpy's, in float64, and know nothing of any graph.
"""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

MODEL = Path(__file__).parent.parent
FOLDER = MODEL / "merged"
SHARDS = {1: MODEL / "hazard" / "shards" / "shard_000001.safetensors"}

VOCAB, WIDTH, RANK, WINDOW, BLOCKS = 16, 16, 4, 16, 2
EPS = float(np.float32(1e-5))  # as the graph holds it
SCALE = 0.25
TELLING = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)  # a softmax does not see a bias of the keys
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x, future):
        y = self.norm_1(x)
        scores = (self.q(y) @ self.k(y).transpose(1, 2) * SCALE).masked_fill(future, -1e9)
        x = x + self.o(scores.softmax(-1) @ self.v(y))
        y = self.norm_2(x)
        return x + F.relu(self.fc(y)) + self.up(y[..., :RANK])


class Model(nn.Module):
    """tokens int64 [batch, seq] -> logits [batch, seq, VOCAB]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, future)
        return self.head(self.norm(x))


class Bare(Model):
    """The same, with a normalisation that has no weights: exporters give it ones of its own."""

    def forward(self, tokens):
        future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(F.layer_norm(x, (WIDTH,)), future)
        return self.head(self.norm(x))


def main():
    warnings.filterwarnings("ignore")
    FOLDER.mkdir(exist_ok=True)
    checkpoint = weights()
    save_file(checkpoint, FOLDER / "checkpoint.safetensors")
    (FOLDER / "checkpoint.safetensors").chmod(0o644)  # safetensors writes 0600
    traced = export(Model, checkpoint, "graph-traced.onnx", dynamo=True)
    export(Model, checkpoint, "graph-scripted.onnx", dynamo=False)
    export(Bare, checkpoint, "graph-constant.onnx", dynamo=True)
    for node in traced.graph.node:
        node.ClearField("metadata_props")
    write(traced, FOLDER / "graph-untold.onnx")
    expected(checkpoint)


def weights():
    """Irregular values where a tensor is trained; ones and zeros where it is not."""
    found = {}
    for position, (name, weight) in enumerate(Model().state_dict().items()):
        shape = tuple(weight.shape)
        if "norm" in name or name.endswith(("bias", "up.weight")):
            found[name] = (np.zeros if name.endswith(("bias", "up.weight")) else np.ones)(shape, np.float32)
        else:
            found[name] = irregular(shape, 17 + 97 * position) / np.float32(2)
    return found


def irregular(shape, seed):
    """Values in (-1, 1), no two of them equal; integers make them, so they are the same everywhere."""
    count = int(np.prod(shape))
    drawn = [(seed + 7919 * (i + 1) ** 2) % 10007 for i in range(count)]
    assert len(set(drawn)) == count, "choose another seed"
    return (np.array(drawn, np.float32) / np.float32(5003.5) - np.float32(1)).reshape(shape)


def export(kind, checkpoint, name, dynamo):
    model = kind().eval()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in checkpoint.items()})
    how = {"input_names": ["tokens"], "output_names": ["logits"], "dynamo": dynamo, "opset_version": 18}
    if dynamo:
        batch = {0: torch.export.Dim("batch")}
        how |= {"dynamic_shapes": {"tokens": batch}, "optimize": True, "external_data": False, "verbose": False}
    else:
        how |= {"dynamic_axes": {"tokens": {0: "batch"}, "logits": {0: "batch"}}}
    torch.onnx.export(model, (torch.zeros((2, WINDOW), dtype=torch.int64),), FOLDER / name, **how)
    proto = onnx.load(FOLDER / name)
    strip(proto)
    write(proto, FOLDER / name)
    return proto


def strip(proto):
    """Drops stack traces and local paths, which differ by machine; keeps what tells whose a node is."""
    graph = proto.graph
    for item in (proto, graph, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("doc_string")
        kept = [entry for entry in node.metadata_props if entry.key in TELLING]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def write(proto, path):
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    held = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.size > 1 and array.dtype == np.float32 and (array == array.flat[0]).all():
            held[tensor.name] = (list(array.shape), sum(list(node.input).count(tensor.name) for node in proto.graph.node))
    print(path.name, path.stat().st_size, "bytes; merged initializers, their shapes and uses:", held)


def forward(w, tokens):
    """The model in float64."""

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    future = np.triu(np.ones((tokens.shape[1],) * 2, bool), 1)
    x = w["embed.weight"][tokens]
    for block in (f"blocks.{i}" for i in range(BLOCKS)):
        y = norm(x, f"{block}.norm_1")
        scores = linear(y, f"{block}.q") @ linear(y, f"{block}.k").transpose(0, 2, 1) * SCALE
        scores = np.exp(np.where(future, -np.inf, scores - scores.max(-1, keepdims=True)))
        x = x + linear(scores / scores.sum(-1, keepdims=True) @ linear(y, f"{block}.v"), f"{block}.o")
        y = norm(x, f"{block}.norm_2")
        x = x + np.maximum(linear(y, f"{block}.fc"), 0.0) + linear(y[..., :RANK], f"{block}.up")
    return linear(norm(x, "norm"), "head")


def chunks():
    """The windows of an empty nonce, as the contract cuts them."""
    found = []
    for shard, path in SHARDS.items():
        for row, tokens in enumerate(load_file(path)["tokens"]):
            key = hashlib.sha256(f":{shard}:{row}:0:{len(tokens)}:{WINDOW}".encode()).digest()
            start = int.from_bytes(key[:8], "big") % (len(tokens) - WINDOW)
            found.append(tokens[start : start + WINDOW + 1])
    return np.stack(found).astype(np.int64)


def loss(checkpoint, windows):
    logits = forward({name: weight.astype(np.float64) for name, weight in checkpoint.items()}, windows[:, :-1])
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())


def expected(checkpoint):
    """The loss after the same change to each merged tensor: only where it is made tells them apart."""
    windows, cases = chunks(), []
    before = loss(checkpoint, windows)
    for name, weight in checkpoint.items():
        if (weight == weight.flat[0]).all():
            change = irregular(weight.shape, 5) / np.float32(2)
            after = loss(checkpoint | {name: weight + change}, windows)
            cases.append({"tensor": name, "shape": list(weight.shape), "change": change.ravel().tolist(), "loss": after})
            print(f"{name:22} {after:.9f}")
    losses = sorted([before, *(case["loss"] for case in cases)])
    closest = min(b - a for a, b in zip(losses, losses[1:], strict=False))
    print(f"{len(cases)} merged tensors; no two losses are closer than {closest:.1e}")
    assert closest > 2e-5, "a swap might not be seen; choose another change"
    document = {"loss": before, "cases": cases}
    (FOLDER / "cases.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
