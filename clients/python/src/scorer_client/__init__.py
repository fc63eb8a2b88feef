"""A client for scorer: submits candidates over RabbitMQ and hands every result to a handler once.

`candidates` writes candidates in each format that the workers read; `sketches` finds copies among scored candidates.
"""

from scorer_client import candidates, sketches
from scorer_client.broker import Broker, BrokerUnavailable, Nacked, PublishRefused, Unroutable
from scorer_client.client import Client, TopologyMissing
from scorer_client.fleet import Fleet, FleetUnknown, Worker
from scorer_client.jobs import Candidate, Job
from scorer_client.outcomes import Answer, Outcome, TimedOut, Unreadable
from scorer_client.results import Loss, Refusal, Result, Score
from scorer_client.settings import Settings

__all__ = [
    "Answer",
    "Broker",
    "BrokerUnavailable",
    "Candidate",
    "Client",
    "Fleet",
    "FleetUnknown",
    "Job",
    "Loss",
    "Nacked",
    "Outcome",
    "PublishRefused",
    "Refusal",
    "Result",
    "Score",
    "Settings",
    "TimedOut",
    "TopologyMissing",
    "Unreadable",
    "Unroutable",
    "Worker",
    "candidates",
    "sketches",
]
