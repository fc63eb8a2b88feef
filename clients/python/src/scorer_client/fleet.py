"""The workers of one model, as their heartbeats in Redis tell."""

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
ANSWER_WITHIN_S = 2.0


class FleetUnknown(Exception):
    """Redis does not tell. That is neither "ready" nor "nobody is there"."""


@dataclass(frozen=True)
class Worker:
    """A worker that is alive, by Redis' own clock."""

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

    The records do not say how many jobs a worker may hold, so `prefetch` must be what the workers have as amqp.prefetch;
    a worker that is seen with more has more.
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
        self._place = _place(url)
        _check_database(url)
        # Without retries of the library's own: "unknown" is an answer, and must not take long.
        self._store = store or redis.Redis.from_url(
            url, socket_timeout=ANSWER_WITHIN_S, socket_connect_timeout=ANSWER_WITHIN_S, retry=Retry(NoBackoff(), 0)
        )
        self._prefix = f"{namespace}:{{{model}}}"
        self._prefetch = prefetch
        self._ttl_ms = ttl_ms

    def workers(self) -> list[Worker]:
        """Those alive, by name. Raises FleetUnknown."""
        try:
            beats, now_ms = self._beats()
            keys = [f"{self._prefix}:worker:{id}" for id in beats]
            records = cast(list[bytes | None], self._store.mget(keys)) if keys else []
        except (redis.RedisError, OSError) as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise FleetUnknown(
                f"Redis at {self._place} does not tell which workers there are: {why}. "
                "See whether it runs and the address is right."
            ) from error
        pairs = zip(beats.items(), records, strict=True)
        # No record: it expired since, so its worker is gone.
        return [self._worker(id, now_ms - at_ms, record) for (id, at_ms), record in pairs if record is not None]

    def capacity(self, model_version: int | None = None) -> int:
        """How many jobs the ready workers, of this version or of any, hold at most. Raises FleetUnknown."""
        return capacity(ready(self.workers(), model_version))

    def _beats(self) -> tuple[dict[str, int], int]:
        """When each worker last reported, and the time, both by Redis' clock; expired reports are left out."""
        with self._store.pipeline(transaction=False) as together:
            together.time()
            together.zrange(f"{self._prefix}:workers", 0, -1, withscores=True)
            (seconds, microseconds), members = together.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        beats = {id.decode(errors="replace"): int(at_ms) for id, at_ms in sorted(members)}
        return {id: at_ms for id, at_ms in beats.items() if now_ms - at_ms <= self._ttl_ms}, now_ms

    def _worker(self, id: str, age_ms: int, record: bytes) -> Worker:
        try:
            return _read(id, age_ms, record, self._prefetch)
        except Malformed as error:  # A record that nobody can read is no ready worker.
            return Worker(id, "unreadable", str(error), False, False, None, 0, 0, age_ms)


def ready(workers: Iterable[Worker], model_version: int | None = None) -> list[Worker]:
    """Those that take jobs; of one version, where it is named."""
    return [worker for worker in workers if worker.ready and model_version in (None, worker.model_version)]


def answering(workers: Iterable[Worker], model_version: int | None) -> list[Worker]:
    """Who answers a job for this version at once: its ready workers, else newer ones, who say that it is too old."""
    able = ready(workers)
    newer = [worker for worker in able if model_version is not None and (worker.model_version or 0) > model_version]
    return ready(able, model_version) or newer


def capacity(workers: Iterable[Worker]) -> int:
    return sum(worker.slots for worker in workers)


def free(workers: Iterable[Worker]) -> int:
    """How many jobs more they would take at once; none of that waits in the queue."""
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
        raise Malformed(f"the heartbeat of {id} is no JSON: {error}.") from error


def _check_database(url: str) -> None:
    """The library by itself takes database 0 for a path that is none."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and path and not path.isdecimal():
        raise ValueError(f"The path of Redis's address, '{path}', is not the number of a database.")


def _place(url: str) -> str:
    """The address without its password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"
