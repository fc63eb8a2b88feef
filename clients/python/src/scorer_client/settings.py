"""The client's settings."""

from dataclasses import dataclass
from typing import get_args

from scorer_client.jobs import Encoding, check_known


@dataclass(frozen=True)
class Settings:
    """The defaults suit workers with default settings. Times are in seconds."""

    encoding: Encoding = "application/msgpack"
    timeout_s: float = 900.0  # From submit to result. Retries alone can take six minutes.
    max_jobs: int = 1000  # Jobs without an outcome. Beyond it, `submit` waits.
    jobs_per_slot: float = 2.0  # Jobs at the broker for each job that the ready workers can hold, so that none sits idle.
    outstanding_without_heartbeats: int = 0  # Jobs at the broker while Redis is unavailable; 0 = wait for Redis.
    remembered_answers: int = 100_000  # How many answers are remembered, to drop their duplicates.
    poll_interval_s: float = 0.5  # How often heartbeats are read, and a missing results queue is looked for.
    missing_queue_timeout_s: float = 10.0  # How long the results queue may be missing while workers are ready.
    tick_s: float = 0.2  # How long the client waits for something to happen before it looks at the time.
    reconnect_min_s: float = 0.2
    reconnect_max_s: float = 5.0

    def __post_init__(self) -> None:
        check_known("encoding", self.encoding, get_args(Encoding))
