"""How many jobs may be at the broker, given the workers that are ready."""

import logging
from collections.abc import Callable

from scorer_client.fleet import Fleet, FleetUnknown, Worker, answering, capacity, free
from scorer_client.settings import Settings

log = logging.getLogger(__name__)


class FlowControl:
    """Keeps the latest list of workers. None means unknown, which is not the same as no workers."""

    def __init__(self, fleet: Fleet, settings: Settings, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._workers: list[Worker] | None = None
        self._refreshed_at = float("-inf")
        self._sent_since = 0
        self._warning = ""

    def refresh(self) -> None:
        """Reads the heartbeats, at most once per `poll_interval_s`: workers send one a second."""
        if self._clock() - self._refreshed_at < self._settings.poll_interval_s:
            return
        try:
            self._workers = self._fleet.workers()
            self._warn("" if any(worker.ready for worker in self._workers) else "No worker is ready: jobs are held back.")
        except FleetUnknown as unknown:
            self._workers = None
            blind = self._settings.outstanding_without_heartbeats
            self._warn(f"{unknown} Until it can be read, jobs are {f'sent {blind} at a time' if blind else 'held back'}.")
        self._refreshed_at = self._clock()
        self._sent_since = 0

    def room(self, model_version: int | None, outstanding: int) -> int:
        """How many more jobs of this version may be sent now.

        Jobs that wait for a retry are outstanding for minutes while workers are idle, so a free slot always counts as
        room. A worker with a free slot has nothing waiting in the queue.
        """
        if self._workers is None:
            return self._settings.outstanding_without_heartbeats - outstanding
        able = answering(self._workers, model_version)
        return max(int(self._settings.jobs_per_slot * capacity(able)) - outstanding, free(able) - self._sent_since)

    def sent(self) -> None:
        self._sent_since += 1

    def _warn(self, warning: str) -> None:
        """Logs a warning when the condition begins, and once more when it ends."""
        if warning and not self._warning:
            log.warning(warning)
        elif self._warning and not warning:
            log.warning("A worker is ready again: jobs are sent.")
        self._warning = warning
