"""The wheels, installed into an empty environment, do everything: a score, `check`, a worker and a client.

    WORKER_BINARY=target/debug/scorer python3 tests/wheel_live.py

The wheels hold that binary (`ops/wheel --binary`); pip gets what they depend on from its index. The worker has a RabbitMQ
and a Redis of its own (ops/services). The GPU in software and a python3 with what ops/python.txt names come from ops/setup.
What is missing is a failure.
"""

import email
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import zipfile

from live_stack import CASES, MODEL, ROOT, Binary, Services, eventually

# What would show the worker the way to a library, or Python to a module, of this clone.
HINTS = ("ORT_DYLIB_PATH", "PYTHONPATH", "VIRTUAL_ENV")
CASE = next(case for case in json.loads(CASES.read_text())["cases"] if case["name"] == "gradient-medium-rate")
CANDIDATE = CASES.parent / CASE["file"]
FORMAT = ["--format", CASE["format"], "--semantics", CASE["semantics"], "--learning-rate", str(CASE["learning_rate"])]
CPU = ["--set", "engine.execution_provider=cpu"]


def pins(file: str) -> set[str]:
    return set(re.findall(r"^[a-z][^ \\\n]*==[^ \\\n]+", (ROOT / "ops" / file).read_text(), re.MULTILINE))


def run(*command: object, where: pathlib.Path = ROOT) -> str:
    done = subprocess.run(list(map(str, command)), cwd=where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def built(binary: str, out: pathlib.Path) -> dict[str, pathlib.Path]:
    """The path of each wheel, by the name of what it installs."""
    paths = map(pathlib.Path, run(sys.executable, ROOT / "ops/wheel", "--binary", binary, "--out", out).splitlines())
    return {path.name.split("-")[0].replace("_", "-"): path for path in paths}


class Metadata(unittest.TestCase):
    """Of wheels with a small binary."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.wheels = built("/bin/true", pathlib.Path(folder.name))

    def requirements(self, name: str) -> dict[str, str]:
        """The condition of each requirement."""
        with zipfile.ZipFile(self.wheels[name]) as wheel:
            path = next(path for path in wheel.namelist() if path.endswith(".dist-info/METADATA"))
            lines = email.message_from_bytes(wheel.read(path)).get_all("Requires-Dist", [])
        return {line.partition(";")[0]: line.partition(";")[2].strip() for line in lines}

    def test_a_workers_wheel_holds_the_binary_and_nothing_else(self) -> None:
        for name in ("scorer-worker", "scorer-worker-cuda"):
            with zipfile.ZipFile(self.wheels[name]) as wheel:
                content = [entry for entry in wheel.infolist() if ".dist-info/" not in entry.filename]
                self.assertEqual([entry.filename.split("/", 1)[1] for entry in content], ["scripts/scorer"])
                self.assertEqual(content[0].external_attr >> 16 & 0o777, 0o755)
                self.assertEqual(wheel.read(content[0]), pathlib.Path("/bin/true").read_bytes())

    def test_the_wheels_depend_on_what_is_pinned(self) -> None:
        webgpu = {pin: 'extra == "webgpu"' for pin in pins("webgpu.txt")}
        always = dict.fromkeys(pins("onnxruntime.txt"), "")
        self.assertEqual(self.requirements("scorer-worker"), always | webgpu)
        self.assertEqual(self.requirements("scorer-worker-cuda"), dict.fromkeys(pins("onnxruntime-gpu.txt"), ""))


class Installed(unittest.TestCase):
    """In an empty environment, far from this clone."""

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        wheels = built(os.environ["WORKER_BINARY"], cls.folder)
        for hint in HINTS:
            os.environ.pop(hint, None)
        run(sys.executable, "-m", "venv", cls.folder / "venv")
        cls.bin = cls.folder / "venv/bin"
        pip = [cls.bin / "python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(*pip, f"{wheels['scorer-worker']}[webgpu]", wheels["scorer-client"])
        os.environ["WORKER_BINARY"] = str(cls.bin / "scorer")
        cls.services = Services()
        cls.addClassCleanup(cls.services.stop)
        cls.binary = Binary(cls.services)

    def scorer(self, *words: object) -> str:
        return run(self.bin / "scorer", *words, where=self.folder)

    def score(self, *words: str) -> dict:
        said = self.scorer("score", "--model", self.binary.package, "--candidate", CANDIDATE, *FORMAT, *words)
        return json.loads(said)

    def test_a_candidate_is_scored(self) -> None:
        result = self.score(*CPU)
        self.assertEqual(result["status"], "scored")
        self.assertAlmostEqual(result["delta"], CASE["expect"]["delta"], delta=2e-6)

    def test_the_extra_brings_the_plugin_of_webgpu(self) -> None:
        result = self.score("--set", "engine.execution_provider=webgpu")
        self.assertEqual(result["execution_provider"], "WebGpuExecutionProvider")
        self.assertAlmostEqual(result["delta"], CASE["expect"]["delta"], delta=2e-6)

    def test_check_finds_the_pinned_library(self) -> None:
        said = self.scorer("check", *CPU, "--set", f"model.dir={self.binary.package}")
        version = pins("onnxruntime.txt").pop().partition("==")[2]
        self.assertRegex(said, rf"ok +provider +CPUExecutionProvider .*ONNX Runtime {re.escape(version)}")

    def test_a_worker_answers_the_client(self) -> None:
        worker = self.binary.worker("wheel")
        self.addCleanup(worker.kill)
        worker.start()
        client = [self.bin / "scorer-client", "--model", MODEL, "--namespace", "wheel"]
        client += ["--amqp", self.services.amqp, "--redis", self.services.redis]
        status = [*client, "status"]
        quiet = subprocess.DEVNULL
        eventually("a worker is ready", lambda: subprocess.run(status, stdout=quiet, stderr=quiet).returncode == 0)
        said = run(*client, "score", CANDIDATE, *FORMAT, where=self.folder)
        (delta,) = re.findall(r"scored +delta ([+-][\d.]+)", said)
        self.assertAlmostEqual(float(delta), CASE["expect"]["delta"], delta=2e-6)


if __name__ == "__main__":
    unittest.main()
