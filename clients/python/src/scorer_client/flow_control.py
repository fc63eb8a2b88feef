"""How many jobs may be at the broker, given the workers that are ready."""

import logging
from collections.abc import Callable, Iterable

from scorer_client.settings import Settings
from scorer_client.workers import ALWAYS_ACCEPTED, FleetUnknown, Worker, accepted, answering, capacity, free

log = logging.getLogger(__name__)


class FlowControl:
    """Keeps the latest list of workers. None means unknown, which is not the same as no workers."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._workers: list[Worker] | None = None
        self._learned_at = float("-inf")
        self._taken_since = 0
        self._known_places: dict[tuple[int | None, frozenset[str]], tuple[int, int]] = {}
        self._warning = ""

    @property
    def due(self) -> bool:
        """Heartbeats are read at most once per `poll_interval_s`: workers send one a second."""
        return self._clock() - self._learned_at >= self._settings.poll_interval_s

    def learn(self, workers: Iterable[Worker] | FleetUnknown) -> None:
        if isinstance(workers, FleetUnknown):
            self._workers = None
            blind = self._settings.outstanding_without_heartbeats
            self._warn(f"{workers} Until it can be read, jobs are {f'sent {blind} at a time' if blind else 'held back'}.")
        else:
            self._workers = list(workers)
            self._warn("" if any(worker.ready for worker in self._workers) else "No worker is ready: jobs are held back.")
        self._learned_at = self._clock()
        self._taken_since = 0
        self._known_places.clear()

    def room(self, model_version: int | None, needs: frozenset[str], outstanding: int) -> int:
        """How many more jobs of this version, which need workers to accept `needs`, may be sent now.

        Jobs that wait for a retry are outstanding for minutes while workers are idle, so a free slot always counts as
        room. A worker with a free slot has nothing waiting in the queue.
        """
        if self._workers is None:
            blind = self._settings.outstanding_without_heartbeats if needs <= ALWAYS_ACCEPTED else 0
            return blind - outstanding
        slots, free_slots = self._places(self._workers, model_version, needs)
        return max(int(self._settings.jobs_per_slot * slots) - outstanding, free_slots - self._taken_since)

    def _places(self, workers: list[Worker], model_version: int | None, needs: frozenset[str]) -> tuple[int, int]:
        """The slots, and the free ones, of the workers that answer such a job: none if not all that may get it know it."""
        if (model_version, needs) not in self._known_places:
            able = answering(workers, model_version)
            # Of any version: one queue serves them all, and a worker refuses a kind of job that it does not know.
            known = needs <= accepted(workers)
            self._known_places[model_version, needs] = (capacity(able), free(able)) if known else (0, 0)
        return self._known_places[model_version, needs]

    def take(self) -> None:
        """A job is sent, and takes a slot that the latest list shows as free."""
        self._taken_since += 1

    def _warn(self, warning: str) -> None:
        """Logs a warning when the condition begins, and once more when it ends."""
        if warning and not self._warning:
            log.warning(warning)
        elif self._warning and not warning:
            log.warning("A worker is ready again: jobs are sent.")
        self._warning = warning
