"""The candidates: what honest, lazy, hostile and broken miners send. Pure data, no scoring."""

import base64
import json
import zlib

import numpy as np

from . import training, wire

VERSION = 7
EMBED = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


class Candidate:
    def __init__(self, name, kind, body, semantics, learning_rate=None, update=None, code=None, **job):
        self.name, self.kind, self.body, self.update, self.code = name, kind, body, update, code
        self.semantics, self.learning_rate = semantics, learning_rate
        self.job = {"model_version": VERSION, "nonce": "", "shards": None, "label_shift": 1} | job


def only(update, part):
    return {name: entry for name, entry in update.items() if part in name}


def everything(checkpoint, text):
    shapes = {name: weight.shape for name, weight in checkpoint.items()}

    def sound(name, kind, update, rate=None, form=wire.dict_form, **job):
        semantics = "param_diff" if rate is None else "gradient"
        return Candidate(name, kind, wire.encode(update, shapes, form), semantics, rate, update, **job)

    found = list(honest(checkpoint, text, sound))
    found += steps(checkpoint, text, sound)
    found += inverted(checkpoint, text, sound)
    found += noise(checkpoint, sound)
    found += idle(checkpoint, sound)
    found += malformed(shapes)
    return found


def honest(checkpoint, text, sound):
    kind, f16, lists = "honest gradient", np.float16, wire.list_form

    def sparse(seed, ratio=0.01, shift=1, **options):
        return wire.top_k(training.gradients(checkpoint, text, seed, shift=shift), ratio, **options)

    yield sound("gradient-small-rate", kind, sparse(101), 0.01)
    yield sound("gradient-medium-rate", kind, sparse(102), 0.1)
    yield sound("gradient-large-rate", kind, sparse(103), 0.3)
    yield sound("gradient-f16", kind, sparse(104, dtype=f16), 0.2)
    yield sound("gradient-list", kind, sparse(105), 0.2, lists)
    yield sound("gradient-list-f16", kind, sparse(106, dtype=f16), 0.05, lists)
    yield sound("gradient-unsorted", kind, sparse(107, shuffle=np.random.default_rng(107)), 0.2)
    # The seed's miners sum over batches and scale by their own rate: big values, a tiny rate.
    yield sound("gradient-summed", kind, sparse(108, scale=2560.0), 1e-4)
    yield sound("gradient-one-layer", kind, only(sparse(109, ratio=0.02), "layers.1."), 0.3)
    yield sound("gradient-embedding-only", kind, only(sparse(110, ratio=0.1), EMBED), 0.3)
    yield sound("gradient-other-nonce", kind, sparse(111), 0.2, nonce="epoch-12/ü:3")
    yield sound("gradient-two-ahead", kind, sparse(112, shift=2), 0.2, label_shift=2)


def steps(checkpoint, text, sound):
    kind, f16, lists = "training difference", np.float16, wire.list_form

    def sparse(seed, ratio=0.01, dtype=np.float32, shuffle=None, **options):
        return wire.top_k(training.differences(checkpoint, text, seed, **options), ratio, dtype, shuffle=shuffle)

    yield sound("difference-one-step", kind, sparse(201, steps=1))
    yield sound("difference-few-steps", kind, sparse(202))
    yield sound("difference-more-steps", kind, sparse(203, steps=10))
    yield sound("difference-f16", kind, sparse(204, dtype=f16))
    yield sound("difference-list-unsorted", kind, sparse(205, shuffle=np.random.default_rng(205)), form=lists)
    yield sound("difference-mlp-only", kind, only(sparse(206, ratio=0.02, dtype=f16), ".mlp."))
    yield sound("difference-shard-subset", kind, sparse(207), shards=[60000, 59996])
    yield sound("difference-one-window", kind, sparse(208, dtype=f16), shards=[59998])


def inverted(checkpoint, text, sound):
    kind = "inverted"
    for seed, rate, dtype, form in ((301, 0.1, np.float32, wire.dict_form), (302, 0.5, np.float16, wire.list_form)):
        gradient = training.gradients(checkpoint, text, seed)
        yield sound(f"inverted-gradient-{seed}", kind, wire.top_k(gradient, dtype=dtype, scale=-1.0), rate, form)
    for seed, dtype in ((303, np.float32), (304, np.float16)):
        change = training.differences(checkpoint, text, seed)
        yield sound(f"inverted-difference-{seed}", kind, wire.top_k(change, dtype=dtype, scale=-1.0))
    gradient = training.gradients(checkpoint, text, 305)
    yield sound("inverted-other-nonce", kind, wire.top_k(gradient, scale=-1.0), 0.2, nonce="epoch-12/ü:3")


