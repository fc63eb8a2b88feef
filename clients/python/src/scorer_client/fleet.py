"""The workers of one model, read from their heartbeats in Redis."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from scorer_client.fields import Fields, Malformed

PREFETCH = 2  # the default of amqp.prefetch
HEARTBEAT_TTL_MS = 5000  # the default of heartbeat.ttl
TIMEOUT_S = 2.0


class FleetUnknown(Exception):
    """Redis cannot be read, so it is not known which workers are ready, if any."""


@dataclass(frozen=True)
class Worker:
    """A live worker. `held` is how many jobs it has, `slots` how many it can have at most."""

    id: str
    state: str
    detail: str
    ready: bool
    accepting: bool
    model_version: int | None
    held: int
    slots: int
    age_ms: int

    @property
    def free(self) -> int:
        return self.slots - self.held if self.accepting else 0


class Fleet:
    """Reads the heartbeats of a model.

    A heartbeat does not say how many jobs its worker can hold, so `prefetch` must equal the workers' amqp.prefetch.
    A worker that holds more than that is taken to have more slots.
    """

    def __init__(
        self,
        url: str,
        model: str,
        namespace: str = "scorer",
        prefetch: int = PREFETCH,
        ttl_ms: int = HEARTBEAT_TTL_MS,
        store: redis.Redis | None = None,
    ) -> None:
        self._address = _address(url)
        _check_database(url)
        # No retries by the library: "unknown" is a valid answer, and must come quickly.
        self._store = store or redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
        self._prefix = f"{namespace}:{{{model}}}"
        self._prefetch = prefetch
        self._ttl_ms = ttl_ms

    def workers(self) -> list[Worker]:
        """The live workers, sorted by id. Raises FleetUnknown."""
        try:
            heartbeats, now_ms = self._heartbeats()
            keys = [f"{self._prefix}:worker:{id}" for id in heartbeats]
            records = cast(list[bytes | None], self._store.mget(keys)) if keys else []
        except (redis.RedisError, OSError) as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise FleetUnknown(
                f"Redis at {self._address} cannot be read: {why}. Check that it is running and the address is correct."
            ) from error
        pairs = zip(heartbeats.items(), records, strict=True)
        # A missing record has just expired: its worker is gone.
        return [self._worker(id, now_ms - at_ms, record) for (id, at_ms), record in pairs if record is not None]

    def capacity(self, model_version: int | None = None) -> int:
        """How many jobs the ready workers can hold: those of one version, or all. Raises FleetUnknown."""
        return capacity(ready(self.workers(), model_version))

    def _heartbeats(self) -> tuple[dict[str, int], int]:
        """When each worker last reported, and the current time, both in ms by Redis' clock; expired reports are left out."""
        with self._store.pipeline(transaction=False) as pipeline:
            pipeline.time()
            pipeline.zrange(f"{self._prefix}:workers", 0, -1, withscores=True)
            (seconds, microseconds), members = pipeline.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        heartbeats = {id.decode(errors="replace"): int(at_ms) for id, at_ms in sorted(members)}
        return {id: at_ms for id, at_ms in heartbeats.items() if now_ms - at_ms <= self._ttl_ms}, now_ms

    def _worker(self, id: str, age_ms: int, record: bytes) -> Worker:
        try:
            return _read(id, age_ms, record, self._prefetch)
        except Malformed as error:  # Such a worker is listed, but not as ready.
            return Worker(id, "unreadable", str(error), False, False, None, 0, 0, age_ms)


def ready(workers: Iterable[Worker], model_version: int | None = None) -> list[Worker]:
    """The ready workers, of one version if it is given."""
    return [worker for worker in workers if worker.ready and model_version in (None, worker.model_version)]


def answering(workers: Iterable[Worker], model_version: int | None) -> list[Worker]:
    """The workers that answer a job of this version at once: its ready workers, or newer ones, which reject it as too old."""
    able = ready(workers)
    newer = [worker for worker in able if model_version is not None and (worker.model_version or 0) > model_version]
    return ready(able, model_version) or newer


def capacity(workers: Iterable[Worker]) -> int:
    return sum(worker.slots for worker in workers)


def free(workers: Iterable[Worker]) -> int:
    """How many more jobs the workers would take at once; none of them would wait in the queue."""
    return sum(worker.free for worker in workers)


def _read(id: str, age_ms: int, record: bytes, prefetch: int) -> Worker:
    fields = Fields.read(f"the heartbeat of {id}", _json(id, record))
    model, jobs = fields.part("model"), fields.part("jobs")
    held = jobs.whole("in_flight") + jobs.whole("buffered")
    accepting = fields.flag("accepting")
    return Worker(
        id=id,
        state=fields.text("state"),
        detail=fields.text("state_detail"),
        ready=fields.flag("ready"),
        accepting=accepting,
        model_version=model.whole("version") if model.has("version") else None,
        held=held,
        slots=max(prefetch, held + accepting),
        age_ms=age_ms,
    )


def _json(id: str, record: bytes) -> Any:
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the heartbeat of {id} is not JSON: {error}.") from error


def _check_database(url: str) -> None:
    """redis-py silently uses database 0 if the path is not a number."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and path and not path.isdecimal():
        raise ValueError(f"The path of the Redis URL, '{path}', is not a database number.")


def _address(url: str) -> str:
    """Host and port, without the password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"
