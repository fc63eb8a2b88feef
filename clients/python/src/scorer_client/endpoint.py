"""The objects in RabbitMQ that a client uses, and the sentences about them."""

from collections.abc import Mapping
from dataclasses import dataclass

from scorer_client.errors import BrokerUnavailable, Nacked, PublishRefused, TopologyMissing, Unroutable
from scorer_client.nodes import address, user, virtual_host

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
REPLY_TIMEOUT_S = 30.0  # As in the workers: a queue without a leader may never confirm.
PREFETCH = 64  # Results that the broker sends ahead of the handler.
OWN_QUEUE_ARGUMENTS = {"x-queue-type": "quorum", "x-expires": 3_600_000}
ACCESS_REFUSED, NOT_FOUND, NOT_ALLOWED = 403, 404, 530
HOW_TO_DECLARE = "Start a worker or run `scorer topology --declare`, with amqp.results_queue set to true."


@dataclass(frozen=True)
class Delivery:
    """A message as it arrived, not acknowledged yet. `connection` numbers the connection that it came by."""

    tag: int
    message_id: str | None
    content_type: str | None
    body: bytes
    connection: int = 0


@dataclass(frozen=True)
class Reason:
    """Why a node cannot be used. One that denies access is running, and its address is correct."""

    text: str
    denied: bool = False

    @classmethod
    def login(cls, url: str) -> "Reason":
        return cls(f"it refused the login of {user(url)}; check the user and the password", denied=True)

    @classmethod
    def no_entry(cls, url: str, said: str = "") -> "Reason":
        """`said` is RabbitMQ's own text, where the driver has it."""
        host = f"the virtual host '{virtual_host(url)}'" + (f" ({said})" if said else "")
        return cls(f"it does not let {user(url)} use {host}; check that it exists and that {user(url)} may use it", denied=True)


@dataclass(frozen=True)
class Endpoint:
    """A model's exchanges and queues at one broker, which may be a cluster of nodes."""

    urls: tuple[str, ...]
    model: str
    namespace: str
    own_queue: str | None

    @property
    def address(self) -> str:
        """Host and port of each node, without the passwords."""
        return ", ".join(address(url) for url in self.urls)

    @property
    def jobs(self) -> str:
        return f"{self.namespace}.jobs"

    @property
    def results(self) -> str:
        return f"{self.namespace}.results"

    @property
    def results_queue(self) -> str:
        return self.own_queue or f"{self.results}.{self.model}"

    @property
    def results_key(self) -> str:
        return f"{self.model}.*"

    def unroutable(self, submission_id: str) -> Unroutable:
        return Unroutable(submission_id, f"no queue is bound for jobs of {self.model}. {HOW_TO_DECLARE}")

    def nacked(self, submission_id: str) -> Nacked:
        why = f"the queue {self.jobs}.{self.model} refused it; it may be full. Try again later."
        return Nacked(submission_id, why)

    def channel_closed(self, submission_id: str, code: int, text: str) -> PublishRefused:
        if code == NOT_FOUND:
            return Unroutable(submission_id, f"there is no exchange {self.jobs}. {HOW_TO_DECLARE}")
        return PublishRefused(submission_id, f"RabbitMQ replied: {text} ({code}).")

    def topology_missing(self, submission_id: str) -> TopologyMissing:
        why = f"RabbitMQ at {self.address} has no results queue {self.results_queue}. {HOW_TO_DECLARE}"
        return TopologyMissing(submission_id, why)

    def unavailable(self, reasons: Mapping[str, Reason]) -> BrokerUnavailable:
        """`reasons` has why each node that was tried cannot be used."""
        at = ", ".join(address(url) for url in reasons)
        why = next(iter(reasons.values())).text
        if len(set(reasons.values())) > 1:
            why = "; ".join(f"{address(url)}: {reason.text}" for url, reason in reasons.items())
        if all(reason.denied for reason in reasons.values()):
            return BrokerUnavailable(f"RabbitMQ at {at} denies access: {why}.")
        return BrokerUnavailable(
            f"RabbitMQ at {at} is unavailable: {why}. Check that it is running and the address is correct."
        )
