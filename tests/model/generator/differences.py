"""Makes ../differences.safetensors: what real candidates do to each of 4,096 windows, before and after.

Run by hand in the folder above, `python -m generator.differences`; the result is committed and no test runs this. It needs
what `requirements-architectures.txt` names, scipy, and the Python of README.md. The same versions give the same bytes.

Plans of any size are drawn from its columns: `MODEL::before`, and `MODEL::CANDIDATE` for the loss after. It refuses to
finish unless the losses that are recorded in the tables of cases come out again, and unless every loss is finite.
"""

import gzip
import json
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load

from . import architectures, corpus, reference, scoring, tinylm, wire
from .families import FAMILIES, IGNORED, KINDS, ROWS, VOCAB, WINDOW

MODEL = Path(__file__).resolve().parent.parent
FILE = MODEL / "differences.safetensors"
COUNT, BATCH = 4096, 32
# A candidate for targets two ahead is measured on them, and so has a baseline of its own.
TINY = {1: "tinylm", 2: "tinylm-two-ahead"}
# One of each kind: grouped queries, experts, windows that slide, learned positions, ALiBi, state space, teacher forcing,
# masked tokens, convolutions, patches.
CHOSEN = ("llama", "mixtral", "gemma2", "gpt2", "bloom", "mamba", "t5", "bert", "resnet", "vit")
# Ids below are for padding, the start and the end, and what hides a token.
FIRST, HIDDEN = 3, 2
SAME, ALIKE = 1e-9, 1e-6  # of mean losses in float64, and in float32


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    _, text = corpus.load()
    columns = {}
    for name, losses in chain(others(text), tiny(text)):
        assert losses.shape == (COUNT,) and np.isfinite(losses).all(), name
        columns[name] = losses.astype(np.float32)
        print(f"{name:42} {losses.mean():.6f}", flush=True)
    # Of several remarks the library does not keep the order.
    save_file(columns, FILE, metadata={"made by": "python -m generator.differences"})
    FILE.chmod(0o644)  # safetensors writes 0600


def tiny(text):
    """The test model before and after each candidate that is scored."""
    checkpoint, shards = load_file(MODEL / "checkpoint.safetensors"), shards_of_cases()
    for shift, name in TINY.items():
        yield f"{name}::before", tiny_losses(checkpoint, tiny_windows(text, shift))
    for case in json.loads((MODEL / "cases.json").read_text(encoding="utf-8"))["cases"]:
        expect, shift = case["expect"], case["label_shift"]
        if expect["status"] != "scored":
            continue
        update = wire.decode((MODEL / case["file"]).read_bytes())
        after = scoring.apply(checkpoint, update, case["semantics"], case["learning_rate"])
        own = scoring.Windows(shards, tinylm.CONTEXT, case["nonce"], case["shards"], shift)
        assert own.plan == expect["plan"], case["name"]
        agree(reference.losses(after, own).mean(), expect["loss_after"], SAME, case["name"])
        yield f"{TINY[shift]}::{case['name']}", tiny_losses(after, tiny_windows(text, shift))


def shards_of_cases():
    return {int(path.stem.removeprefix("shard_")): load_file(path)["tokens"] for path in (MODEL / "shards").iterdir()}


def tiny_windows(text, shift):
    return scoring.Windows({0: text}, tinylm.CONTEXT, shift=shift, per_row=COUNT)


@torch.no_grad()
def tiny_losses(checkpoint, windows):
    model, found = tinylm.load(checkpoint, torch.float64), []
    for start in range(0, COUNT, BATCH):
        inputs, targets = windows.inputs[start : start + BATCH], windows.targets[start : start + BATCH]
        logits = model(torch.from_numpy(inputs)).numpy()
        found.append(scoring.negative_log_likelihood(logits[:, : targets.shape[1]], targets).mean(-1))
    return np.concatenate(found)


def others(text):
    """Each chosen architecture, trained, before and after the update of all its tensors."""
    cases = json.loads((architectures.OUT / "cases.json").read_text())["cases"]
    for name in CHOSEN:
        family, folder, recorded = FAMILIES[name], architectures.OUT / name, cases[name]["losses"]["trained"]
        checkpoint, update = unpacked(folder / "trained.safetensors.gz"), unpacked(folder / "update.safetensors.gz")
        updated = {key: architectures.apply(weight, its(update, key), key) for key, weight in checkpoint.items()}
        rows = examples(family.kind, text)
        for column, recorded_as, weights in (("before", "before", checkpoint), ("update", "all", updated)):
            model = architectures.with_weights(family, family.model(), weights)
            agree(architectures.loss(family, model), recorded[recorded_as], ALIKE, name)
            yield f"{name}::{column}", other_losses(family, model, rows)


def unpacked(path):
    return load(gzip.decompress(path.read_bytes()))


def its(update, name):
    """The part of an update that is for one tensor."""
    return update if f"{name}::values" in update else None


@torch.no_grad()
def other_losses(family, model, rows):
    parts = [{name: values[start : start + BATCH] for name, values in rows.items()} for start in range(0, COUNT, BATCH)]
    return torch.cat([architectures.each(family, model, part).double() for part in parts]).numpy()


def examples(kind, text):
    """Windows of the text for models of tokens; images as the model was trained on."""
    rng = np.random.default_rng(13)
    # A vocabulary of 48 has not every byte.
    tokens = FIRST + text % (VOCAB - FIRST)
    rows = scoring.Windows({0: tokens}, WINDOW, per_row=COUNT).chunks
    if kind == "causal":
        found = {"tokens": rows}
    elif kind == "masked":
        hidden = rng.random((COUNT, WINDOW)) < 0.25
        hidden[:, 3] = True
        rows = rows[:, :WINDOW]
        found = {"input_ids": np.where(hidden, HIDDEN, rows), "labels": np.where(hidden, rows, IGNORED)}
    elif kind == "forced":
        # What the decoder is to say is what follows in the text.
        rows = scoring.Windows({0: tokens}, WINDOW + WINDOW // 2, per_row=COUNT).chunks
        found = {"input_ids": rows[:, :WINDOW], "labels": rows[:, WINDOW:-1]}
    else:
        drawn = [KINDS[kind].data(rng) for _ in range(0, COUNT, ROWS)]
        found = {name: np.concatenate([each[name] for each in drawn])[:COUNT] for name in drawn[0]}
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def agree(found, recorded, within, name):
    assert abs(found - recorded) < within, (name, found, recorded)


if __name__ == "__main__":
    main()
