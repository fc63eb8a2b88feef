"""The writers of candidates, against what torch and safetensors themselves wrote of the same update."""

import base64
import io
import json
import pathlib
import pickle
import pickletools
import struct
import unittest
import zipfile
import zlib

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
