"""What an aggregator's handler is called with: one of these for every job, and for whatever else came."""

from dataclasses import dataclass

from aggregator.jobs import Job
from aggregator.results import Result


@dataclass(frozen=True)
class Answer:
    """A result. `job` is None where no job waits for it: it came after its TimedOut, or is an earlier run's."""

    job: Job | None
    result: Result


@dataclass(frozen=True)
class TimedOut:
    """No result within the job's time. A published job may be answered yet; one that was held back never left."""

    job: Job
    after_s: float
    published: bool

    def __str__(self) -> str:
        where = "though RabbitMQ has it" if self.published else "for it was held back: no worker that could take it was known"
        return f"Job {self.job.submission_id} has no result after {self.after_s:.0f} s, {where}."


@dataclass(frozen=True)
class Unreadable:
    """A message among the results that is none. It is acknowledged after the handler, as all others are."""

    problem: str
    message_id: str | None
    body: bytes


Outcome = Answer | TimedOut | Unreadable
