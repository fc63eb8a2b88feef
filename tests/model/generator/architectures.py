"""Makes ../architectures: models of today's kinds at their first version and trained, exported as people export them.

Run by hand in the folder above, `python -m generator.architectures [NAME ...]`; the results are committed and no test runs
this. It needs what `requirements-architectures.txt` names. The same versions give the same bytes.

Each model is tiny, and is there in two states: `fresh`, where norms are ones and biases zeros, as at version 1 of any run,
and `trained` by a few steps on random tokens, so that no two tensors are equal. `save_pretrained` writes the checkpoint,
whose names lack the `m.` that the wrapper puts before them in the graph. `torch.onnx.export(dynamo=True)` writes one graph
of each that folds and merges, as is its default, and one of the fresh model that keeps every parameter (optimize=False).
The losses are PyTorch's own: before, after a small sparse update of every tensor, and after that of one tensor alone.
"""

import gzip
import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save, save_file

from .families import FAMILIES, KINDS, WINDOW

OUT = Path(__file__).resolve().parent.parent / "architectures"
SHARD, STEPS, RATE, LARGEST = 1, 12, 0.2, 100_000
# What packaging reads of the exporter's remarks; the others are nine tenths of the file.
READ = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node")
EXPORTER = ("torch", "onnxscript", "transformers", "peft")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    for kind in KINDS:
        (OUT / "shards" / kind).mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.from_numpy(values) for name, values in data(kind).items()}
        (OUT / "shards" / kind / f"shard_{SHARD}.safetensors").write_bytes(save(tensors))
    for name in sys.argv[1:] or FAMILIES:
        note(name, make(name))


def note(name, case):
    """Puts one case into the table; the others stay."""
    table = OUT / "cases.json"
    cases = json.loads(table.read_text())["cases"] if table.exists() else {}
    cases[name] = case
    document = {
        "exporter": {package: version(package) for package in EXPORTER},
        "window": WINDOW,
        "cases": {name: cases[name] for name in FAMILIES if name in cases},
    }
    table.write_text(json.dumps(document, indent=1) + "\n")


def make(name):
    family = FAMILIES[name]
    folder = OUT / name
    folder.mkdir(exist_ok=True)
    model, states = family.model(), {}
    for state in ("fresh", "trained"):
        if state == "trained":
            train(model, family)
        round_off(model)
        checkpoint = saved(model)
        if state == "fresh":
            update = sparse(checkpoint)
            one = one_of(family, model, checkpoint, update)
            pack({key: part for pair in update.values() for key, part in pair.items()}, folder / "update.safetensors.gz")
        pack(checkpoint, folder / f"{state}.safetensors.gz")
        export(model, family, folder / f"{state}.onnx.gz", True)
        if state == "fresh":
            export(model, family, folder / "unfolded.onnx.gz", False)
        states[state] = losses(family, model, checkpoint, update, one)
        print(f"{name:10} {state:8} {states[state]}", flush=True)
    buffers = dict(model.named_buffers())
    same = [key for key, weight in checkpoint.items() if weight.numel() > 1 and weight.unique().numel() == 1]
    assert buffers.keys() >= set(same), f"{name}: not trained: {same}"
    live = renamed(model, checkpoint)
    return {
        "class": family.name, "shows": family.shows, "data": family.kind, "objective": KINDS[family.kind].objective,
        "tensors": sum(tensor.is_floating_point() for tensor in checkpoint.values()), "one": one, "live": live, "losses": states,
    }


def losses(family, model, checkpoint, update, one):
    changed = {name: apply(weight, update.get(name), name) for name, weight in checkpoint.items()}
    return {
        "before": loss(family, model),
        "all": loss(family, with_weights(family, model, changed)),
        "one": loss(family, with_weights(family, model, checkpoint | {one: changed[one]})),
    }


def saved(model):
    """The checkpoint, as the library saves it."""
    if hasattr(model, "peft_config"):
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = load_file(Path(folder) / "model.safetensors")
    own = model.state_dict()
    if sum(tensor.numel() for tensor in checkpoint.values()) == 0 or len(checkpoint) > len(own):
        # It saves each expert by itself, which is a part of a tensor of the model that is exported.
        return {name: tensor.clone() for name, tensor in own.items()}
    return checkpoint


