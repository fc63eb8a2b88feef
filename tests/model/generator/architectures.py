"""Makes ../architectures: Hugging Face models of today's kinds at their first version, exported as people export them.

Run by hand in the folder above, `python -m generator.architectures [NAME ...]`; the results are committed and no test runs
this. It needs torch, transformers, onnxscript, numpy and safetensors; `requirements-architectures.txt` has the versions.

A model is tiny and new: its norms are ones and its biases zeros, as at version 1 of any run. `save_pretrained` writes the
checkpoint, whose names lack the `m.` that the wrapper puts before them in the graph; `torch.onnx.export(dynamo=True)` writes
one graph that keeps every parameter (optimize=False) and one that folds (optimize=True). The losses are PyTorch's own, before
and after a small sparse update of every tensor.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from .handmade import MODEL

OUT = MODEL / "architectures"
VOCAB, WINDOW, ROWS, ROW_TOKENS, SHARD = 48, 16, 3, 40, 1
BLOCKS = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
GPT2 = dict(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
OPT = dict(vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
           max_position_embeddings=32)
SMALL = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {
    "llama": ("Llama", BLOCKS),
    "llama-tied": ("Llama", BLOCKS | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", BLOCKS),
    "qwen2": ("Qwen2", BLOCKS),
    "qwen3": ("Qwen3", BLOCKS | {"head_dim": 8}),
    "gemma2": ("Gemma2", BLOCKS | {"head_dim": 8}),
    "gemma3": ("Gemma3", BLOCKS | {"head_dim": 8}),
    "phi3": ("Phi3", BLOCKS),
    "gpt2": ("GPT2", GPT2),
    "gptneox": ("GPTNeoX", BLOCKS),
    "opt": ("OPT", OPT),
    "olmo2": ("Olmo2", BLOCKS),
    "smollm3": ("SmolLM3", BLOCKS),
    "granite": ("Granite", BLOCKS),
    "cohere": ("Cohere", BLOCKS),
    "stablelm": ("StableLm", BLOCKS),
    "falcon": ("Falcon", SMALL),
    "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)),
    "mamba": ("Mamba", dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2)),
}
# What packaging reads of the exporter's remarks; the others are nine tenths of the file.
READ = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node")
HEADS = {"GPT2": "LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


class Wrapper(torch.nn.Module):
    """What everybody writes: without it the export fails on the model's own outputs."""

    def __init__(self, model):
        super().__init__()
        self.m = model

    def forward(self, input_ids):
        return self.m(input_ids=input_ids, use_cache=False).logits


def main():
    (OUT / "shards").mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(5).integers(3, VOCAB, (ROWS, ROW_TOKENS)).astype(np.int32)
    save({"tokens": torch.from_numpy(tokens)}, OUT / "shards" / f"shard_{SHARD}.safetensors")
    windows = torch.from_numpy(cut(tokens)).long()
    chosen = sys.argv[1:] or ARCHITECTURES
    cases = {name: make(name, windows) for name in chosen}
    document = {"window": WINDOW, "cases": cases}
    (OUT / "cases.json").write_text(json.dumps(document, indent=1) + "\n")


def make(name, windows):
    family, options = ARCHITECTURES[name]
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**options)
    torch.manual_seed(7)
    model = getattr(transformers, family + HEADS.get(family, "ForCausalLM"))(config).eval()
    folder = OUT / name
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        checkpoint = load_file(Path(saved) / "model.safetensors")
    save(checkpoint, folder / "checkpoint.safetensors")
    for graph, optimize in (("graph", False), ("graph-folded", True)):
        export(model, folder / f"{graph}.onnx", optimize)
    before = loss(model, windows)
    update = sparse(checkpoint)
    save({key: part for name, pair in update.items() for key, part in pair.items()}, folder / "update.safetensors")
    with tempfile.TemporaryDirectory() as saved:
        changed = {name: apply(weight, update[name], name) for name, weight in checkpoint.items()}
        save_file(changed, Path(saved) / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(saved)
        after = loss(type(model).from_pretrained(saved).eval(), windows)
    print(f"{name:10} {before:.6f} -> {after:.6f}, {len(checkpoint)} tensors")
    return {"before": before, "after": after, "tensors": len(checkpoint)}


def export(model, path, optimize):
    program = torch.onnx.export(
        Wrapper(model), (torch.zeros((2, WINDOW), dtype=torch.int64),), dynamo=True, optimize=optimize, input_names=["input_ids"],
        output_names=["logits"], dynamic_shapes={"input_ids": {0: torch.export.Dim("batch")}}, external_data=False, verbose=False,
    )
    proto = program.model_proto
    for holder in (proto.graph, *proto.functions):
        for item in (holder, *holder.node):
            keep = [entry for entry in item.metadata_props if entry.key in READ]
            del item.metadata_props[:]
            item.metadata_props.extend(keep)
            item.ClearField("doc_string")
        del holder.value_info[:]
    path.write_bytes(proto.SerializeToString(deterministic=True))


def cut(tokens):
    """The windows of an empty nonce, WINDOW + 1 tokens each."""
    found = []
    for row, line in enumerate(tokens):
        seed = hashlib.sha256(f":{SHARD}:{row}:0:{len(line)}:{WINDOW}".encode()).digest()
        start = int.from_bytes(seed[:8], "big") % (len(line) - WINDOW)
        found.append(line[start : start + WINDOW + 1])
    return np.stack(found)


@torch.no_grad()
def loss(model, windows):
    logits = model(input_ids=windows[:, :WINDOW], use_cache=False).logits.float()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    return each.double().mean(1).mean().item()


def sparse(checkpoint):
    rng, update = np.random.default_rng(11), {}
    for name, weight in checkpoint.items():
        count = max(1, weight.numel() // 8)
        indices = np.sort(rng.choice(weight.numel(), count, replace=False)).astype(np.int32)
        values = (rng.normal(size=count) * 0.1).astype(np.float32)
        update[name] = {f"{name}::indices": torch.from_numpy(indices), f"{name}::values": torch.from_numpy(values)}
    return update


def apply(weight, update, name):
    changed = weight.clone().contiguous()
    changed.view(-1)[update[f"{name}::indices"].long()] += update[f"{name}::values"]
    return changed


def save(tensors, path):
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main()
