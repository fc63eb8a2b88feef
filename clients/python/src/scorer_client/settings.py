"""How an aggregator behaves."""

from dataclasses import dataclass

from scorer_client.jobs import Encoding


@dataclass(frozen=True)
class Settings:
    """The defaults suit workers with defaults; times are seconds."""

    encoding: Encoding = "application/msgpack"
    timeout_s: float = 900.0  # From submit to the result; the retry ladder alone may take six minutes.
    factor: float = 2.0  # Jobs outstanding, in relation to what the ready workers hold: enough that none waits for us.
    outstanding_without_heartbeats: int = 0  # How many while Redis is away; 0 = wait until it tells of a worker.
    remembered: int = 100_000  # Answers whose second copy is known for one.
    look_every_s: float = 0.5  # At the heartbeats, and for a queue that is not there.
    missing_for_s: float = 10.0  # How long that queue may not be there although workers are ready.
    tick_s: float = 0.2
    reconnect_first_s: float = 0.2
    reconnect_most_s: float = 5.0
