"""Reads the workers of one model from Redis, for asyncio."""

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException

from scorer_client.stores import MASTER, Addresses, Mode, opened
from scorer_client.workers import HEARTBEAT_TTL_MS, PREFETCH, Heartbeats, Worker, accepted, capacity, ready


class Fleet:
    """The workers of a model. `prefetch` must equal the workers' amqp.prefetch, `ttl_ms` their heartbeat.ttl.

    In the modes `sentinel` and `cluster`, `url` is one URL or several: those of the sentinels, which are asked for the
    server that they call `master`, or those of some nodes of the cluster.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        namespace: str = "scorer",
        prefetch: int = PREFETCH,
        ttl_ms: int = HEARTBEAT_TTL_MS,
        *,
        mode: Mode = "single",
        master: str = MASTER,
    ) -> None:
        self._addresses = Addresses.checked(url, mode, master)
        self._heartbeats = Heartbeats(self._addresses, model, namespace, prefetch, ttl_ms)
        self._store: Any = None

    async def workers(self) -> list[Worker]:
        """The live workers, sorted by id. Raises FleetUnknown."""
        try:
            if self._store is None:
                # Hardly a retry by the library: "unknown" is a valid answer, and must come quickly.
                self._store = opened(self._addresses, redis.asyncio, lambda times: Retry(NoBackoff(), times))
            ages = self._heartbeats.ages(*await self._beats())
            keys = self._heartbeats.keys(ages)
            records = cast(list[bytes | None], await self._store.mget(keys)) if keys else []
        except (redis.RedisError, RedisClusterException, OSError) as error:
            await self._forget()
            raise self._heartbeats.unknown(error) from error
        return self._heartbeats.workers(ages, records)

    async def _beats(self) -> tuple[Any, Any]:
        """The time, by the clock that the heartbeats were written by, and when each worker reported."""
        key = self._heartbeats.set_key
        if self._addresses.mode == "cluster":
            await self._store.initialize()
            node = self._store.get_node_from_key(key)
            time = await self._store.time(target_nodes=node)
            return time, await self._store.zrange(key, 0, -1, withscores=True)
        async with self._store.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.zrange(key, 0, -1, withscores=True)
            time, members = await pipeline.execute()
        return time, members

    async def _forget(self) -> None:
        """The next look begins with the addresses that were given: who was a master may be none any more."""
        if self._addresses.mode != "single" and self._store is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                await self._store.aclose()
            self._store = None

    async def capacity(self, model_version: int | None = None) -> int:
        """How many jobs the ready workers can hold: those of one version, or all. Raises FleetUnknown."""
        return capacity(ready(await self.workers(), model_version))

    async def accepts(self, model_version: int | None = None) -> frozenset[str]:
        """The kinds of job that every live worker accepts: those of one version, or all. Raises FleetUnknown."""
        return accepted(await self.workers(), model_version)

    async def close(self) -> None:
        """Closes the connections to Redis. The client does it when it is left."""
        if self._store is not None:
            await self._store.aclose()
