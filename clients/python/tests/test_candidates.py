"""The writers of candidates, against what torch and safetensors themselves wrote of the same update."""

import base64
import io
import json
import math
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import unittest
import zipfile
import zlib

import numpy
import zstandard
from scorer_client import candidates

ROOT = pathlib.Path(__file__).resolve().parents[3]
FORMATS = ROOT / "tests/model/candidates/formats"


def fixture(name):
    return (FORMATS / name).read_bytes()


def decoded(body, code="f"):
    """binary_v2, read by the words of its definition; what is no map is a writer's remark."""
    update = {}
    for name, entry in json.loads(body).items():
        if isinstance(entry, dict):
            k, packed = entry["k"], zlib.decompress(base64.b64decode(entry["data"]))
            numbers = struct.unpack(f"<{k}{code}{k}i", packed)
            update[name] = (entry["shape"], list(numbers[k:]), list(numbers[:k]))
    return update


def entries(body):
    """Of a torch zip, by their names below its folder; those with a dot are torch's remarks on itself."""
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


class Unpickler(pickle.Unpickler):
    """Python's own reading of a pickle, in which a call of torch is a tuple, and so is a storage."""

    def find_class(self, module, name):
        if module == "_codecs":
            return super().find_class(module, name)
        return lambda *arguments: (f"{module}.{name}", *arguments)

    def persistent_load(self, description):
        kind, _, key, *rest = description
        return (kind, key, *rest)


def unpickled(body):
    return Unpickler(io.BytesIO(entries(body)["data.pkl"])).load()


def operations(body):
    return [operation.name for operation, _, _ in pickletools.genops(entries(body)["data.pkl"])]


def inflated(body):
    """Another zlib than that of the fixtures may pack the same data into other bytes."""
    root = unpickled(body)
    return root | {"chunks": [chunk | {"data": zlib.decompress(chunk["data"])} for chunk in root["chunks"]]}


UPDATE = decoded(fixture("source.json"))
DENSE = decoded(fixture("source-dense.json"))


class BinaryV2(unittest.TestCase):
    def test_it_decodes_to_the_update(self):
        self.assertEqual(decoded(candidates.binary_v2(UPDATE)), UPDATE)

    def test_half_rounds_the_values(self):
        for name, (_, _, values) in decoded(candidates.binary_v2(UPDATE, half=True), "e").items():
            rounded = [struct.unpack("<e", struct.pack("<e", value))[0] for value in UPDATE[name][2]]
            self.assertEqual(values, rounded)


class Safetensors(unittest.TestCase):
    def test_the_bytes_are_those_of_the_formats_own_writer(self):
        sparse = {name: entry for name, entry in UPDATE.items() if name in DENSE}
        for name, body in {
            "pairs-i32-f32": candidates.safetensors(UPDATE),
            "pairs-i32-f16": candidates.safetensors(UPDATE, half=True),
            "dense-f32": candidates.safetensors(sparse, dense=True),
            "dense-f16": candidates.safetensors(sparse, half=True, dense=True),
        }.items():
            with self.subTest(name):
                self.assertEqual(body, fixture(f"{name}.safetensors"))


