"""What an aggregator's handler is called with: one of these for every job, and for whatever else came."""

from dataclasses import dataclass

from scorer_client.jobs import Job
from scorer_client.results import Result


@dataclass(frozen=True)
class Answer:
    """A result. `job` is None where no job waits for it: it came after its TimedOut, or is an earlier run's."""

    job: Job | None
    result: Result


@dataclass(frozen=True)
class TimedOut:
    """No result within the job's time. What RabbitMQ confirmed is answered later, perhaps; the rest may never have left."""

    job: Job
    after_s: float
    confirmed: bool

    def __str__(self) -> str:
        held = "it was held back, for no worker that could take it was known, or RabbitMQ did not confirm it"
        where = "RabbitMQ has it" if self.confirmed else held
        return f"Job {self.job.submission_id} has no result after {self.after_s:.0f} s: {where}."


@dataclass(frozen=True)
class Unreadable:
    """A message among the results that is none. It is acknowledged after the handler, as all others are."""

    problem: str
    message_id: str | None
    body: bytes


Outcome = Answer | TimedOut | Unreadable
