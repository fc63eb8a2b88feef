"""What the handler is called with: one outcome for every job, and one for every other message in the results queue."""

from dataclasses import dataclass

from scorer_client.errors import PublishRefused
from scorer_client.merges import AnyJob
from scorer_client.results import Result


@dataclass(frozen=True)
class Answer:
    """A result. `job` is None if no pending job matches: the job timed out before, or an earlier run submitted it."""

    job: AnyJob | None
    result: Result


@dataclass(frozen=True)
class TimedOut:
    """No result came in time. If RabbitMQ confirmed the job, a late Answer may follow; otherwise it may not have been sent.

    If it was never sent, `why` says what it waited for: a worker of its version, workers that accept such a job, or room.
    """

    job: AnyJob
    after_s: float
    confirmed: bool
    why: str = ""

    def __str__(self) -> str:
        held = f"it was held back because {self.why}" if self.why else "RabbitMQ did not confirm it"
        where = "RabbitMQ has it" if self.confirmed else held
        return f"Job {self.job.submission_id} has no result after {self.after_s:.0f} s: {where}."


@dataclass(frozen=True)
class NotSent:
    """The job could not be sent, and `error` says why. It may be submitted again under the same submission_id."""

    job: AnyJob
    error: PublishRefused


@dataclass(frozen=True)
class Unreadable:
    """A message in the results queue that is not a valid result. It is acknowledged when the handler returns."""

    problem: str
    message_id: str | None
    body: bytes


Outcome = Answer | TimedOut | NotSent | Unreadable
