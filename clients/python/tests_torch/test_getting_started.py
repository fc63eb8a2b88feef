"""The first four steps of "Your own model" in docs/getting-started.md, as they are printed, with a module of torch."""

import json
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_model

ROOT = Path(__file__).resolve().parents[3]


class Model(torch.nn.Module):
    """A small causal language model with a tied head."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 32)
        self.mix = torch.nn.Linear(32, 32)
        self.head = torch.nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        seen = self.embedding(tokens)
        weights = torch.ones(tokens.shape[1], tokens.shape[1]).tril()
        mean = (weights / weights.sum(1, keepdim=True)) @ seen
        return self.head(torch.nn.functional.gelu(self.mix(seen)) + mean)


class OwnModel(unittest.TestCase):
    def setUp(self):
        here, temporary = Path.cwd(), tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.addCleanup(os.chdir, here)
        self.scorer = Path(os.environ["SCORER"]).resolve()
        os.chdir(temporary.name)

    def train(self, model):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(20):
            first = torch.randint(64, (16, 1))
            tokens = (first + torch.arange(129)) % 64
            losses = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()

    def test_the_printed_programs_and_commands_end_with_a_verdict(self):
        text = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
        section = text.split("## Your own model\n")[1].split("### 5.")[0].replace("\\\n", " ")
        torch.manual_seed(1)
        model, verdicts = Model(), []
        numpy.save("held-out.npy", numpy.arange(32_000) % 64)
        for program, command in re.findall(r"^```python\n(.*?)^```$|^    (\w[^\n]*)$", section, re.DOTALL | re.MULTILINE):
            if program.startswith("# candidate.py"):
                self.train(model)
                save_model(model, "trained.safetensors")
            if program:
                exec(program, {"model": model})
            elif command.startswith("scorer "):
                done = subprocess.run(f"exec {self.scorer.parent}/{command}", shell=True, capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, f"{command}: {done.stderr}{done.stdout}")
                self.assertNotIn("warning", done.stderr)
                verdicts += [json.loads(done.stdout)] if command.startswith("scorer score ") else []
        (verdict,) = verdicts
        self.assertEqual((verdict["status"], verdict["windows"]), ("scored", 248))
        self.assertGreater(verdict["delta"], 0)


if __name__ == "__main__":
    unittest.main()
