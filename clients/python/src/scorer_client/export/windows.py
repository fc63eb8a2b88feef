"""Where the worker takes its windows from, so that torch can be measured on the same tokens."""

import hashlib


def starts(shard: int, row: int, tokens: int, window: int) -> list[int]:
    """The first token of the window of a row for the empty nonce; none if the row is too short. See docs/protocol.md."""
    if tokens < window + 1:
        return []
    seed = hashlib.sha256(f":{shard}:{row}:0:{tokens}:{window}".encode()).digest()
    return [int.from_bytes(seed[:8], "big") % (tokens - window)]
