"""Where the worker takes its windows from, so that torch can be measured on the same tokens."""

import hashlib


def starts(shard: int, row: int, tokens: int, window: int, each: int = 1) -> list[int]:
    """The first tokens of the windows of a row for the empty nonce; none if the row is too short. See docs/protocol.md."""
    if tokens < window + 1:
        return []
    seeds = (hashlib.sha256(f":{shard}:{row}:{k}:{tokens}:{window}".encode()).digest() for k in range(each))
    return [int.from_bytes(seed[:8], "big") % (tokens - window) for seed in seeds]
