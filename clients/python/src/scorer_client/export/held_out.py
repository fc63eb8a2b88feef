"""Which documents are held out: decided by each document's own bytes, so that a trainer can leave out the same ones."""

import hashlib


def digest(document: bytes) -> bytes:
    return hashlib.sha256(document).digest()


def is_held_out(document: bytes, fraction: float) -> bool:
    """Whether a document belongs to the shards: text as UTF-8, tokens as little-endian int32.

    The first eight bytes of its SHA-256, as a big-endian number, are below `fraction` of 2^64.
    """
    return int.from_bytes(digest(document)[:8], "big") < fraction * 2**64
