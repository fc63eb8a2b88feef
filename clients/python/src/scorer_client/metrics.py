"""Hooks for metrics."""

import logging
from collections.abc import Callable
from typing import ParamSpec

from scorer_client.errors import BrokerUnavailable, PublishRefused
from scorer_client.merges import AnyJob
from scorer_client.results import Result

log = logging.getLogger(__name__)

P = ParamSpec("P")


class Metrics:
    """Does nothing: override what you count. Times are in seconds.

    The client calls the hooks from its own thread or task, `submitted` from the caller's. They must be quick, must not
    call the client, and should not raise: an exception is logged and ignored.
    """

    def submitted(self, job: AnyJob) -> None:
        """The client has accepted the job."""

    def confirmed(self, job: AnyJob, seconds: float) -> None:
        """RabbitMQ has the job, this long after it was submitted."""

    def answered(self, job: AnyJob, result: Result, seconds: float) -> None:
        """The first result of the job, this long after it was submitted. See `result.status` and `result.code`.

        Count a Score that was `stopped` as such: its delta is no measurement.
        """

    def timed_out(self, job: AnyJob) -> None:
        """The job ended with a TimedOut."""

    def not_sent(self, job: AnyJob, error: PublishRefused) -> None:
        """The job ended with a NotSent."""

    def duplicate(self, result: Result) -> None:
        """A result came again and was dropped."""

    def load(self, held: int, outstanding: int) -> None:
        """How many jobs are held back, and how many are at the broker or the workers. Called when it changes."""

    def disconnected(self, error: BrokerUnavailable) -> None:
        """The connection to RabbitMQ was lost, or could not be made again."""

    def reconnected(self) -> None:
        """The connection to RabbitMQ was made again."""


def call(hook: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
    try:
        hook(*arguments, **named)
    except Exception:
        log.exception("A metrics hook raised; it is ignored.")
