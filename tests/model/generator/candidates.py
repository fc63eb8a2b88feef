"""The candidates: what an aggregator would send, from honest miners and from all others."""

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass

import numpy as np

from . import binary_v2, training

VERSION = 7
SINGLE_ROW_SHARD = 60000
SMALL = 10_000  # the seed's miners send tensors below this size whole


@dataclass
class Case:
    """One job and its body. `code` is the refusal expected; without one the job is scored."""

    name: str
    kind: str
    body: bytes
    semantics: str = "gradient"
    learning_rate: float | None = 0.3
    model_version: int = VERSION
    nonce: str = ""
    shards: tuple | None = None
    label_shift: int = 1
    file: str | None = None
    sha256: str | None = None
    size: int | None = None
    code: str | None = None
    status: str = "rejected"

    def __post_init__(self):
        self.file = self.file or f"candidates/{self.name}.json"
        self.sha256 = self.sha256 or hashlib.sha256(self.body).hexdigest()
        self.size = len(self.body) if self.size is None else self.size
        if self.semantics == "param_diff":
            self.learning_rate = None


class Maker:
    """Builds all cases from one checkpoint and the training text."""

    def __init__(self, checkpoint, tokens):
        self.checkpoint = checkpoint
        self.tokens = tokens
        self.shapes = {name: weight.shape for name, weight in checkpoint.items()}
        self.cases = []

    def add(self, name, kind, entries, form="dict", **job):
        body = binary_v2.encode(entries, self.shapes, form)
        self.cases.append(Case(name, kind, body, **job))

    def again(self, name, of, kind=None, **job):
        """The same file, asked about in another way."""
        first = next(case for case in self.cases if case.name == of)
        job = {"semantics": first.semantics, "learning_rate": first.learning_rate} | job
        self.cases.append(Case(name, kind or first.kind, first.body, file=first.file, **job))

    def gradient(self, seed, density, only="", shift=1):
        dense = training.gradients(self.checkpoint, self.tokens, seed, shift=shift)
        return top_entries(dense, density, only)

    def difference(self, seed, density, only="", **steps):
        dense = training.differences(self.checkpoint, self.tokens, seed, **steps)
        return top_entries(dense, density, only)


def top_entries(dense, density, only=""):
    """The largest entries of each tensor whose name holds `only`, indices ascending."""
    entries = {}
    for name, values in dense.items():
        if only not in name:
            continue
        flat = values.reshape(-1)
        k = flat.size if flat.size < SMALL and not only else max(1, int(flat.size * density))
        indices = np.sort(np.argsort(-np.abs(flat), kind="stable")[:k]).astype(np.int32)
        entries[name] = (indices, flat[indices])
    return entries


def each(entries, change):
    """`entries` with change(indices, values) in the place of each tensor's pair."""
    return {name: change(*pair) for name, pair in entries.items()}


def halved(entries):
    return each(entries, lambda indices, values: (indices, values.astype(np.float16)))


def negated(entries):
    return each(entries, lambda indices, values: (indices, -values))


def scaled(entries, factor):
    return each(entries, lambda indices, values: (indices, values * np.float32(factor)))


def by_magnitude(entries):
    """The order torch.topk gives: honest encoders do not sort."""

    def order(indices, values):
        largest_first = np.argsort(-np.abs(values), kind="stable")
        return indices[largest_first], values[largest_first]

    return each(entries, order)


def noise_like(entries, shapes, seed):
    """As many entries and the same norm for every tensor, at random places with random signs."""
    rng = np.random.default_rng(seed)
    random = {}
    for name, (indices, values) in entries.items():
        numel = int(np.prod(shapes[name]))
        drawn = rng.standard_normal(len(indices))
        drawn *= np.linalg.norm(values.astype(np.float64)) / np.linalg.norm(drawn)
        places = np.sort(rng.choice(numel, len(indices), replace=False)).astype(np.int32)
        random[name] = (places, drawn.astype(np.float32))
    return random


def build(checkpoint, tokens):
    maker = Maker(checkpoint, tokens)
    honest_gradients(maker)
    training_differences(maker)
    inverted(maker)
    noise(maker)
    zero(maker)
    stale(maker)
    malformed(maker)
    return maker.cases


