"""Text to train on and text held out: the language reference that every CPython ships.

`pydoc_data.topics` (PSF licence, see ../LICENSE.python) is plain prose and grammar, the same
bytes in every build of one Python version. Whole topics are held out, so no validation
window overlaps a training one.
"""

import hashlib

import numpy as np
from pydoc_data.topics import topics

SHA256 = "37d06970fc926e60c16dff401e441b84752446a36b6b64516c229fdec77e992c"
HELD_OUT_EVERY = 8  # each eighth topic by name is validation text


def load():
    """(training bytes, held-out bytes) as int64 arrays."""
    names = sorted(topics)
    text = {name: topics[name].encode("utf-8") for name in names}
    digest = hashlib.sha256(b"".join(text[name] for name in names)).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"pydoc_data.topics is {digest}, not {SHA256}: use the Python named in README.md")
    held = [name for position, name in enumerate(names) if position % HELD_OUT_EVERY == 3]
    train = b"\n\n".join(text[name] for name in names if name not in held)
    validation = b"\n\n".join(text[name] for name in held)
    return as_tokens(train), as_tokens(validation)


def as_tokens(text):
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
