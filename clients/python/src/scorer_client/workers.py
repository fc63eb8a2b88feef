"""The workers of one model, as their heartbeats in Redis describe them."""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from redis.exceptions import AuthenticationError, ResponseError

from scorer_client.fields import Fields, Malformed
from scorer_client.stores import Addresses

PREFETCH = 2  # the default of amqp.prefetch
HEARTBEAT_TTL_MS = 5000  # the default of heartbeat.ttl
ALWAYS_ACCEPTED = frozenset({"score", "validate"})  # by workers whose heartbeat has no `accepts`


class FleetUnknown(Exception):
    """Redis cannot be read, so it is not known which workers are ready, if any."""


@dataclass(frozen=True)
class Worker:
    """A live worker. `held` is how many jobs it has, `slots` how many it can have at most, `accepts` which jobs it knows."""

    id: str
    state: str
    detail: str
    ready: bool
    accepting: bool
    model_version: int | None
    held: int
    slots: int
    age_ms: int
    accepts: Set[str] = ALWAYS_ACCEPTED

    @property
    def free(self) -> int:
        return self.slots - self.held if self.accepting else 0


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


def accepted(workers: Iterable[Worker], model_version: int | None = None) -> frozenset[str]:
    """What every live worker of the version accepts, ready or not: any of them may get the next job."""
    of_version = [worker.accepts for worker in workers if model_version in (None, worker.model_version)]
    return frozenset.intersection(*map(frozenset, of_version)) if of_version else frozenset()


@dataclass(frozen=True)
class Heartbeats:
    """Where the heartbeats of a model are in Redis, and how they are read.

    A heartbeat does not say how many jobs its worker can hold, so `prefetch` must equal the workers' amqp.prefetch.
    A worker that holds more than that is taken to have more slots.
    """

    addresses: Addresses
    model: str
    namespace: str
    prefetch: int
    ttl_ms: int

    @property
    def set_key(self) -> str:
        return f"{self.namespace}:{{{self.model}}}:workers"

    def keys(self, ages: Mapping[str, int]) -> list[str]:
        return [f"{self.namespace}:{{{self.model}}}:worker:{id}" for id in ages]

    def ages(self, time: tuple[int, int], members: Iterable[tuple[bytes, float]]) -> dict[str, int]:
        """How many ms ago each live worker reported, by Redis' clock."""
        now_ms = time[0] * 1000 + time[1] // 1000
        every = {id.decode(errors="replace"): now_ms - int(at_ms) for id, at_ms in sorted(members)}
        return {id: age_ms for id, age_ms in every.items() if age_ms <= self.ttl_ms}

    def workers(self, ages: Mapping[str, int], records: Sequence[bytes | None]) -> list[Worker]:
        """A missing record has just expired: its worker is gone."""
        pairs = zip(ages.items(), records, strict=True)
        return [self._worker(id, age_ms, record) for (id, age_ms), record in pairs if record is not None]

    def unknown(self, error: BaseException) -> FleetUnknown:
        why = str(error).rstrip(".") or type(error).__name__
        advice = " Check that it is running and the address is correct."
        match error.__cause__ or error:  # The client of a cluster wraps it.
            case AuthenticationError():
                why, advice = f"it refused the login of {self.addresses.user}; check the user and the password", ""
            case ResponseError():  # Redis is there, and this is its answer.
                advice = ""
        return FleetUnknown(f"Redis at {self.addresses.places} cannot be read: {why}.{advice}")

    def _worker(self, id: str, age_ms: int, record: bytes) -> Worker:
        try:
            return _read(id, age_ms, record, self.prefetch)
        except Malformed as error:  # Such a worker is listed, but not as ready.
            return Worker(id, "unreadable", str(error), False, False, None, 0, 0, age_ms)


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
        accepts=fields.texts("accepts") if fields.has("accepts") else ALWAYS_ACCEPTED,
    )


def _json(id: str, record: bytes) -> Any:
    try:
        return json.loads(record)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the heartbeat of {id} is not JSON: {error}.") from error