class PtChunks(unittest.TestCase):
    def test_pickle_and_storages_are_those_of_torch(self):
        ours = candidates.pt_chunks(UPDATE, 7, 8)
        self.assertEqual(entries(ours), entries(fixture("torch-i32-f32.pt")))

    def test_the_same_update_is_the_same_bytes(self):
        self.assertEqual(candidates.pt_chunks(UPDATE, 7, 8), candidates.pt_chunks(UPDATE, 7, 8))

    def test_the_compact_form_has_the_pickle_of_torch(self):
        ours, torchs = candidates.pt_chunks_compact(UPDATE, 7, 8), fixture("torch-compact-bytes.pt")
        self.assertEqual(operations(ours), operations(torchs))
        self.assertEqual(inflated(ours), inflated(torchs))

    def test_pickle_reads_numbers_of_every_size_and_more_chunks_than_a_byte_counts(self):
        # Late names are keys of storages too, so that late texts are written once and recalled.
        update = {str(n): ([1, 2, 3, 1 << n % 24], [0, 5], [0.5, -1.0]) for n in range(300)}
        root = unpickled(candidates.pt_chunks(update, 3 << 30, 1 << 40))
        self.assertEqual((root["old_version"], root["new_version"]), (3 << 30, 1 << 40))
        self.assertEqual([chunk["name"] for chunk in root["chunks"]], list(update))
        for n, chunk in enumerate(root["chunks"]):
            self.assertEqual(chunk["shape"], (1, 2, 3, 1 << n % 24))
            for key, field in ((2 * n, "indices"), (2 * n + 1, "values")):
                storage = ("storage", str(key), "cpu", 2)
                view = ("torch._utils._rebuild_tensor_v2", storage, 0, (2,), (1,), False, ("collections.OrderedDict",))
                self.assertEqual(chunk[field], view)

    def test_a_name_may_be_any_text(self):
        update = {'tensör "1"': ([2], [1], [0.5])}
        (chunk,) = unpickled(candidates.pt_chunks(update, 1, 2))["chunks"]
        self.assertIn(chunk["name"], update)
        self.assertEqual(decoded(candidates.binary_v2(update)), update)

    def test_pickle_reads_an_update_of_nothing(self):
        self.assertEqual(unpickled(candidates.pt_chunks({}, 1, 2)), {"old_version": 1, "new_version": 2, "chunks": []})


class Zstd(unittest.TestCase):
    def test_the_frame_holds_the_candidate(self):
        body = candidates.safetensors(UPDATE)
        frame = candidates.zstd(body)
        self.assertLess(len(frame), len(body))
        self.assertEqual(zstandard.decompress(frame), body)


WRITERS = {
    "binary_v2": candidates.binary_v2,
    "binary_v2, half": lambda update: candidates.binary_v2(update, half=True),
    "safetensors": candidates.safetensors,
    "safetensors, half": lambda update: candidates.safetensors(update, half=True),
    "safetensors, dense": lambda update: candidates.safetensors(update, dense=True),
    "safetensors, dense, half": lambda update: candidates.safetensors(update, half=True, dense=True),
    "pt_chunks": lambda update: candidates.pt_chunks(update, 7, 8),
    "pt_chunks_compact": lambda update: candidates.pt_chunks_compact(update, 7, 8),
}


