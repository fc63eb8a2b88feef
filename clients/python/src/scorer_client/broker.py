"""One connection to RabbitMQ: publishes jobs with confirms, and consumes results until they are acknowledged."""

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

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
REPLY_TIMEOUT_S = 30.0  # As in the workers: a queue without a leader may never confirm.
PREFETCH = 64  # Results that the broker sends ahead of the handler.
OWN_QUEUE_EXPIRES_MS = 3_600_000
NOT_FOUND = 404


class BrokerUnavailable(Exception):
    """There is no connection, or it was lost. The message in question may or may not have arrived."""


class PublishRefused(Exception):
    """The broker did not accept the job `submission_id`."""

    def __init__(self, submission_id: str, why: str) -> None:
        super().__init__(f"Job {submission_id} was not accepted: {why}")
        self.submission_id = submission_id


class Unroutable(PublishRefused):
    """No queue is bound for the model's jobs, or the exchange does not exist."""


class Nacked(PublishRefused):
    """The queue refused the job: it is full, or cannot store it."""


@dataclass(frozen=True)
class Delivery:
    """A message as it arrived, not acknowledged yet."""

    tag: int
    message_id: str | None
    content_type: str | None
    body: bytes


class Broker:
    """Publishes jobs of one model and consumes results from `NAMESPACE.results.MODEL`.

    With `own_queue`, it declares a queue of that name and consumes from it instead; every result goes to both queues.
    The queue survives a lost connection and expires an hour after its consumer is gone.
    """

    def __init__(
        self,
        url: str,
        model: str,
        namespace: str = "scorer",
        own_queue: str | None = None,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        self._parameters = _parameters(url)
        self._reply_timeout_s = reply_timeout_s
        self._address = f"{self._parameters.host}:{self._parameters.port}"
        self._jobs = f"{namespace}.jobs"
        self._results = f"{namespace}.results"
        self._own_queue = own_queue
        self.model = model
        self.results_queue = own_queue or f"{namespace}.results.{model}"
        self.consuming = False
        self._connection: Any = None
        self._channel: Any = None
        self._arrived: deque[Delivery] = deque()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def connect(self) -> None:
        """Raises BrokerUnavailable."""
        try:
            self._connection = pika.BlockingConnection(self._parameters)
            with self._reply_timeout():
                self._open_channel()
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error

    def close(self) -> None:
        """Results that were not acknowledged return to the queue."""
        connection = self._connection
        self._reset()
        if connection is None or not connection.is_open:
            return
        # If the connection is already lost, the broker drops it after two missed heartbeats.
        with contextlib.suppress(AMQPError, OSError), _timeout(CLOSE_TIMEOUT_S, connection):
            connection.close()

    def publish(self, submission_id: str, content_type: str, body: bytes) -> None:
        """Returns when the broker has confirmed the job. Raises PublishRefused or BrokerUnavailable."""
        properties = pika.BasicProperties(
            content_type=content_type,
            delivery_mode=pika.DeliveryMode.Persistent,
            message_id=submission_id,
            correlation_id=submission_id,
        )
        try:
            with self._reply_timeout():
                self._channel.basic_publish(self._jobs, self.model, body, properties, mandatory=True)
        except UnroutableError as error:
            raise Unroutable(submission_id, f"no queue is bound for jobs of {self.model}. {self._how_to_declare()}") from error
        except NackError as error:
            why = f"the queue {self._jobs}.{self.model} refused it; it may be full. Try again later."
            raise Nacked(submission_id, why) from error
        except ChannelClosedByBroker as error:
            raise self._channel_closed(submission_id, error) from error
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error

    def consume(self) -> bool:
        """Starts to consume results. Returns False while the queue (for an own queue: the exchange) does not exist."""
        if self.consuming:
            return True
        try:
            with self._reply_timeout():
                self.consuming = self._queue_exists()
                if self.consuming:
                    self._channel.basic_consume(self.results_queue, self._on_message)
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error
        return self.consuming

    def receive(self, wait_s: float) -> list[Delivery]:
        """The results that arrive within `wait_s`. Also serves AMQP heartbeats. Raises BrokerUnavailable."""
        try:
            self._connection.process_data_events(time_limit=wait_s)
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error
        if not self._channel.is_open:
            raise self._unavailable(ConnectionError("the broker closed the channel"))
        arrived = list(self._arrived)
        self._arrived.clear()
        return arrived

    def acknowledge(self, delivery: Delivery) -> None:
        try:
            with self._reply_timeout():
                self._channel.basic_ack(delivery.tag)
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error

    def delete_own_queue(self) -> None:
        if self._own_queue is None or not self.connected:
            return
        try:
            with self._reply_timeout():
                self._channel.queue_delete(self._own_queue)
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error

    def missing_queue(self) -> str:
        """The error message for a results queue that does not exist."""
        return f"RabbitMQ at {self._address} has no results queue {self.results_queue}. {self._how_to_declare()}"

    def _reply_timeout(self) -> contextlib.AbstractContextManager[None]:
        return _timeout(self._reply_timeout_s, self._connection)

    def _open_channel(self) -> None:
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()
        self._channel.basic_qos(prefetch_count=PREFETCH)
        self._channel.add_on_cancel_callback(self._on_cancel)

    def _queue_exists(self) -> bool:
        # On a separate channel: RabbitMQ closes the channel on which a missing queue is declared passively.
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

    def _on_message(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._arrived.append(Delivery(method.delivery_tag, properties.message_id, properties.content_type, body))

    def _on_cancel(self, _frame: Any) -> None:
        """The queue was deleted or moved: consume it again when it is back."""
        self.consuming = False

    def _channel_closed(self, submission_id: str, error: Any) -> PublishRefused:
        self.close()
        if error.reply_code == NOT_FOUND:
            return Unroutable(submission_id, f"there is no exchange {self._jobs}. {self._how_to_declare()}")
        return PublishRefused(submission_id, f"RabbitMQ replied: {error.reply_text} ({error.reply_code}).")

    def _how_to_declare(self) -> str:
        return "Start a worker or run `scorer topology --declare`, with amqp.results_queue set to true."

    def _unavailable(self, error: BaseException) -> BrokerUnavailable:
        self.close()
        return BrokerUnavailable(
            f"RabbitMQ at {self._address} is unavailable: {_reason(error)}. "
            "Check that it is running and the address is correct."
        )

    def _reset(self) -> None:
        self._connection = self._channel = None
        self._arrived.clear()
        self.consuming = False


def _parameters(url: str) -> Any:
    if urlsplit(url).scheme not in ("amqp", "amqps"):
        raise ValueError(f"The RabbitMQ URL must begin with amqp:// or amqps://, not '{urlsplit(url).scheme}:'.")
    parameters = pika.URLParameters(url)
    # Celery writes the virtual host / this way, and the workers accept it.
    if urlsplit(url).path == "//":
        parameters.virtual_host = "/"
    parameters.socket_timeout = parameters.stack_timeout = CONNECT_TIMEOUT_S
    return parameters


@contextlib.contextmanager
def _timeout(seconds: float, connection: Any) -> Iterator[None]:
    """Ends pika's blocking calls, which have no timeout, by an exception from a timer in its loop."""

    def expire() -> None:
        raise TimeoutError(f"no reply within {seconds:g} s")

    loop = connection._impl.ioloop
    timer = loop.call_later(seconds, expire)
    try:
        yield
    finally:
        loop.remove_timeout(timer)


def _reason(error: BaseException) -> str:
    """The innermost error: pika wraps it, and some of its own errors have no text."""
    inner = getattr(error, "exception", None) or next(iter(error.args), None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    return (str(error) or repr(error)).rstrip(".")
