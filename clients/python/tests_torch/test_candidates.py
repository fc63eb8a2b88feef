"""Candidates from torch's tensors: what lists of the same numbers give, and what the real worker scores. See README.md here."""

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from scorer_client import candidates
from scorer_client.export.safetensors_file import read

ROOT = Path(__file__).resolve().parents[3]
W, B = [[0.5, 0.0, 0.0], [0.0, -0.25, 3.0]], [0.0, 1.0]
LISTS = {"w": ([2, 3], [0, 4, 5], [0.5, -0.25, 3.0]), "b": ([2], [1], [1.0])}
WRITERS = {
    "binary_v2": candidates.binary_v2,
    "binary_v2, half": lambda update: candidates.binary_v2(update, half=True),
    "safetensors": candidates.safetensors,
    "safetensors, dense": lambda update: candidates.safetensors(update, dense=True),
    "safetensors, dense, half": lambda update: candidates.safetensors(update, half=True, dense=True),
    "pt_chunks": lambda update: candidates.pt_chunks(update, 7, 8),
    "pt_chunks_compact": lambda update: candidates.pt_chunks_compact(update, 7, 8),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def forms():
    """One tensor in every way in which torch can hold it."""
    for device in DEVICES:
        for dtype in TYPES:
            yield f"{dtype} {device}", torch.tensor(W, dtype=dtype, device=device)
    w = torch.tensor(W)
    wide = torch.zeros(4, 7)
    wide[::2, 1::2] = w
    yield "a view with offset and strides", wide[::2, 1::2]
    yield "transposed", w.T.contiguous().T
    yield "requires grad", w.clone().requires_grad_()
    yield "in a graph", w.clone().requires_grad_() * 1
    yield "a parameter", torch.nn.Parameter(w.bfloat16())
    yield "negated lazily", torch.complex(torch.zeros(2, 3), -w).conj().imag
    yield "sparse", w.to_sparse()
    yield "sparse, twice the same element", torch.sparse_coo_tensor([[0, 0, 1, 1], [0, 0, 1, 2]], [0.25, 0.25, -0.25, 3.0], (2, 3))
    yield "rows", w.to_sparse_csr()


class Tensors(unittest.TestCase):
    def test_every_writer_takes_every_tensor(self):
        for form, dense in forms():
            for name, write in WRITERS.items():
                with self.subTest(form, writer=name):
                    self.assertEqual(write({"w": dense, "b": torch.tensor(B)}), write(LISTS))

    def test_every_writer_takes_pairs(self):
        shape, indices, values = LISTS["w"]
        every_other = torch.zeros(6, requires_grad=True)
        with torch.no_grad():
            every_other[::2] = torch.tensor(values)
        for device in DEVICES:
            for dtype in (torch.int32, torch.int64):
                pairs = [(torch.tensor(indices, dtype=dtype, device=device), torch.tensor(values, dtype=t, device=device)) for t in TYPES]
                pairs.append((torch.tensor(indices, dtype=dtype).flip(0).flip(0), every_other[::2]))
                for name, write in WRITERS.items():
                    for pair in pairs:
                        with self.subTest(writer=name, indices=dtype, values=pair[1].dtype):
                            self.assertEqual(write({"w": (torch.Size(shape), *pair), "b": LISTS["b"]}), write(LISTS))

    def test_errors_name_the_tensor_and_what_is_wrong(self):
        for error, entry, half, *said in [
            (TypeError, torch.zeros(2, device="meta"), False, "tensor 'w'", "meta"),
            (TypeError, torch.zeros(2, dtype=torch.complex64), False, "tensor 'w'", "complex64"),
            (TypeError, torch.zeros(2, dtype=torch.bool), False, "tensor 'w'", "bool"),
            (ValueError, torch.tensor([0.5, torch.nan], dtype=torch.bfloat16), False, "nan at place 1 (bfloat16) is not finite"),
            (ValueError, torch.tensor([1e5], dtype=torch.bfloat16), True, "place 0 (bfloat16) is too large for float16"),
            (TypeError, ([2], torch.tensor([0.0]), torch.tensor([1.0])), False, "tensor 'w', indices", "float32"),
            (ValueError, ([2], torch.tensor([2]), torch.tensor([1.0])), False, "tensor 'w', indices: index 2"),
            (ValueError, ([2], torch.tensor([0]), torch.ones(2)), False, "1 indices and 2 values"),
        ]:  # fmt: skip
            with self.subTest(said=said):
                with self.assertRaises(error) as raised:
                    candidates.binary_v2({"w": entry}, half)
                for part in said:
                    self.assertIn(part, str(raised.exception))

    def test_numpy_is_not_needed(self):
        program = """if True:
            import sys
            sys.modules["numpy"] = None
            import torch
            from scorer_client import candidates
            update = candidates.param_diff({"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 1.0, 2.0, 3.0])})
            candidates.safetensors(update, dense=True)
            candidates.pt_chunks(candidates.largest(update, 2), 1, 2)"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)


def model():
    torch.manual_seed(1)
    layers = [torch.nn.Embedding(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 8)]
    made = torch.nn.Sequential(*layers)
    made[2].weight = made[0].weight  # Tied, as a language model's head is.
    made[3].requires_grad_(False)
    return made


class Updates(unittest.TestCase):
    def setUp(self):
        self.model = model()
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model(torch.tensor([1, 2, 3])).square().mean().backward()

    def trained(self):
        torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], 0.1).step()
        return self.model.state_dict()

    def test_a_difference_has_no_counters_and_no_tied_or_frozen_tensors(self):
        update = candidates.param_diff(self.before, self.trained())
        self.assertEqual(set(update), {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"})
        for name, difference in update.items():
            self.assertTrue(torch.equal(difference, self.model.state_dict()[name] - self.before[name]), name)

    def test_the_models_own_memory_is_no_before(self):
        state = self.model.state_dict()
        with self.assertRaisesRegex(ValueError, "'0.weight'.*same memory"):
            candidates.param_diff(state, self.trained())

    def test_gradients_are_those_of_the_parameters(self):
        update = candidates.gradient(self.model.named_parameters())
        self.assertEqual(set(update), {"0.weight", "1.weight", "1.bias"})
        self.assertIs(update["0.weight"], self.model[0].weight.grad)

    def test_the_largest_are_those_that_a_sort_finds(self):
        torch.manual_seed(2)
        for dtype in TYPES:
            update = {"w": torch.randn(7, 5).to(dtype), "b": torch.randn(9).to(dtype), "empty": torch.zeros(0)}
            every = [(float(x.abs()), name, at) for name, t in update.items() for at, x in enumerate(t.reshape(-1))]
            for count in (1, 5, 20, 44, 1000):
                with self.subTest(dtype, count=count):
                    ours = candidates.largest(update, count)
                    found = [float(x.abs()) for _, _, values in ours.values() for x in values]
                    self.assertEqual(sorted(found), sorted(m for m, _, _ in every)[-count:])
                    for name, (_, indices, values) in ours.items():
                        self.assertTrue(torch.equal(update[name].reshape(-1)[indices], values))
                    each = candidates.largest(update, count, per_tensor=True)
                    self.assertEqual({name: len(entry[1]) for name, entry in each.items()}, {"w": min(count, 35), "b": min(count, 9)})


class Worker(unittest.TestCase):
    """`scorer` comes from the variable SCORER."""

    @classmethod
    def setUpClass(cls):
        cls.scorer = Path(os.environ["SCORER"]).resolve()
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = Path(temporary.name) / "demo"
        subprocess.run([cls.scorer, "init", cls.folder], check=True, capture_output=True)
        stored = read(cls.folder / "package/weights.safetensors")
        cls.before = {name: torch.frombuffer(bytearray(t.data), dtype=torch.float32).view(t.shape) for name, t in stored.items()}

    def delta(self, body, format):
        (self.folder / "candidate").write_bytes(body)
        words = ["score", "--config", "scorer.toml", "--model", "package", "--candidate", "candidate"]
        words += ["--format", format, "--semantics", "param_diff"]
        done = subprocess.run([self.scorer, *words], capture_output=True, text=True, cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr + done.stdout)
        return json.loads(done.stdout)["delta"]

    def test_every_format_is_the_same_candidate(self):
        torch.manual_seed(3)
        after = {name: (tensor + 0.01 * torch.randn(tensor.shape)).bfloat16() for name, tensor in self.before.items()}
        update = candidates.param_diff(self.before, after)
        exact = {name: write for name, write in WRITERS.items() if "half" not in name and "compact" not in name}
        for chosen in (update, candidates.largest(update, 200)):
            deltas = {self.delta(write(chosen), name.split(",")[0]) for name, write in exact.items()}
            self.assertEqual(len(deltas), 1, deltas)
            self.assertNotEqual(deltas, {0.0})


class Documentation(unittest.TestCase):
    def test_the_printed_examples_run(self):
        for page in ("docs/candidates.md", "clients/python/README.md"):
            text = (ROOT / page).read_text(encoding="utf-8")
            programs = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            (program,) = (program for program in programs if "candidates.param_diff(" in program)
            made = torch.nn.Linear(40, 50)
            names = {"model": made, "train": lambda: torch.nn.init.zeros_(made.weight)}
            with self.subTest(page):
                exec(program, names)
                self.assertEqual(names["candidate"].format, "safetensors")


if __name__ == "__main__":
    unittest.main()
