#!/usr/bin/env python3
"""Where the nodes of every test model's graph run: packages each, asks `scorer check --json`, prints a table.

    ops/placement.py --provider cuda|webgpu|cpu [--scorer BINARY] [--graphs PATTERN]

PATTERN is a shell pattern of names in the first column, such as 'llama*'. A graph that the provider cannot run is a line of
the table with the worker's reason; a graph that fails in any other way is one too, and the exit code is then 1. Needs
ORT_DYLIB_PATH and nothing but Python's own library. ops/gpu-check runs it.
"""

import argparse
import collections
import fnmatch
import gzip
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests/model"
UNAVAILABLE = 69  # the exit code of a provider that cannot run the graph
PATIENCE_S = 600
NO_FIGURES = "-"


class Graph(NamedTuple):
    name: str
    file: pathlib.Path
    weights: pathlib.Path | None
    shards: pathlib.Path
    options: tuple[str, ...]


def small_graphs():
    """Those of tests/model, as the tests package them."""
    short, own_loss = ("--window", "16"), ("--objective", "graph_loss")
    for folder, graph, weights, options in [
        (".", "graph-named", "checkpoint", ()),
        (".", "graph-folded", "checkpoint", ()),
        (".", "graph-two-places", "checkpoint", ()),
        ("digits", "graph", "checkpoint", own_loss),
        ("half", "graph-f16", "checkpoint-f16", short),
        ("half", "graph-bf16", "checkpoint-bf16", short),
        ("inputs", "graph", "checkpoint", short),
        ("hazard", "graph", "checkpoint", short),
        ("merged", "graph-traced", "checkpoint", short),
        ("merged", "graph-scripted", "checkpoint", short),
        ("external", "graph", "checkpoint", short),
        ("elsewhere", "graph", "checkpoint", short),
        ("elsewhere", "initializers", "checkpoint", short),
        ("elsewhere", "bfloat16", None, short),
        *(("inert", graph, graph, own_loss) for graph in ("adapter", "copies", "experts", "gate", "normalised", "steep")),
    ]:
        home = MODELS / folder
        # This folder has no shards of its own.
        shards = MODELS / "hazard/shards" if folder == "merged" else home / "shards"
        name = graph if folder == "." else f"{folder}/{graph}"
        yield Graph(name, home / f"{graph}.onnx", weights and home / f"{weights}.safetensors", shards, options)


def architectures():
    """Those of Hugging Face, in the three states of tests/cases/architectures.rs."""
    home = MODELS / "architectures"
    table = json.loads((home / "cases.json").read_text())
    for name, case in table["cases"].items():
        language = case["objective"] == "causal_lm"
        options = ("--window", str(table["window"])) if language else ("--objective", case["objective"])
        for graph, weights in [("fresh", "fresh"), ("trained", "trained"), ("unfolded", "fresh")]:
            files = home / name / f"{graph}.onnx.gz", home / name / f"{weights}.safetensors.gz"
            yield Graph(f"{name}/{graph}", *files, home / "shards" / case["data"], options)


def plain(file, folder):
    """The file itself, or its content in this folder if it is compressed."""
    if file.suffix != ".gz":
        return file
    unpacked = folder / file.stem
    unpacked.write_bytes(gzip.decompress(file.read_bytes()))
    return unpacked


class Row(NamedTuple):
    """A line of the table; `sound` unless it is a fault."""

    device: str
    host: str
    remark: str
    sound: bool = True


def row(scorer, provider, graph):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        package = folder / "package"
        sources = ["--graph", plain(graph.file, folder), "--shards", graph.shards]
        sources += ["--weights", plain(graph.weights, folder)] if graph.weights else []
        made = run(scorer, "package", *sources, "--name", "placement", "--version", "1", *graph.options, "--out", package)
        if made.returncode != 0:
            return Row(NO_FIGURES, NO_FIGURES, "not packaged: " + first_line(made.stderr))
        settings = f"model.dir={package}", f"engine.execution_provider={provider}"
        return judged(run(scorer, "check", "--json", *(word for setting in settings for word in ("--set", setting))))


def run(*command):
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, -1, "", f"not done after {PATIENCE_S} s")


def judged(check):
    """What `scorer check --json` found."""
    try:
        report = json.loads(check.stdout)
    except json.JSONDecodeError:
        return Row(NO_FIGURES, NO_FIGURES, f"FAILED with {check.returncode}: {first_line(check.stderr)}", sound=False)
    if check.returncode != 0:
        refused = check.returncode == UNAVAILABLE
        [reason, *_] = [part["found"] for part in report["findings"] if part["verdict"] == "fail"] or [first_line(check.stderr)]
        return Row(NO_FIGURES, NO_FIGURES, ("refused: " if refused else "FAILED: ") + reason, refused)
    placement = report.get("placement")
    if placement is None:
        return Row(NO_FIGURES, NO_FIGURES, "FAILED: scorer check says nothing about placement", sound=False)
    operators = collections.Counter(node["op"] for node in report.get("host_nodes", []))
    remark = ", ".join(f"{operator} {count}" for operator, count in sorted(operators.items()))
    return Row(str(placement["device"]), str(placement["host"]), remark)


def first_line(text):
    lines = [line.removeprefix("scorer: ") for line in text.splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("note: ")), "no message")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", required=True)
    parser.add_argument("--scorer", default="target/release/scorer")
    parser.add_argument("--graphs", default="*", metavar="PATTERN")
    asked = parser.parse_args()
    graphs = [graph for graph in (*small_graphs(), *architectures()) if fnmatch.fnmatch(graph.name, asked.graphs)]
    if not graphs:
        parser.error(f"--graphs '{asked.graphs}' matches no graph")
    print(f"{'graph':<26}{'device':>7}{'host':>6}   on the host, first nodes")
    sound = True
    for graph in graphs:
        found = row(asked.scorer, asked.provider, graph)
        print(f"{graph.name:<26}{found.device:>7}{found.host:>6}   {found.remark}".rstrip(), flush=True)
        sound &= found.sound
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
