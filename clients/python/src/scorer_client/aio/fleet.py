"""Reads the workers of one model from Redis, for asyncio."""

from typing import Any, cast

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scorer_client.workers import HEARTBEAT_TTL_MS, PREFETCH, TIMEOUT_S, Heartbeats, Worker, accepted, capacity, ready


class Fleet:
    """The workers of a model. `prefetch` must equal the workers' amqp.prefetch, `ttl_ms` their heartbeat.ttl."""

    def __init__(
        self,
        url: str,
        model: str,
        namespace: str = "scorer",
        prefetch: int = PREFETCH,
        ttl_ms: int = HEARTBEAT_TTL_MS,
    ) -> None:
        self._heartbeats = Heartbeats(url, model, namespace, prefetch, ttl_ms)
        # No retries by the library: "unknown" is a valid answer, and must come quickly.
        self._store: Any = redis.asyncio.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )

    async def workers(self) -> list[Worker]:
        """The live workers, sorted by id. Raises FleetUnknown."""
        try:
            async with self._store.pipeline(transaction=False) as pipeline:
                pipeline.time()
                pipeline.zrange(self._heartbeats.set_key, 0, -1, withscores=True)
                ages = self._heartbeats.ages(*await pipeline.execute())
            keys = self._heartbeats.keys(ages)
            records = cast(list[bytes | None], await self._store.mget(keys)) if keys else []
        except (redis.RedisError, OSError) as error:
            raise self._heartbeats.unknown(error) from error
        return self._heartbeats.workers(ages, records)

    async def capacity(self, model_version: int | None = None) -> int:
        """How many jobs the ready workers can hold: those of one version, or all. Raises FleetUnknown."""
        return capacity(ready(await self.workers(), model_version))

    async def accepts(self, model_version: int | None = None) -> frozenset[str]:
        """The kinds of job that every live worker accepts: those of one version, or all. Raises FleetUnknown."""
        return accepted(await self.workers(), model_version)

    async def close(self) -> None:
        """Closes the connections to Redis. The client does it when it is left."""
        await self._store.aclose()
