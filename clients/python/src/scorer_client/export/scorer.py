"""The program `scorer`, which makes packages and measures them."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer_client.export.steps import UNAVAILABLE, Problem, tell

FEW_WINDOWS = re.compile(r"scorer: warning: few windows")
BUILDS = ("release", "demo", "debug")


@dataclass(frozen=True)
class Scorer:
    path: Path
    provider: str

    def package(self, words: Sequence[str]) -> str | None:
        """Returns its warning of few windows, if any: for shards that were cut here, other advice is better."""
        done = self._run(["package", *words])
        few = None
        for line in done.stderr.splitlines():
            if FEW_WINDOWS.match(line):
                few = line.removeprefix("scorer: ")
            else:
                tell(f"    {line}")
        if done.returncode:
            raise Problem(
                "scorer package refused the model; its message is above",
                "do what it says; --exclude GLOB leaves out tensors of the checkpoint that the model does not use",
            )
        return few

    def loss(self, package: Path) -> dict[str, Any]:
        """The model's own loss, as a result message."""
        return self._measure(["validate", "--model", str(package)])

    def score(self, package: Path, candidate: Path) -> dict[str, Any]:
        words = ["--model", str(package), "--candidate", str(candidate), "--format", "safetensors", "--semantics", "param_diff"]
        return self._measure(["score", *words])

    def _measure(self, words: Sequence[str]) -> dict[str, Any]:
        done = self._run([*words, "--set", f"engine.execution_provider={self.provider}"])
        advice = "see docs/models.md, Precision and providers; --provider cuda proves the package on a GPU"
        try:
            message = json.loads(done.stdout)
        except ValueError:
            last = " / ".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
            raise Problem(f"scorer {words[0]}: {last.removeprefix('scorer: ')}", advice) from None
        if not isinstance(message, dict) or message.get("status") != "scored":
            raise Problem(f"scorer {words[0]} answers {done.stdout.strip()[:500]}", advice)
        return message

    def _run(self, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run([self.path, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise Problem(f"{self.path} cannot be run: {error.strerror}", "set --scorer to the program", UNAVAILABLE) from error


def find(given: Path | None, provider: str) -> Scorer:
    """The one given, or that of the variable SCORER, or in PATH, or built here or in a folder above."""
    named = given or (Path(os.environ["SCORER"]) if os.environ.get("SCORER") else None)
    if named is not None:
        if not os.access(named, os.X_OK) or named.is_dir():
            raise Problem(f"{named} is no program", "set --scorer or the variable SCORER to the program `scorer`", UNAVAILABLE)
        return Scorer(named.resolve(), provider)
    installed = shutil.which("scorer")
    here = Path.cwd()
    built = (folder / "target" / build / "scorer" for folder in (here, *here.parents) for build in BUILDS)
    path = Path(installed) if installed else next((path for path in built if os.access(path, os.X_OK)), None)
    if path is None:
        raise Problem(
            "the program `scorer` is not in PATH, and was not built here",
            "build it with `cargo build --release`, or set --scorer or the variable SCORER to it",
            UNAVAILABLE,
        )
    return Scorer(path, provider)
