"""Looks at a fleet with both Python clients. For each line on standard input, says `seen` once both see one live worker.

    python3 watch_fleet.py MODE URLS NAMESPACE MODEL    URLS as redis.url takes them
"""

import asyncio
import sys
import time

from scorer_client import Fleet, aio
from scorer_client.workers import FleetUnknown

LIMIT_S = 20
FRESH_MS = 2000  # Beats go on: they come every second.


def is_seen(workers):
    return [worker.id for worker in workers] == ["w1"] and workers[0].age_ms < FRESH_MS


async def until_seen(look):
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            if is_seen(await look()):
                return
            why = "no live worker"
        except FleetUnknown as error:
            why = str(error)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not seen within {LIMIT_S} s: {why}")
        await asyncio.sleep(0.1)


async def main(mode, urls, namespace, model):
    blocking = Fleet(urls, model, namespace, mode=mode)
    other = aio.Fleet(urls, model, namespace, mode=mode)

    async def look():
        return blocking.workers()

    while await asyncio.to_thread(sys.stdin.readline):
        await until_seen(look)
        await until_seen(other.workers)
        print("seen", flush=True)
    await other.close()


asyncio.run(main(*sys.argv[1:]))
