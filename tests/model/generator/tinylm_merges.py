"""Makes ../merges.json: what merges of the language model's candidates do, each coalition computed on its own by PyTorch, in
float64.

Run in the folder above: `python -m generator.tinylm_merges`.
"""

import json

from safetensors.numpy import load_file

from . import merges, reference, scoring, small, tinylm
from .handmade import MODEL

# Candidates of each merge with their weights; the second and third have two that are equal.
MERGES = (
    {"gradient-unsorted": 0.25, "difference-few-steps": 0.25, "inverted-gradient-301": 0.25, "noise-small": 0.25},
    {"difference-more-steps": 0.5, "difference-more-steps again": 0.5, "gradient-medium-rate": 1.5},
    {"inverted-difference-303": -0.5, "gradient-one-layer": 0.7, "gradient-one-layer again": 0.7, "zero-effect": 1.0},
)


def main():
    shards = {int(path.stem.split("_")[1]): load_file(path)["tokens"] for path in (MODEL / "shards").iterdir()}
    windows = scoring.Windows(shards, tinylm.CONTEXT)
    checkpoint = load_file(MODEL / "checkpoint.safetensors")
    cases = {case["name"]: case for case in json.loads((MODEL / "cases.json").read_text())["cases"]}

    def member(key, weight):
        name = key.split()[0]
        return key.replace(" ", "-"), name, weight, cases[name]["learning_rate"]

    found = []
    for asked in MERGES:
        members = [member(key, weight) for key, weight in asked.items()]
        found.append(merges.merge(MODEL, checkpoint, members, lambda weights: reference.losses(weights, windows)))
    small.write_table({"merges": found}, MODEL / "merges.json")


if __name__ == "__main__":
    main()