def honest_gradients(maker):
    def add(name, entries, **job):
        maker.add(name, "honest gradient", entries, **job)

    add("gradient-f32-dict", maker.gradient(101, 0.01))
    add("gradient-f16-dict", halved(maker.gradient(102, 0.01)), learning_rate=0.25)
    add("gradient-f32-list-unsorted", by_magnitude(maker.gradient(103, 0.008)), form="list", learning_rate=0.1)
    add("gradient-f16-list-unsorted", halved(by_magnitude(maker.gradient(104, 0.01))), form="list", learning_rate=0.2)
    add("gradient-dense", halved(maker.gradient(105, 0.02)), learning_rate=0.15)
    add("gradient-sparse", maker.gradient(106, 0.001), learning_rate=0.5)
    add("gradient-small-rate", maker.gradient(107, 0.005), learning_rate=0.003)
    add("gradient-embedding", maker.gradient(108, 0.1, only="embed_tokens"))
    add("gradient-attention", halved(maker.gradient(109, 0.04, only="self_attn")), form="list", learning_rate=0.6)
    add("gradient-norms", maker.gradient(110, 1.0, only="norm"), learning_rate=1.0)
    two_ahead = maker.gradient(111, 0.01, shift=2)
    add("gradient-two-ahead", two_ahead, learning_rate=0.03, label_shift=2)
    maker.again("gradient-other-nonce", "gradient-f32-dict", nonce="epoch-42")
    maker.again("gradient-two-shards", "gradient-f16-dict", shards=(59999, 59997))
    maker.again("gradient-one-window", "gradient-dense", shards=(SINGLE_ROW_SHARD,))


def training_differences(maker):
    def add(name, entries, **job):
        maker.add(name, "training difference", entries, semantics="param_diff", **job)

    add("difference-f32-dict", maker.difference(201, 0.01))
    add("difference-f16-list", halved(maker.difference(202, 0.02)), form="list")
    add("difference-unsorted", by_magnitude(maker.difference(203, 0.008, rate=1e-4)), form="list")
    add("difference-embedding", halved(maker.difference(204, 0.2, only="embed_tokens")))
    add("difference-one-step", maker.difference(205, 0.01, steps=1, rate=1e-3))
    add("difference-two-ahead", maker.difference(206, 0.01, shift=2), label_shift=2)
    maker.again("difference-reordered-shards", "difference-f32-dict", shards=(60000, 59996, 59998), nonce="epoch-43")


def inverted(maker):
    def add(name, entries, **job):
        maker.add(name, "inverted", entries, **job)

    add("inverted-gradient", negated(maker.gradient(101, 0.01)))
    add("inverted-gradient-f16", halved(negated(maker.gradient(104, 0.01))), form="list", learning_rate=0.2)
    add("inverted-difference", negated(maker.difference(201, 0.01)), semantics="param_diff")
    # The mistake a miner makes: the step it would subtract, sent as a difference to add.
    add("inverted-step-as-difference", scaled(maker.gradient(103, 0.01), 0.3), semantics="param_diff")


def noise(maker):
    def add(name, entries, **job):
        maker.add(name, "noise", entries, **job)

    like_gradient, like_difference = maker.gradient(101, 0.01), maker.difference(201, 0.01)
    add("noise-gradient", noise_like(like_gradient, maker.shapes, 401))
    add("noise-gradient-f16", halved(noise_like(like_gradient, maker.shapes, 402)), form="list")
    add("noise-difference", noise_like(like_difference, maker.shapes, 403), semantics="param_diff")
    add("noise-strong", noise_like(scaled(like_gradient, 5.0), maker.shapes, 404), nonce="epoch-42")


def zero(maker):
    gradient = maker.gradient(101, 0.005)
    maker.add("zero-f32", "zero", scaled(gradient, 0.0))
    maker.add("zero-f16-difference", "zero", halved(scaled(gradient, 0.0)), form="list", semantics="param_diff")
    # Far below half a unit in the last place of any weight: sent, applied, and nothing changes.
    maker.add("zero-below-rounding", "zero", scaled(gradient, 1e-25))


def stale(maker):
    maker.again("stale-older", "gradient-f32-dict", "stale", model_version=VERSION - 1, code="model_version_mismatch")
    maker.again(
        "stale-newer",
        "gradient-f32-dict",
        "stale",
        model_version=VERSION + 1,
        code="model_version_unavailable",
        status="failed",
    )


GOOD = "model.layers.0.self_attn.q_proj.weight"
BROKEN = "model.layers.1.mlp.down_proj.weight"  # not square: a wrong layout shows


