"""How many jobs may be at the broker, given the workers that are ready."""

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence

from scorer_client.settings import Settings
from scorer_client.workers import ALWAYS_ACCEPTED, FleetUnknown, Worker, answering, capacity, free, ready

log = logging.getLogger(__name__)

NAMED = 3  # How many workers, or versions, a message names.
A_WORKER_IS_READY = "A worker is ready again: jobs are sent."


class FlowControl:
    """Keeps the latest list of workers. None means unknown, which is not the same as no workers."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._workers: list[Worker] | None = None
        self._learned_at = float("-inf")
        self._taken_since = 0
        self._known_places: dict[tuple[int | None, frozenset[str]], tuple[int, int]] = {}
        self._warned: set[Hashable] = set()

    @property
    def due(self) -> bool:
        """Heartbeats are read at most once per `poll_interval_s`: workers send one a second."""
        return self._clock() - self._learned_at >= self._settings.poll_interval_s

    def learn(self, workers: Iterable[Worker] | FleetUnknown) -> None:
        if isinstance(workers, FleetUnknown):
            self._workers = None
            blind = self._settings.outstanding_without_heartbeats
            sent = f"sent {blind} at a time, and held back if they need more than score and validate" if blind else "held back"
            self._warn("fleet", f"{workers} Until it can be read, jobs are {sent}.", A_WORKER_IS_READY)
        else:
            self._workers = list(workers)
            is_ready = any(worker.ready for worker in self._workers)
            self._warn("fleet", "" if is_ready else "No worker is ready: jobs are held back.", A_WORKER_IS_READY)
        self._learned_at = self._clock()
        self._taken_since = 0
        self._known_places.clear()

    def room(self, model_version: int | None, needs: frozenset[str], outstanding: int) -> int:
        """How many more jobs of this version, which need workers to accept `needs`, may be sent now.

        Jobs that wait for a retry are outstanding for minutes while workers are idle, so a free slot always counts as
        room. A worker with a free slot has nothing waiting in the queue.
        """
        if self._workers is None:
            blind = 0 if self.lacking(needs) else self._settings.outstanding_without_heartbeats
            return blind - outstanding
        slots, free_slots = self._places(self._workers, model_version, needs)
        return max(int(self._settings.jobs_per_slot * slots) - outstanding, free_slots - self._taken_since)

    def _places(self, workers: list[Worker], model_version: int | None, needs: frozenset[str]) -> tuple[int, int]:
        """The slots, and the free ones, of the workers that answer such a job: none if not all that may get it know it."""
        if (model_version, needs) not in self._known_places:
            able, lacking = answering(workers, model_version), self.lacking(needs)
            if workers:
                begins = lacking and f"Jobs that need {_words(needs)} are held back: {lacking}."
                self._warn(needs, begins, f"Every live worker accepts {_words(needs)} now.")
            self._known_places[model_version, needs] = (0, 0) if lacking else (capacity(able), free(able))
        return self._known_places[model_version, needs]

    def lacking(self, needs: frozenset[str]) -> str:
        """Why jobs that need this are held back even where workers are ready; empty if they are not.

        Workers of any version count: one queue serves them all, and a worker refuses a kind of job that it does not know.
        """
        if self._workers is None:
            new = needs - ALWAYS_ACCEPTED
            return f"it is not known whether every live worker accepts {_words(new)}" if new else ""
        missing = {worker.id: needs - worker.accepts for worker in self._workers if not needs <= worker.accepts}
        if not missing:
            return ""
        words = _words(frozenset().union(*missing.values()))
        return f"some live workers do not accept {words}: {_some(sorted(missing))} ({len(missing)} of {len(self._workers)})"

    def held_back(self, model: str, model_version: int | None, needs: frozenset[str]) -> str:
        """Why a job was never sent, as far as it is known."""
        if lacking := self.lacking(needs):
            return lacking
        asked = "" if model_version is None else f" for version {model_version}"
        if self._workers is None:
            return f"it was not known whether a worker of {model} was ready{asked}"
        if answering(self._workers, model_version):
            return f"the workers of {model} that were ready{asked} had no room for it, or RabbitMQ was unavailable"
        served = {worker.model_version for worker in ready(self._workers) if worker.model_version is not None}
        newest = _some([str(version) for version in sorted(served, reverse=True)]) or "none"
        return f"no worker of {model} was ready{asked} (versions served: {newest})"

    def take(self) -> None:
        """A job is sent, and takes a slot that the latest list shows as free."""
        self._taken_since += 1

    def _warn(self, about: Hashable, warning: str, end: str) -> None:
        """Logs a warning when the condition begins, and once more when it ends."""
        if warning and about not in self._warned:
            log.warning(warning)
            self._warned.add(about)
        elif not warning and about in self._warned:
            log.warning(end)
            self._warned.remove(about)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _words(needs: Iterable[str]) -> str:
    return " and ".join(sorted(needs))