class Arrays(unittest.TestCase):
    """What arrays give is what the same numbers in lists give."""

    LISTS = {"w": ([2, 3], [0, 4, 5], [0.5, -0.25, 3.0]), "b": ([2], [1], [1.0])}

    def test_every_writer_takes_every_type_and_every_layout(self):
        w = numpy.array([[0.5, 0, 0], [0, -0.25, 3]])
        every_other = numpy.zeros((4, 6))
        every_other[::2, ::2] = w
        forms = {type: w.astype(type) for type in ("f2", "f4", "f8", ">f4")}
        forms |= {"Fortran's order": numpy.asfortranarray(w), "transposed": w.T.copy().T, "a view": every_other[::2, ::2]}
        for form, dense in forms.items():
            shape, indices, values = self.LISTS["w"]
            for kind, entry in {
                "dense": dense,
                "pairs": (dense.shape, numpy.array(indices), numpy.array(values, dense.dtype)),
                "reversed views": (shape, numpy.array(indices[::-1], "i4")[::-1], numpy.array(values[::-1], "f4")[::-1]),
                "mixed with lists": (numpy.array(shape), indices, numpy.array(values)),
            }.items():
                for name, write in WRITERS.items():
                    with self.subTest(form, kind=kind, writer=name):
                        self.assertEqual(write({"w": entry, "b": numpy.array([0, 1], "f4")}), write(self.LISTS))

    def test_arrays_of_no_dimension_and_of_no_element(self):
        update = {"scale": numpy.array(2.0), "none": numpy.zeros((0, 3))}
        lists = {"scale": ([], [0], [2.0]), "none": ([0, 3], [], [])}
        for name, write in WRITERS.items():
            with self.subTest(name):
                self.assertEqual(write(update), write(lists))

    def test_errors_name_the_tensor_and_what_is_wrong(self):
        values = numpy.array([0.5, 1.0])
        for error, entry, half, *said in [
            (TypeError, ([2], numpy.array([0.0, 1.0]), values), False, "tensor 'w', indices", "float64"),
            (TypeError, ([2], [0.5, 1.5], [1, 2]), False, "tensor 'w', indices", "integers"),
            (ValueError, ([2], numpy.array([0, 2]), values), False, "tensor 'w', indices", "index 2", "2 elements"),
            (ValueError, ([2], [-1, 1], [0.5, 1.0]), False, "index -1"),
            (ValueError, ([1 << 40], [1 << 33], [0.5]), False, "index 8589934592 does not fit 32 bits"),
            (ValueError, ([2], numpy.array([1]), values), False, "tensor 'w'", "1 indices and 2 values"),
            (ValueError, ([2, 1], numpy.array([[0, 1]]), values), False, "tensor 'w', indices", "shape [1, 2]"),
            (TypeError, ([2], [0, 1], values.astype("c8")), False, "tensor 'w', values", "complex64"),
            (TypeError, numpy.array([True]), False, "tensor 'w'", "bool"),
            (TypeError, numpy.array(["text"]), False, "tensor 'w'"),
            (TypeError, [0.5, 1.0], False, "tensor 'w'", "list", "(shape, indices, values)"),
            (TypeError, ([2], [0], ["text"]), False, "tensor 'w', values"),
            (TypeError, ([2], 0, 1.0), False, "tensor 'w', indices", "int"),
            (ValueError, numpy.array([0.5, numpy.nan], "f4"), False, "tensor 'w'", "nan at place 1 (float32)", "not finite"),
            (ValueError, ([2], [1], [math.inf]), False, "tensor 'w', values", "not finite"),
            (ValueError, numpy.array([1e5], "f4"), True, "the value 100000 at place 0 (float32) is too large for float16"),
            (ValueError, ([2], [1], [1e5]), True, "100000", "too large for float16"),
            (ValueError, numpy.array([1e300]), False, "1e+300", "too large for float32"),
        ]:  # fmt: skip
            with self.subTest(said=said):
                with self.assertRaises(error) as raised:
                    candidates.binary_v2({"w": entry}, half)
                for part in said:
                    self.assertIn(part, str(raised.exception))

    def test_neither_library_is_imported_for_lists(self):
        program = """if True:
            import sys
            from scorer_client import candidates
            candidates.safetensors({"w": ([2], [1], [0.5])})
            assert not {"numpy", "torch"} & set(sys.modules)"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)


class Parameter:
    """What a gradient is taken of, as a trainer without torch could have it."""

    def __init__(self, grad):
        self.grad = grad


class Updates(unittest.TestCase):
    BEFORE = {"w": numpy.array([[1.0, 2.0], [3.0, 4.0]], "f4"), "b": numpy.array([1.0, 1.0], "f2"), "steps": numpy.array(3)}
    AFTER = {"w": numpy.array([[1.0, 2.5], [2.0, 4.0]], "f4"), "b": numpy.array([1.0, 4.0], "f2"), "steps": numpy.array(4)}

    def lists(self, update):
        return {name: (list(shape), indices.tolist(), values.tolist()) for name, (shape, indices, values) in update.items()}

    def test_a_difference_has_what_changed_and_no_counters(self):
        same = {"frozen": numpy.ones(3)}
        update = candidates.param_diff(self.BEFORE | same, self.AFTER | {"frozen": numpy.ones(3)})
        said = {"w": ([2, 2], [1, 2], [0.5, -1.0]), "b": ([2], [1], [3.0])}
        self.assertEqual(candidates.binary_v2(update), candidates.binary_v2(said))

    def test_tied_tensors_are_one(self):
        tied = numpy.array([1.0, 2.0])
        before = {"embedding": tied - 1, "head": tied - 1}
        self.assertEqual(list(candidates.param_diff(before, {"embedding": tied, "head": tied})), ["embedding"])

    def test_the_largest_of_all_and_of_each(self):
        update = candidates.param_diff(self.BEFORE, self.AFTER)
        for count, per_tensor, said in [
            (1, False, {"b": ([2], [1], [3.0])}),
            (2, False, {"w": ([2, 2], [2], [-1.0]), "b": ([2], [1], [3.0])}),
            (1, True, {"w": ([2, 2], [2], [-1.0]), "b": ([2], [1], [3.0])}),
            (9, False, {"w": ([2, 2], [1, 2], [0.5, -1.0]), "b": ([2], [1], [3.0])}),
        ]:
            with self.subTest(count=count, per_tensor=per_tensor):
                self.assertEqual(self.lists(candidates.largest(update, count, per_tensor)), said)

    def test_gradients_are_those_that_are_there(self):
        parameters = {"w": Parameter(numpy.array([0.0, 2.0])), "frozen": Parameter(None), "unused": Parameter(numpy.zeros(2))}
        update = candidates.gradient(parameters.items())
        self.assertEqual(candidates.binary_v2(update), candidates.binary_v2({"w": ([2], [1], [2.0])}))

    def test_errors_say_what_and_where(self):
        w, same = {"w": numpy.ones(2)}, numpy.ones(2)
        for error, make, *said in [
            (ValueError, lambda: candidates.param_diff(w, {}), "only before has 1 of the tensors: 'w'"),
            (ValueError, lambda: candidates.param_diff({}, {str(n): 0 for n in range(9)}), "'0', '1', '2', ..."),
            (ValueError, lambda: candidates.param_diff(w, {"w": numpy.ones((2, 1))}), "'w'", "[2] before", "[2, 1] after"),
            (TypeError, lambda: candidates.param_diff(w, {"w": numpy.ones(2, int)}), "'w'", "float64 before", "int64 after"),
            (TypeError, lambda: candidates.param_diff(w, {"w": [1.0, 1.0]}), "tensor 'w', after: a list"),
            (ValueError, lambda: candidates.param_diff(w, {"w": numpy.ones(2)}), "no tensor changed"),
            (ValueError, lambda: candidates.param_diff({"w": same}, {"w": same}), "'w'", "same memory", "clone()"),
            (ValueError, lambda: candidates.gradient([("w", Parameter(None))]), "no parameter has a gradient"),
            (TypeError, lambda: candidates.gradient([("w", Parameter("text"))]), "tensor 'w', gradient: a str"),
            (ValueError, lambda: candidates.largest(w, 0), "count is 0"),
            (TypeError, lambda: candidates.largest({"w": ([2], [0], [1.0])}, 1), "'w'", "tuple"),
            (ValueError, lambda: candidates.binary_v2(candidates.largest({"w": numpy.array([9, math.nan])}, 1)), "'w'", "nan"),
        ]:  # fmt: skip
            with self.subTest(said=said):
                with self.assertRaises(error) as raised:
                    make()
                for part in said:
                    self.assertIn(part, str(raised.exception))


class Documentation(unittest.TestCase):
    """The examples of docs/candidates.md are what the writers write."""

    UPDATE = {"w": ([2, 2], [0, 3], [0.5, -0.25])}

    def setUp(self):
        self.text = (ROOT / "docs/candidates.md").read_text(encoding="utf-8")

    def test_binary_v2(self):
        for half in (False, True):
            self.assertIn(candidates.binary_v2(self.UPDATE, half).decode(), self.text)

    def test_safetensors(self):
        body = candidates.safetensors(self.UPDATE)
        end = 8 + int.from_bytes(body[:8], "little")
        said = f"    {body[:8].hex()}\n    {body[8:end].decode().rstrip()}\n    {body[end:].hex(' ', -8)}\n"
        self.assertIn(said, self.text)

    def test_pt_chunks(self):
        for name, data in entries(candidates.pt_chunks(self.UPDATE, 7, 8)).items():
            self.assertIn(f"archive/{name} ", self.text)
            if name.startswith("data/"):
                self.assertIn(data.hex(), self.text)

    def test_zstd(self):
        frame = candidates.zstd(candidates.binary_v2(self.UPDATE)).hex()
        self.assertIn(f"    {frame[:8]} {frame[8:12]} {frame[12:18]} {frame[18:22]}...", self.text)


if __name__ == "__main__":
    unittest.main()