def noise(checkpoint, sound):
    def sparse(seed, deviation, dtype=np.float32):
        rng = np.random.default_rng(seed)
        update = {}
        for name, weight in checkpoint.items():
            k = max(1, weight.size // 100)
            indices = np.sort(rng.choice(weight.size, k, replace=False)).astype(np.int32)
            update[name] = (rng.normal(0.0, deviation, k).astype(dtype), indices)
        return update

    yield sound("noise-small", "noise", sparse(401, 1e-3))
    yield sound("noise-large", "noise", sparse(402, 0.2))
    yield sound("noise-gradient-f16", "noise", sparse(403, 1.0, np.float16), 0.05)
    yield sound("noise-list", "noise", sparse(404, 0.05), None, wire.list_form)


def idle(checkpoint, sound):
    indices = np.arange(0, 128, 2, dtype=np.int32)
    zeros = {name: (np.zeros(len(indices), np.float32), indices) for name in (EMBED, QUERY, NORM)}
    yield sound("zero-values", "zero", zeros, 0.1)
    # Far below half a unit in the last place of any weight they touch.
    solid = np.flatnonzero(np.abs(checkpoint[QUERY].ravel()) > 1e-2)[:500].astype(np.int32)
    yield sound("zero-effect", "zero", {QUERY: (np.full(len(solid), 1e-12, np.float32), solid)}, None)


def malformed(shapes):
    values = np.array([0.5, -0.25, 0.125, 1.0], np.float32)
    indices = np.array([0, 3, 17, 40], np.int32)
    packed = wire.packed(values, indices)

    def b64(raw):
        return base64.b64encode(raw).decode()

    def one(shape=shapes[QUERY], values=values, indices=indices, name=QUERY, **override):
        return wire.dict_form({name: wire.entry(shape, values, indices, **override)})

    def case(name, body, code, rate=0.1, kind="malformed", **job):
        semantics = "param_diff" if rate is None else "gradient"
        return Candidate(name, kind, body, semantics, rate, None, code, **job)

    def put(array, position, value):
        changed = array.copy()
        changed[position] = value
        return changed

    numel = int(np.prod(shapes[QUERY]))
    bad = "candidate_malformed"
    yield case("stale-older", one(), "model_version_mismatch", kind="stale", model_version=VERSION - 1)
    yield case("stale-newer", one(), "model_version_unavailable", kind="stale", model_version=VERSION + 1)
    yield case("malformed-not-json", one()[:-2], bad)
    yield case("malformed-base64", one(data="@@@ not base64 @@@"), bad)
    yield case("malformed-zlib", one(data=b64(b"\x00\x01\x02\x03 these are not zlib bytes")), bad)
    yield case("malformed-zlib-truncated", one(data=b64(zlib.compress(packed, 1)[:-6])), bad)
    yield case("malformed-zlib-trailing", one(data=b64(zlib.compress(packed, 1) + b"tail")), bad)
    yield case("malformed-count", one(k=5), bad)
    yield case("malformed-unknown-tensor", one(name="model.layers.9.mlp.up_proj.weight"), "candidate_unknown_tensor")
    yield case("malformed-shape", one(shape=(128, 127)), "candidate_shape_mismatch")
    out = "candidate_index_out_of_range"
    yield case("malformed-index-numel", one(indices=put(indices, 3, numel)), out)
    yield case("malformed-index-negative", one(indices=put(indices, 0, -1)), out)
    yield case("malformed-index-duplicate", one(indices=put(indices, 3, 3)), "candidate_duplicate_index")
    bad = "candidate_non_finite"
    yield case("malformed-nan", one(values=put(values, 1, np.nan)), bad)
    yield case("malformed-infinity", one(values=put(values, 2, np.inf)), bad)
    yield case("malformed-overflow", one(values=put(values, 0, 1e38)), bad, rate=100.0)
    yield case("malformed-empty", json.dumps({}).encode(), "candidate_empty")
    yield case("malformed-digest", one(), "candidate_digest_mismatch")
    # Finite weights, but a final norm this big overflows the logits of every window.
    blow = np.full(shapes[NORM][0], 3e38, np.float32)
    body = one(shapes[NORM], blow, np.arange(len(blow), dtype=np.int32), NORM)
    yield case("malformed-huge-weights", body, "non_finite_loss", rate=None)
