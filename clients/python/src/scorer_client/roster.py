"""Who can take jobs, as far as is known at the moment."""

import logging
from collections.abc import Callable

from scorer_client.fleet import Fleet, FleetUnknown, Worker, answering, capacity, free
from scorer_client.settings import Settings

log = logging.getLogger(__name__)


class Roster:
    """The fleet as it was at the last look; None is "unknown", which is not "nobody"."""

    def __init__(self, fleet: Fleet, settings: Settings, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self._workers: list[Worker] | None = None
        self._looked_at = float("-inf")
        self._sent_since = 0
        self._said = ""

    def look(self) -> None:
        """No more often than the settings say, for beats come once a second."""
        if self._clock() - self._looked_at < self._settings.look_every_s:
            return
        try:
            self._workers = self._fleet.workers()
            self._say("" if any(worker.ready for worker in self._workers) else "No worker is ready: jobs are held back.")
        except FleetUnknown as unknown:
            self._workers = None
            go_on = self._settings.outstanding_without_heartbeats
            self._say(f"{unknown} Jobs are {f'sent without, {go_on} at a time' if go_on else 'held back'} until it tells.")
        self._looked_at = self._clock()
        self._sent_since = 0

    def room(self, model_version: int | None, outstanding: int) -> int:
        """How many jobs may go out now.

        Jobs on the retry ladder are outstanding for minutes while the workers are idle, so free places count as room
        whatever is outstanding; a worker with a free place has nothing in the queue.
        """
        if self._workers is None:
            return self._settings.outstanding_without_heartbeats - outstanding
        able = answering(self._workers, model_version)
        return max(int(self._settings.factor * capacity(able)) - outstanding, free(able) - self._sent_since)

    def sent(self) -> None:
        self._sent_since += 1

    def _say(self, sentence: str) -> None:
        """Once, when it begins; and when it is over."""
        if sentence and not self._said:
            log.warning(sentence)
        elif self._said and not sentence:
            log.warning("A worker is ready again: jobs go out.")
        self._said = sentence
