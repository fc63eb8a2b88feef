"""`export`: from a model to a package that is proven to score as torch does."""

import argparse
import gc
import importlib
import inspect
import json
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scorer_client.console import counted
from scorer_client.export import documents, scorer, shards, staging, token_file
from scorer_client.export.arguments import Request, model_name, request
from scorer_client.export.closing import Closing, next_commands
from scorer_client.export.documents import Split
from scorer_client.export.package import Package, globs
from scorer_client.export.proof import GRAPH, TELLING, Comparison, Proof
from scorer_client.export.quiet import quiet
from scorer_client.export.scorer import Scorer
from scorer_client.export.steps import INTERRUPTED, UNAVAILABLE, USAGE, Problem, Steps, tell
from scorer_client.export.tasks import Task, window_of
from scorer_client.export.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from scorer_client.export.source import Source

NEEDED = ("torch", "transformers", "onnxscript", "safetensors")


def export(arguments: argparse.Namespace) -> int:
    """The exit code; the failure of a step is told as such."""
    try:
        asked = request(arguments)
        closing = run(asked)
    except Problem as problem:
        for line in str(problem).splitlines():
            tell(f"scorer-client: export: {line}" if not line.startswith(" ") else line)
        return problem.code
    except KeyboardInterrupt:
        tell("scorer-client: export: interrupted; nothing is left behind")
        return INTERRUPTED
    print(json.dumps(closing.document(), indent=2) if asked.json else closing.text())
    return 0


@dataclass
class Work:
    """What the steps have found out."""

    asked: Request
    folder: Path
    scorer: Scorer
    source: "Source"
    window: int
    steps: Steps
    notes: list[str] = field(default_factory=list)
    weights: Path = Path()  # The checkpoint whose tensors the package has.
    names: dict[str, str] = field(default_factory=dict)  # Of the checkpoint, by those of the live model.

    @property
    def package(self) -> Package:
        return Package(self.folder / "package")

    @property
    def shards(self) -> Path:
        return self.folder / "shards"


def run(asked: Request) -> Closing:
    steps = Steps()
    staging.check(asked.out)
    with ExitStack() as stack:
        with steps.step("finding torch, transformers and scorer", "pip install 'scorer-client[export]'"):
            find_modules()
            program = scorer.find(asked.scorer, asked.provider)
        folder = stack.enter_context(staging.staging(asked.out))
        with steps.step("reading the model's configuration", "check MODEL; see docs/export.md"):
            work = opened(asked, folder, program, steps)
        with steps.step("making the shards", "check --shards; see docs/export.md"):
            rest = make_shards(work)
        baseline = exported(work)
        with steps.step("packaging", "see docs/models.md"):
            canary = make_package(work, baseline)
        proof, candidate = proven(work, baseline)
        with steps.step("moving the package into place", "check the disk"):
            keep(candidate, asked.candidate)
            if asked.rest is not None:
                asked.rest.write_text("".join(json.dumps(line) + "\n" for line in rest), encoding="utf-8")
            work.package.folder.rename(asked.out)  # Last: a package that is there is whole.
        return closing(work, canary, proof)


def find_modules() -> None:
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise Problem(f"{name} cannot be imported: {error}", "pip install 'scorer-client[export]'", UNAVAILABLE) from error


def opened(asked: Request, folder: Path, program: Scorer, steps: Steps) -> Work:
    from scorer_client.export.source import open_source

    source = open_source(asked.model, asked.base, asked.precision, asked.task, asked.tokenizer, asked.widened)
    return Work(asked, folder, program, source, window_of(asked.window, source.limit), steps)


def make_shards(work: Work) -> list[dict[str, str]]:
    """Returns what is not held out, as lines of --rest."""
    asked, source = work.asked, work.source
    work.shards.mkdir()
    ready = documents.ready_shards(asked.shards)
    tokens_only = all(file.suffix in token_file.SUFFIXES for file in documents.files(asked.shards))
    if asked.rest is not None and tokens_only:
        raise Problem("--rest writes texts, and --shards has tokens", "ask held_out.is_held_out, see docs/export.md", USAGE)
    if ready:
        shards.check(ready)
        for path in ready:
            shutil.copyfile(path, work.shards / path.name)
        work.notes.append(f"{counted(len(ready), 'shard')} of {asked.shards}, unchanged")
        return []
    row = asked.row_tokens or work.window + 1
    if row <= work.window:
        raise Problem(f"--row-tokens {row} is less than a window of {work.window} and one more", "set more", USAGE)
    split = Split(asked.held_out, max(documents.MIN_BLOCK, row), asked.bin_type, asked.rest is not None)
    how = (asked.row_tokens, asked.stride, asked.max_windows, split, source.vocabulary, asked.windows_per_row)
    plan = shards.Plan(source.task, work.window, *how)
    # Masked rows of tokens need the special ones, too.
    where = None if tokens_only and source.task is not Task.MASKED_LM else asked.tokenizer or source.tokenizer
    made = shards.make(asked.shards, plan, None if where is None else open_tokenizer(where), work.shards)
    for line in made.told:
        tell(f"    {line}")
    work.notes += made.told
    return made.rest


