"""One connection to RabbitMQ: jobs go out with confirms, results come in and stay there until they are acknowledged."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pika  # type: ignore[import-untyped]
from pika.exceptions import (  # type: ignore[import-untyped]
    AMQPError,
    ChannelClosedByBroker,
    NackError,
    UnroutableError,
)

CONNECT_WITHIN_S = 5.0
CLOSE_WITHIN_S = 2.0
ANSWER_WITHIN_S = 30.0  # As the workers: a queue without a leader confirms nothing, for minutes or for ever.
UNACKNOWLEDGED = 64  # Results that the broker sends ahead of the handler.
OWN_QUEUE_EXPIRES_MS = 3_600_000
NOT_FOUND = 404


class BrokerAway(Exception):
    """There is no connection, or it was lost; what it concerned may or may not have arrived."""


class PublishRefused(Exception):
    """The broker has the job not. `submission_id` names it."""

    def __init__(self, submission_id: str, why: str) -> None:
        super().__init__(f"Job {submission_id} was not taken: {why}")
        self.submission_id = submission_id


class Unroutable(PublishRefused):
    """No queue is bound for the model's jobs, or the exchange is not there."""


class Nacked(PublishRefused):
    """The queue refuses: it is full, or cannot store."""


@dataclass(frozen=True)
class Delivery:
    tag: int
    message_id: str | None
    content_type: str | None
    body: bytes