def with_weights(family, model, checkpoint):
    """Another model with these weights and the rest of this one's."""
    other = family.model()
    other.load_state_dict(model.state_dict())
    if family.adapters:
        set_peft_model_state_dict(other, checkpoint)
        return other
    if checkpoint.keys() <= other.state_dict().keys():
        other.load_state_dict(checkpoint, strict=False)
        return other
    with tempfile.TemporaryDirectory() as folder:
        save_file(checkpoint, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


def renamed(model, checkpoint):
    """Names of the live model that the checkpoint lacks, and the tensors that they name."""
    same = lambda a, b: a.shape == b.shape and torch.equal(a, b)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in checkpoint}
    found = {name: [other for other, weight in checkpoint.items() if same(tensor, weight)] for name, tensor in own.items()}
    return {name: others[0] for name, others in found.items() if len(others) == 1}


def train(model, family):
    """A few steps of SGD on random examples; batch norms take their statistics from them."""
    model.train(family.kind == "images")
    rng = np.random.default_rng(3)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for _ in range(STEPS):
        each(family, model, {name: torch.from_numpy(values) for name, values in KINDS[family.kind].data(rng).items()}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def round_off(model):
    """Leaves the upper half of the bits of each matrix's entries, so that the files are half as large."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.copy_(tensor.bfloat16().float())


def data(kind):
    return KINDS[kind].data(np.random.default_rng(5))


@torch.no_grad()
def loss(family, model):
    """The mean over the windows of an empty nonce."""
    tensors = data(family.kind)
    if family.kind == "causal":
        tensors = {"tokens": cut(tensors["tokens"])}
    return each(family, model, {name: torch.from_numpy(values) for name, values in tensors.items()}).double().mean().item()


def each(family, model, tensors):
    """The loss of each row."""
    wrapped = KINDS[family.kind](model)
    if family.kind != "causal":
        return wrapped(**tensors)
    rows = tensors["tokens"].long()
    logits = wrapped(rows[:, :WINDOW]).float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1 : WINDOW + 1], reduction="none").double().mean(1)


def export(model, family, path, optimize):
    kind = KINDS[family.kind]
    tensors = {"input_ids": np.zeros((2, WINDOW), np.int64)} if family.kind == "causal" else data(family.kind)
    program = torch.onnx.export(
        kind(model), tuple(torch.from_numpy(tensors[name][:2]) for name in kind.inputs), dynamo=True, optimize=optimize,
        input_names=list(kind.inputs), output_names=[kind.output], external_data=False, verbose=False,
        dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in kind.inputs),
    )
    proto = program.model_proto
    for holder in (proto.graph, *proto.functions):
        for item in (holder, *holder.node):
            keep = [entry for entry in item.metadata_props if entry.key in READ]
            del item.metadata_props[:]
            item.metadata_props.extend(keep)
            item.ClearField("doc_string")
        del holder.value_info[:]
    write(proto.SerializeToString(deterministic=True), path)


def cut(tokens):
    """The windows of an empty nonce, WINDOW + 1 tokens each."""
    found = []
    for row, line in enumerate(tokens):
        seed = hashlib.sha256(f":{SHARD}:{row}:0:{len(line)}:{WINDOW}".encode()).digest()
        start = int.from_bytes(seed[:8], "big") % (len(line) - WINDOW)
        found.append(line[start : start + WINDOW + 1])
    return np.stack(found)


def sparse(checkpoint):
    """For an eighth of each tensor's entries, what is added to them."""
    rng, update = np.random.default_rng(11), {}
    for name, weight in checkpoint.items():
        if not weight.is_floating_point():
            continue
        count = max(1, weight.numel() // 8)
        indices = np.sort(rng.choice(weight.numel(), count, replace=False)).astype(np.int32)
        values = (rng.normal(size=count) * 0.1).astype(np.float32)
        if name.endswith("running_var"):
            values = np.abs(values)
        update[name] = {f"{name}::indices": torch.from_numpy(indices), f"{name}::values": torch.from_numpy(values)}
    return update


def one_of(family, model, checkpoint, update):
    """The matrix whose change moves the loss the most: of an adapter not A, which has no effect while B is zero."""
    before = loss(family, model)

    def effect(name):
        changed = checkpoint | {name: apply(checkpoint[name], update[name], name)}
        return abs(loss(family, with_weights(family, model, changed)) - before)

    return max((name for name, weight in checkpoint.items() if weight.dim() > 1), key=effect)


def apply(weight, update, name):
    changed = weight.clone().contiguous()
    if update is not None:
        changed.view(-1)[update[f"{name}::indices"].long()] += update[f"{name}::values"]
    return changed


def pack(tensors, path):
    write(save({name: tensor.contiguous() for name, tensor in tensors.items()}), path)


def write(content, path):
    packed = gzip.compress(content, 9, mtime=0)
    assert len(packed) <= LARGEST, f"{path} is of {len(packed)} bytes"
    path.write_bytes(packed)


if __name__ == "__main__":
    main()