def exported(work: Work) -> float:
    """Writes the graph; returns torch's own loss. Afterwards the model is no longer in memory."""
    from scorer_client.export import graph, reference

    task, steps = work.source.task, work.steps
    with steps.step("loading the model", "check that transformers loads it: AutoModel.from_pretrained(DIR)"):
        with quiet():
            model = work.source.load()
    with steps.step("measuring torch's losses", "check that the model takes the inputs that the shards hold"):
        baseline = reference.loss(model, work.shards, task, work.window, work.asked.windows_per_row)
    with steps.step("exporting the graph", "torch cannot export this model as it is; see its message, and docs/export.md"):
        tokens = "tokens" if task is Task.CAUSAL_LM and takes_tokens(model) else "input_ids"
        samples = reference.samples(work.shards, task, work.window, tokens)
        work.names = dict(work.source.names(model))
        graph.export(model, samples, task, work.names, work.folder / "graph" / "model.onnx")
    with steps.step("finding the checkpoint's tensors", "check the checkpoint and the disk"):
        (work.folder / "checkpoint").mkdir()
        work.weights = work.source.weights(model, work.folder / "checkpoint")
    del model
    gc.collect()
    return baseline


def takes_tokens(model: Any) -> bool:
    return "tokens" in inspect.signature(model.forward).parameters


def make_package(work: Work, baseline: float) -> dict[str, float]:
    """Returns the canary: torch's own loss, which every worker compares with its baseline."""
    asked, source = work.asked, work.source
    name = asked.name or model_name(source.name)
    words = ["--graph", work.folder / "graph" / "model.onnx", "--weights", work.weights, "--shards", work.shards]
    words += ["--name", name, "--version", asked.version, "--out", work.package.folder]
    words += ["--objective", source.task.objective, "--window", work.window]
    words += ["--windows-per-row", asked.windows_per_row]
    for glob in asked.exclude:
        words += ["--exclude", glob]
    few = work.scorer.package([str(word) for word in words])
    if few is not None and documents.ready_shards(asked.shards):
        tell(f"    {few}")
        work.notes.append(few)
    shutil.rmtree(work.folder / "graph")
    canary = {"loss": baseline, "tolerance": asked.computed.canary_tolerance}
    fields: dict[str, Any] = {"canary": canary}
    trainable = source.trainable()
    if trainable is not None:
        others = set(work.package.manifest()["tensors"]) - set(trainable)
        fields["trainable"] = globs(trainable, others)
    fields["aliases"] = aliases(work.package.manifest(), work.names)
    work.package.add({name: value for name, value in fields.items() if value})
    return canary


def aliases(manifest: dict[str, Any], names: dict[str, str]) -> dict[str, str]:
    """Those that packaging found, and the names of the live model, which trainers send, too."""
    found: dict[str, str] = dict(manifest.get("aliases") or {})
    tensors = manifest["tensors"]
    found |= {live: found.get(name, name) for live, name in names.items() if live not in tensors}
    return {alias: name for alias, name in found.items() if name in tensors}


def proven(work: Work, baseline: float) -> tuple[Proof, Path]:
    """Compares the package with torch: as it is, and after a random update of every trainable tensor."""
    from scorer_client.export import reference, update
    from scorer_client.export.checkpoint import Checkpoint

    source, steps, package = work.source, work.steps, work.package
    tolerance = work.asked.computed.tolerance
    candidate, changed = work.folder / "update.safetensors", work.folder / "changed"
    with steps.step("proving the package's losses", "see docs/export.md, The proof"):
        measured = work.scorer.loss(package.folder)
        before = Comparison("loss", baseline, float(measured["loss"]), tolerance)
        before.check(GRAPH)
        tell(f"    {before}")
    with steps.step("proving an update of every tensor", "see docs/export.md, The proof"):
        shapes, aliases = package.trainable(), package.manifest().get("aliases") or {}
        changed.mkdir()
        for scale in update.SCALES:
            random = update.random_update(Checkpoint.of_file(package.folder / "weights.safetensors"), shapes, scale)
            source.change(random | {alias: random[name] for alias, name in aliases.items() if name in random}, work.weights, changed)
            with quiet():
                model = source.load(changed)
                loss = reference.loss(model, work.shards, source.task, work.window, work.asked.windows_per_row)
                del model
            if abs(loss - baseline) >= TELLING * tolerance:
                break
        candidate.write_bytes(update.candidate(random, shapes))
        scored = work.scorer.score(package.folder, candidate)
        after = Comparison("loss after a random update", loss, float(scored["loss_after"]), tolerance)
        proof = Proof(before, after, len(random), update.entries(random))
        proof.check()
        tell(f"    {after}")
    work.notes += proof.notes()
    return proof, candidate


def keep(candidate: Path, wanted: Path | None) -> None:
    if wanted is not None:
        shutil.copyfile(candidate, wanted)


def closing(work: Work, canary: dict[str, float], proof: Proof) -> Closing:
    asked, package = work.asked, Package(work.asked.out)
    manifest, shapes = package.manifest(), package.trainable()
    return Closing(
        out=asked.out,
        name=manifest["name"],
        version=manifest["version"],
        task=work.source.task.value,
        dtype=asked.precision.value,
        window=None if work.source.task is Task.OWN else work.window,
        windows=windows_of(work),
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        sizes=package.sizes(),
        canary=canary,
        proof=proof,
        notes=work.notes,
        commands=next_commands(shown(work.scorer.path), asked.out, asked.provider, asked.candidate),
        seconds=work.steps.seconds,
    )


def windows_of(work: Work) -> int:
    from scorer_client.export import reference

    if work.source.task is Task.CAUSAL_LM:
        return sum(len(batch) for batch in reference.token_batches(work.shards, work.window, work.asked.windows_per_row))
    return sum(len(next(iter(batch.values()))) for batch in reference.example_batches(work.shards))


def shown(path: Path) -> str:
    """The program as a person would call it."""
    if shutil.which("scorer") == str(path):
        return "scorer"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