class Broker:
    """Knows the names of the topology, and pika.

    `own_queue` names a queue that is made for this reader beside `NAMESPACE.results.MODEL`, and gets every result too;
    it outlives a lost connection, and expires an hour after its reader is gone.
    """

    def __init__(
        self,
        url: str,
        model: str,
        namespace: str = "scorer",
        own_queue: str | None = None,
        answer_within_s: float = ANSWER_WITHIN_S,
    ) -> None:
        self._parameters = _parameters(url)
        self._answer_within_s = answer_within_s
        self._place = f"{self._parameters.host}:{self._parameters.port}"
        self._jobs = f"{namespace}.jobs"
        self._results = f"{namespace}.results"
        self._own_queue = own_queue
        self.model = model
        self.results_queue = own_queue or f"{namespace}.results.{model}"
        self.listening = False
        self._connection: Any = None
        self._channel: Any = None
        self._arrived: deque[Delivery] = deque()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def connect(self) -> None:
        try:
            self._connection = pika.BlockingConnection(self._parameters)
            with self._answers():
                self._open_channel()
        except (AMQPError, OSError) as error:
            raise self._away(error) from error

    def close(self) -> None:
        """Results that were not acknowledged go back to the queue."""
        connection = self._connection
        self._forget()
        if connection is None or not connection.is_open:
            return
        # It may be lost already, which is as good as closed; the broker ends what is silent for two of its heartbeats.
        with contextlib.suppress(AMQPError, OSError), _within(CLOSE_WITHIN_S, connection):
            connection.close()

    def publish(self, submission_id: str, content_type: str, body: bytes) -> None:
        """Returns once the broker has stored the job. Raises PublishRefused, BrokerAway."""
        properties = pika.BasicProperties(
            content_type=content_type,
            delivery_mode=pika.DeliveryMode.Persistent,
            message_id=submission_id,
            correlation_id=submission_id,
        )
        try:
            with self._answers():
                self._channel.basic_publish(self._jobs, self.model, body, properties, mandatory=True)
        except UnroutableError as error:
            raise Unroutable(submission_id, f"no queue gets jobs for {self.model}. {self._make_it()}") from error
        except NackError as error:
            why = f"the queue {self._jobs}.{self.model} refuses it, as a full one does. Try later."
            raise Nacked(submission_id, why) from error
        except ChannelClosedByBroker as error:
            raise self._publish_closed_the_channel(submission_id, error) from error
        except (AMQPError, OSError) as error:
            raise self._away(error) from error

    def listen(self) -> bool:
        """Begins to read results; False while their queue, or for an own one the exchange, is not there."""
        if self.listening:
            return True
        try:
            with self._answers():
                self.listening = self._queue_is_there()
                if self.listening:
                    self._channel.basic_consume(self.results_queue, self._arrives)
        except (AMQPError, OSError) as error:
            raise self._away(error) from error
        return self.listening

    def receive(self, wait_s: float) -> list[Delivery]:
        """What has arrived, after at most so long; also keeps the connection alive. Raises BrokerAway."""
        try:
            self._connection.process_data_events(time_limit=wait_s)
        except (AMQPError, OSError) as error:
            raise self._away(error) from error
        if not self._channel.is_open:
            raise self._away(ConnectionError("the broker closed the channel"))
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def acknowledge(self, delivery: Delivery) -> None:
        try:
            with self._answers():
                self._channel.basic_ack(delivery.tag)
        except (AMQPError, OSError) as error:
            raise self._away(error) from error

    def delete_own_queue(self) -> None:
        if self._own_queue is None or not self.connected:
            return
        try:
            with self._answers():
                self._channel.queue_delete(self._own_queue)
        except (AMQPError, OSError) as error:
            raise self._away(error) from error

    def missing(self) -> str:
        """The sentence for a queue that is not there."""
        return f"RabbitMQ at {self._place} has no results for {self.results_queue}. {self._make_it()}"

    def _answers(self) -> contextlib.AbstractContextManager[None]:
        return _within(self._answer_within_s, self._connection)

    def _open_channel(self) -> None:
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()
        self._channel.basic_qos(prefetch_count=UNACKNOWLEDGED)
        self._channel.add_on_cancel_callback(self._cancelled)

    def _queue_is_there(self) -> bool:
        # On a channel of its own, because a queue that is not there closes the channel of whoever asks.
        probe = self._connection.channel()
        try:
            if self._own_queue is None:
                probe.queue_declare(self.results_queue, passive=True)
            else:
                expiry = {"x-queue-type": "quorum", "x-expires": OWN_QUEUE_EXPIRES_MS}
                probe.queue_declare(self._own_queue, durable=True, arguments=expiry)
                probe.queue_bind(self._own_queue, self._results, f"{self.model}.*")
        except ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                return False
            raise
        probe.close()
        return True

    def _arrives(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._arrived.append(Delivery(method.delivery_tag, properties.message_id, properties.content_type, body))

    def _cancelled(self, _frame: Any) -> None:
        """The queue was deleted, or moved: it has to be consumed anew when it is back."""
        self.listening = False

    def _publish_closed_the_channel(self, submission_id: str, error: Any) -> PublishRefused:
        self.close()
        if error.reply_code == NOT_FOUND:
            return Unroutable(submission_id, f"there is no exchange {self._jobs}. {self._make_it()}")
        return PublishRefused(submission_id, f"RabbitMQ says: {error.reply_text} ({error.reply_code}).")

    def _make_it(self) -> str:
        return "Start a worker, or run `scorer topology --declare`; amqp.results_queue must be true for the results."

    def _away(self, error: BaseException) -> BrokerAway:
        self.close()
        return BrokerAway(f"RabbitMQ at {self._place} is away: {_why(error)}. See whether it runs and the address is right.")

    def _forget(self) -> None:
        self._connection = self._channel = None
        self._arrived.clear()
        self.listening = False


def _parameters(url: str) -> Any:
    if urlsplit(url).scheme not in ("amqp", "amqps"):
        raise ValueError(f"The address of RabbitMQ begins with amqp:// or amqps://, not with '{urlsplit(url).scheme}:'.")
    parameters = pika.URLParameters(url)
    # As the workers read it, and Celery writes it.
    if urlsplit(url).path == "//":
        parameters.virtual_host = "/"
    parameters.socket_timeout = parameters.stack_timeout = CONNECT_WITHIN_S
    return parameters


@contextlib.contextmanager
def _within(seconds: float, connection: Any) -> Iterator[None]:
    """pika's blocking calls wait for an answer without end; what its loop is told to raise comes out of them."""

    def late() -> None:
        raise TimeoutError(f"no answer in {seconds:g} s")

    loop = connection._impl.ioloop
    timer = loop.call_later(seconds, late)
    try:
        yield
    finally:
        loop.remove_timeout(timer)


def _why(error: BaseException) -> str:
    """pika wraps what happened, and some of its errors say nothing themselves."""
    inner = getattr(error, "exception", None) or next(iter(error.args), None)
    if isinstance(inner, BaseException):
        return _why(inner)
    return (str(error) or repr(error)).rstrip(".")
