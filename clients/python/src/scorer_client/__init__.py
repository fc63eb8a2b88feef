"""A client for scorer: submits jobs over RabbitMQ and hands every outcome to a handler, a future, or both, once.

`Client` blocks; `scorer_client.aio` has the same for asyncio. `candidates` writes candidates in each format that the
workers read; `sketches` finds copies among scored candidates; `Round` pays for what candidates add to a merge.
"""

from scorer_client import candidates, sketches
from scorer_client.broker import Broker
from scorer_client.client import Client
from scorer_client.errors import (
    BacklogFull,
    BrokerUnavailable,
    Nacked,
    NoResult,
    PublishRefused,
    Stopped,
    TopologyMissing,
    Unencodable,
    Unroutable,
)
from scorer_client.fleet import Fleet
from scorer_client.jobs import Candidate, Job
from scorer_client.merges import AnyJob, Member, Merge, Merged, MergedMember, Worth
from scorer_client.metrics import Metrics
from scorer_client.outcomes import Answer, NotSent, Outcome, TimedOut, Unreadable
from scorer_client.refusals import Refusal
from scorer_client.results import Loss, Result, Score
from scorer_client.rounds import Round, Settlement, Unsettled
from scorer_client.settings import Settings
from scorer_client.stops import Stop, StoppedEarly
from scorer_client.workers import FleetUnknown, Worker

__all__ = [
    "Answer",
    "AnyJob",
    "BacklogFull",
    "Broker",
    "BrokerUnavailable",
    "Candidate",
    "Client",
    "Fleet",
    "FleetUnknown",
    "Job",
    "Loss",
    "Member",
    "Merge",
    "Merged",
    "MergedMember",
    "Metrics",
    "Nacked",
    "NoResult",
    "NotSent",
    "Outcome",
    "PublishRefused",
    "Refusal",
    "Result",
    "Round",
    "Score",
    "Settings",
    "Settlement",
    "Stop",
    "Stopped",
    "StoppedEarly",
    "TimedOut",
    "TopologyMissing",
    "Unencodable",
    "Unreadable",
    "Unroutable",
    "Unsettled",
    "Worker",
    "Worth",
    "candidates",
    "sketches",
]
