"""`export` from end to end, with real models, torch and the real worker. See README.md here."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from scorer_client.cli import main
from scorer_client.export import shards
from scorer_client.export.safetensors_file import Tensor

from tests_torch import models

HERE = Path(__file__).resolve().parents[1]
LOSS = 2e-6
CPU = "engine.execution_provider=cpu"


def setUpModule():
    global FOLDER
    temporary = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(temporary.cleanup)
    FOLDER = Path(temporary.name)
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        models.write(FOLDER)
    models.write_table(FOLDER / "table")


class Exports(unittest.TestCase):
    def export(self, source, *words, code=0):
        """What the command prints on standard output, and on standard error."""
        self.out = FOLDER / f"package-{self.id().rsplit('.', 1)[-1]}-{len(list(FOLDER.iterdir()))}"
        told, said = io.StringIO(), io.StringIO()
        words = ["export", str(source), "--out", str(self.out), *map(str, words)]
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
            done = main(words)
        self.assertEqual(done, code, said.getvalue())
        self.assertEqual(list(FOLDER.glob(".*")), [], "something is left behind")
        self.assertEqual(self.out.exists(), code == 0)
        return told.getvalue(), said.getvalue()

    def text(self, name, *words):
        told, _ = self.export(FOLDER / name, "--shards", FOLDER / "held-out.txt", "--window", 32, "--max-windows", 40, "--json", *words)
        return json.loads(told)

    def score(self, closing, candidate):
        program = shlex.split(closing["commands"][0])[0]
        words = [program, "score", "--model", closing["out"], "--candidate", candidate, "--format", "safetensors", "--set", CPU]
        done = subprocess.run([*map(str, words), "--semantics", "param_diff"], capture_output=True, text=True)
        return json.loads(done.stdout)


def columns(package):
    for _, tensors in shards.read(package / "shards"):
        yield {name: tensor_of(tensor) for name, tensor in tensors.items()}


def tensor_of(tensor: Tensor):
    types = {"I32": torch.int32, "I64": torch.int64, "F32": torch.float32}
    return torch.frombuffer(bytearray(tensor.data), dtype=types[tensor.dtype]).view(tensor.shape)


def own_loss(model, package):
    """The mean over the rows of the loss that transformers itself computes of each."""
    found = []
    with torch.no_grad():
        for part in columns(package):
            if "tokens" in part:
                part = {"input_ids": part["tokens"].long(), "labels": part["tokens"].long()}
            for row in range(len(part["labels"])):
                found.append(model(**{name: column[row : row + 1] for name, column in part.items()}).loss.item())
    return sum(found) / len(found)


class Models(Exports):
    def check(self, closing, model):
        """The canary is the loss that transformers computes, and the worker takes the package."""
        self.assertAlmostEqual(closing["canary"]["loss"], own_loss(model.eval(), self.out), delta=LOSS)
        for comparison in (closing["proof"]["baseline"], closing["proof"]["updated"]):
            self.assertLess(abs(comparison["torch"] - comparison["package"]), LOSS)
        moved = closing["proof"]["updated"]["torch"] - closing["proof"]["baseline"]["torch"]
        self.assertGreater(abs(moved), 10 * LOSS)
        done = subprocess.run(shlex.split(closing["commands"][0]), capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn("warm-up", done.stdout)

    def test_language_models_have_the_losses_of_transformers(self):
        autos = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
        for name in ("llama", "gpt2", "gpt-neox", "mixtral", "bert", "t5"):
            with self.subTest(name):
                closing = self.text(name)
                auto = autos.get(name, transformers.AutoModelForCausalLM)
                self.check(closing, auto.from_pretrained(FOLDER / name))

    def test_images(self):
        told, _ = self.export(FOLDER / "vit", "--shards", FOLDER / "images", "--json")
        self.check(json.loads(told), transformers.AutoModelForImageClassification.from_pretrained(FOLDER / "vit"))

    def test_pairs_of_different_lengths(self):
        words = models.text().split()
        lines = [{"source": " ".join(words[n : n + n % 20 + 1]), "target": " ".join(words[n + 30 : n + 40])} for n in range(40)]
        (FOLDER / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told, _ = self.export(FOLDER / "t5", "--shards", FOLDER / "pairs.jsonl", "--window", 32, "--json")
        self.check(json.loads(told), transformers.AutoModelForSeq2SeqLM.from_pretrained(FOLDER / "t5"))

    def test_a_module_of_ones_own(self):
        told, _ = self.export("tests_torch.models:tabular", "--shards", FOLDER / "table", "--json")
        closing = json.loads(told)
        (part,) = columns(self.out)
        module = models.tabular().eval()
        module.load_state_dict(load_file(self.out / "weights.safetensors"))
        with torch.no_grad():
            expected = module(**part).double().mean().item()
        self.assertAlmostEqual(closing["proof"]["baseline"]["package"], expected, delta=LOSS)

    def test_a_language_model_of_ones_own(self):
        words = ["--shards", FOLDER / "held-out.txt", "--tokenizer", FOLDER / "llama", "--window", 32, "--json"]
        told, _ = self.export("tests_torch.models:language", *words)
        self.assertEqual((json.loads(told)["task"], json.loads(told)["tensors"]), ("causal-lm", 3))
        self.assertEqual(json.loads((self.out / "model.json").read_text())["aliases"], {"head.weight": "embed.weight"})

    def test_rows_longer_than_a_window_and_a_split_corpus(self):
        rest = FOLDER / "rest.jsonl"
        self.text("llama", "--row-tokens", 60, "--stride", 20, "--held-out", "0.5", "--rest", rest)
        kept = "".join(json.loads(line)["text"] for line in rest.read_text().splitlines())
        self.assertTrue(0 < len(kept) < len((FOLDER / "held-out.txt").read_text()))

    def test_flat_shards_are_few_windows_until_more_are_taken_of_each_row(self):
        flat = FOLDER / "flat"
        flat.mkdir()
        for number in range(1, 3):
            save_file({"tokens": torch.arange(2000, dtype=torch.int32) % 64}, flat / f"shard_{number}.safetensors")
        words = ["tests_torch.models:language", "--shards", flat, "--window", 32, "--json"]
        told, said = self.export(*words)
        self.assertEqual(json.loads(told)["windows"], 2)
        self.assertEqual(said.count("warning: few windows (2)"), 1)
        self.assertIn("--windows-per-row 16 or more", said)
        self.assertIn("warning: few windows (2)", json.loads(told)["notes"][-1])
        told, said = self.export(*words, "--windows-per-row", 16)
        self.assertEqual(json.loads(told)["windows"], 32)
        self.assertNotIn("few windows", said)

    def test_weights_of_16_bits(self):
        for name in ("llama", "gpt2", "mixtral", "bert", "t5"):
            with self.subTest(name):
                self.assertEqual(self.text(name, "--dtype", "float16")["dtype"], "float16")
                manifest = json.loads((self.out / "model.json").read_text())
                self.assertEqual(manifest["precision"], "f16")

    def test_weights_of_16_bits_computed_in_float32(self):
        for name in ("llama", "gpt2", "bert", models.LORA):
            for dtype in ("float16", "bfloat16"):
                with self.subTest(name, dtype=dtype):
                    closing = self.text(name, "--dtype", dtype, "--compute-float32")
                    self.assertLess(abs(closing["proof"]["updated"]["torch"] - closing["proof"]["updated"]["package"]), LOSS)

    def test_a_checkpoint_of_bfloat16_is_exact_in_float32(self):
        folder = FOLDER / "llama-bf16"
        models.model("llama").to(torch.bfloat16).save_pretrained(folder)
        shutil.copy(FOLDER / "llama/tokenizer.json", folder)
        shutil.copy(FOLDER / "llama/tokenizer_config.json", folder)
        self.check(self.text("llama-bf16"), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


class Names(Exports):
    def test_candidates_may_use_the_names_of_the_live_model(self):
        closing = self.text("gpt-neox")
        step = torch.full((models.VOCABULARY, models.WIDTH), 0.01)
        losses = set()
        for name in ("embed_out.weight", "lm_head.weight"):
            save_file({name: step * torch.arange(models.WIDTH)}, FOLDER / "named.safetensors")
            result = self.score(closing, FOLDER / "named.safetensors")
            self.assertEqual(result["status"], "scored", result)
            losses.add(result["loss_after"])
        self.assertEqual(len(losses), 1)
        self.assertNotEqual(losses, {closing["canary"]["loss"]})

    def test_an_adapters_difference_is_scored_under_the_names_of_its_file(self):
        closing = self.text(models.LORA)
        trained = {
            name: torch.full_like(weight, 0.01).cumsum(-1) for name, weight in load_file(FOLDER / models.LORA / "adapter_model.safetensors").items()
        }
        results = []
        for rename in (lambda name: name, lambda name: name.replace(".weight", ".default.weight")):
            save_file({rename(name): step for name, step in trained.items()}, FOLDER / "adapter-update.safetensors")
            results.append(self.score(closing, FOLDER / "adapter-update.safetensors"))
        self.assertEqual([result["status"] for result in results], ["scored", "scored"], results)
        self.assertEqual(results[0]["loss_after"], results[1]["loss_after"])
        self.assertEqual(results[0]["candidate"]["tensors"], len(trained))

    def test_the_base_of_an_adapter_is_frozen(self):
        closing = self.text(models.LORA)
        save_file({"model.norm.weight": torch.ones(models.WIDTH)}, FOLDER / "base-update.safetensors")
        result = self.score(closing, FOLDER / "base-update.safetensors")
        self.assertEqual(result["error"]["code"], "candidate_unknown_tensor")


class Failures(Exports):
    """Each leaves nothing behind, names its step and says what to do."""

    def fails(self, source, step, said, *words, code=1):
        _, told = self.export(source, *words, code=code)
        self.assertIn(f'the step "{step}" failed', told)
        self.assertIn(said, told)
        self.assertIn("What to do: ", told)

    def test_a_checkpoint_without_some_parameters(self):
        folder = FOLDER / "incomplete"
        shutil.copytree(FOLDER / "llama", folder)
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.fails(folder, "loading the model", "lacks 1 parameter of LlamaForCausalLM: model.norm.weight", "--shards", FOLDER / "held-out.txt")

    def test_a_window_beyond_the_models_positions(self):
        words = ["--shards", FOLDER / "held-out.txt", "--window", 129]
        self.fails(FOLDER / "llama", "reading the model's configuration", "set --window 128 or less", *words, code=64)

    def test_tokens_of_another_vocabulary(self):
        tokens = FOLDER / "other.bin"
        tokens.write_bytes(torch.full((400,), 512, dtype=torch.int16).numpy().tobytes())
        self.fails(FOLDER / "llama", "making the shards", "the model's vocabulary has 512 tokens", "--shards", tokens)

    def test_text_for_a_model_without_a_tokenizer(self):
        folder = FOLDER / "mute"
        models.model("llama").save_pretrained(folder)
        words = ["--shards", FOLDER / "held-out.txt"]
        self.fails(folder, "making the shards", "set --tokenizer", *words, code=64)

    def test_a_module_that_returns_a_mean(self):
        self.fails("tests_torch.models:mean", "measuring torch's losses", "return the loss of each row", "--shards", FOLDER / "table")

    def test_a_module_that_torch_cannot_export(self):
        self.fails("tests_torch.models:branching", "exporting the graph", "docs/export.md", "--shards", FOLDER / "table")

    def test_a_model_that_is_nowhere(self):
        words = ["--shards", FOLDER / "table"]
        self.fails(FOLDER / "none", "reading the model's configuration", "neither a directory nor", *words, code=64)
        self.fails("tests_torch.models:none", "reading the model's configuration", "no attribute", *words, code=64)

    def test_a_proof_that_fails(self):
        """A module that is different every time it is built cannot have the losses that were measured."""
        self.fails("tests_torch.models:restless", "proving an update of every tensor", "which is more than 2e-06", "--shards", FOLDER / "table")

    def test_a_signal(self):
        out = FOLDER / "signalled"
        words = [sys.executable, "-m", "scorer_client", "export", FOLDER / "llama", "--out", out, "--shards", FOLDER / "held-out.txt"]
        with subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True, cwd=HERE, env=os.environ) as running:
            for line in running.stderr:
                if line.startswith("loading the model"):
                    running.send_signal(signal.SIGTERM)
        self.assertEqual((running.returncode, out.exists(), list(FOLDER.glob(".*"))), (143, False, []))


if __name__ == "__main__":
    unittest.main()
