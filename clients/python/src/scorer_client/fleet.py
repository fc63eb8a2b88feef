"""Reads the workers of one model from Redis."""

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import redis
import redis.cluster
import redis.sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException
from redis.retry import Retry

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
        store: redis.Redis | None = None,
        *,
        mode: Mode = "single",
        master: str = MASTER,
    ) -> None:
        self._addresses = Addresses.checked(url, mode, master)
        self._heartbeats = Heartbeats(self._addresses, model, namespace, prefetch, ttl_ms)
        self._store: Any = store

    def workers(self) -> list[Worker]:
        """The live workers, sorted by id. Raises FleetUnknown."""
        try:
            if self._store is None:
                # Hardly a retry by the library: "unknown" is a valid answer, and must come quickly.
                self._store = opened(self._addresses, redis, lambda times: Retry(NoBackoff(), times))
            ages = self._heartbeats.ages(*self._beats())
            keys = self._heartbeats.keys(ages)
            records = cast(list[bytes | None], self._store.mget(keys)) if keys else []
        except (redis.RedisError, RedisClusterException, OSError) as error:
            self._forget()
            raise self._heartbeats.unknown(error) from error
        return self._heartbeats.workers(ages, records)

    def _beats(self) -> tuple[Any, Any]:
        """The time, by the clock that the heartbeats were written by, and when each worker reported."""
        key = self._heartbeats.set_key
        if self._addresses.mode == "cluster":
            node = self._store.get_node_from_key(key)
            return self._store.time(target_nodes=node), self._store.zrange(key, 0, -1, withscores=True)
        with self._store.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.zrange(key, 0, -1, withscores=True)
            time, members = pipeline.execute()
        return time, members

    def _forget(self) -> None:
        """The next look begins with the addresses that were given: who was a master may be none any more."""
        if self._addresses.mode != "single" and self._store is not None:
            with contextlib.suppress(redis.RedisError, OSError):
                self._store.close()
            self._store = None

    def capacity(self, model_version: int | None = None) -> int:
        """How many jobs the ready workers can hold: those of one version, or all. Raises FleetUnknown."""
        return capacity(ready(self.workers(), model_version))

    def accepts(self, model_version: int | None = None) -> frozenset[str]:
        """The kinds of job that every live worker accepts: those of one version, or all. Raises FleetUnknown."""
        return accepted(self.workers(), model_version)