def malformed(maker):
    """One fault each, in the second tensor: whoever checks only the first is caught.

    The honest part is the same small gradient everywhere, so nothing else differs.
    """
    gradient = maker.gradient(101, 0.002)
    shape = list(maker.shapes[BROKEN])
    numel = int(np.prod(shape))
    indices, values = gradient[BROKEN]
    raw = binary_v2.pack(indices, values)
    stream = zlib.compress(raw, 1)
    good = binary_v2.entry(*gradient[GOOD], maker.shapes[GOOD])
    plain = binary_v2.entry(indices, values, shape)
    whole = binary_v2.document({GOOD: good, BROKEN: plain}, "dict")

    def body(name, code, content, **job):
        maker.cases.append(Case(name, "malformed", content, code=code, **job))

    def tensor(name, code, fields, form="dict", **job):
        body(name, code, binary_v2.document({GOOD: good, BROKEN: fields}, form), **job)

    def stored(name, data):
        tensor(name, "candidate_malformed", plain | {"data": data})

    def altered(name, code, indices=indices, values=values, **job):
        tensor(name, code, binary_v2.entry(indices, values, shape), **job)

    def with_value(position, value, dtype=np.float32):
        changed = values.astype(dtype)
        changed[position] = value
        return changed

    def with_index(position, index):
        changed = indices.copy()
        changed[position] = index
        return changed

    # The document.
    garbage = np.random.default_rng(501).bytes(256)
    body("malformed-garbage", "candidate_malformed", garbage, file="candidates/malformed-garbage.bin")
    body("malformed-json-truncated", "candidate_malformed", whole[: len(whole) // 2])
    body("malformed-json-trailing", "candidate_malformed", whole + b"{}")
    body("malformed-json-scalar", "candidate_malformed", b"42")
    body("malformed-no-data", "candidate_malformed", without_data(good, plain))
    # The stored bytes.
    stored("malformed-base64", "@@ this is not base64 @@")
    stored("malformed-zlib", base64.b64encode(garbage).decode())
    stored("malformed-zlib-truncated", base64.b64encode(stream[: len(stream) // 2]).decode())
    stored("malformed-zlib-checksum", base64.b64encode(stream[:-1] + bytes([stream[-1] ^ 1])).decode())
    stored("malformed-zlib-trailing", base64.b64encode(stream + b"more").decode())
    # The count.
    tensor("malformed-count-above", "candidate_malformed", plain | {"k": len(indices) + 1})
    tensor("malformed-count-below", "candidate_malformed", plain | {"k": len(indices) - 1}, form="list")
    tensor("malformed-count-negative", "candidate_malformed", plain | {"k": -1})
    # What it names.
    unknown = {GOOD: good, "model.layers.9.mlp.down_proj.weight": plain}
    body("malformed-unknown-tensor", "candidate_unknown_tensor", binary_v2.document(unknown, "dict"))
    tensor("malformed-shape-transposed", "candidate_shape_mismatch", plain | {"shape": shape[::-1]})
    tensor("malformed-shape-flat", "candidate_shape_mismatch", plain | {"shape": [numel]}, form="list")
    altered("malformed-index-numel", "candidate_index_out_of_range", with_index(-1, numel))
    altered("malformed-index-negative", "candidate_index_out_of_range", with_index(0, -1))
    altered("malformed-index-twice", "candidate_duplicate_index", with_index(-1, indices[0]), form="list")
    # What it would write.
    altered("malformed-nan", "candidate_non_finite", values=with_value(3, np.nan))
    altered("malformed-infinity-f16", "candidate_non_finite", values=with_value(3, np.inf, np.float16))
    altered("malformed-overflow", "candidate_non_finite", values=with_value(3, 3e38), learning_rate=10.0)
    body("malformed-non-finite-loss", "non_finite_loss", huge_row(maker.shapes), semantics="param_diff")
    # Nothing at all.
    body("malformed-empty-dict", "candidate_empty", binary_v2.document({}, "dict"))
    body("malformed-empty-list", "candidate_empty", binary_v2.document({}, "list"))
    # The job's claim about a good body.
    body("malformed-digest", "candidate_digest_mismatch", whole, sha256=hashlib.sha256(b"another body").hexdigest())
    body("malformed-size", "candidate_digest_mismatch", whole, size=len(whole) + 1, file="candidates/malformed-digest.json")


def without_data(good, plain):
    return json.dumps({GOOD: good, BROKEN: {"shape": plain["shape"], "k": plain["k"]}}).encode()


def huge_row(shapes):
    """One MLP row just below float32's largest number: every weight finite, every activation not."""
    name = "model.layers.0.mlp.up_proj.weight"
    columns = shapes[name][1]
    entries = {name: (np.arange(columns, dtype=np.int32), np.full(columns, 3e38, dtype=np.float32))}
    return binary_v2.encode(entries, shapes, "dict")
