"""Text to train on and text held out: the language reference that every CPython ships.

`pydoc_data.topics` (PSF licence, see ../LICENSE.python) is plain prose and grammar, the same
bytes in every build of one Python version. Whole topics are held out, ones that share no
passage with the rest.
"""

import hashlib

import numpy as np
from pydoc_data.topics import topics

SHA256 = "37d06970fc926e60c16dff401e441b84752446a36b6b64516c229fdec77e992c"
HELD_OUT = ("dict", "import", "objects", "slicings", "subscriptions")
PASSAGE = 48  # bytes; topics quote one another, so this much shared text would be leaking


def load():
    """(training bytes, held-out bytes) as int64 arrays."""
    text = {name: topics[name].encode("utf-8") for name in sorted(topics)}
    digest = hashlib.sha256(b"".join(text.values())).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"pydoc_data.topics is {digest}, not {SHA256}: use the Python named in README.md")
    train = b"\n\n".join(text[name] for name in text if name not in HELD_OUT)
    validation = b"\n\n".join(text[name] for name in HELD_OUT)
    shared = passages(train) & passages(validation)
    if shared:
        raise SystemExit(f"{len(shared)} passages of {PASSAGE} bytes are in both halves, one is {min(shared)}")
    return as_tokens(train), as_tokens(validation)


def passages(text):
    return {text[start : start + PASSAGE] for start in range(len(text) - PASSAGE + 1)}


def as_tokens(text):
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
