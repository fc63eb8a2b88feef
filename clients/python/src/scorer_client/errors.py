"""What the client raises, and what a future that has no result raises."""


class BrokerUnavailable(Exception):
    """There is no connection, or it was lost. The message in question may or may not have arrived."""


class PublishRefused(Exception):
    """The job `submission_id` could not be sent."""

    def __init__(self, submission_id: str, why: str) -> None:
        super().__init__(f"Job {submission_id} was not accepted: {why}")
        self.submission_id = submission_id


class Unroutable(PublishRefused):
    """No queue is bound for the model's jobs, or the exchange does not exist."""


class Nacked(PublishRefused):
    """The queue refused the job: it is full, or cannot store it."""


class Unencodable(PublishRefused):
    """The encoding cannot hold the job, for example because of a value in its context."""


class TopologyMissing(PublishRefused):
    """Workers are ready, but there is no queue to read results from."""


class NoResult(TimeoutError):
    """No result came within the job's time-out. A TimedOut, as an exception."""


class BacklogFull(Exception):
    """There are `Settings.max_jobs` jobs without an outcome, and the caller cannot wait: it is what makes room."""


class Stopped(Exception):
    """The client was closed, or its handler raised, before the job had an outcome. The cause, if any, is attached."""
