"""One connection to RabbitMQ: publishes jobs with confirms, and consumes results until they are acknowledged."""

import contextlib
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pika  # type: ignore[import-untyped]
from pika.adapters.utils.connection_workflow import AMQPConnectorException  # type: ignore[import-untyped]
from pika.exceptions import (  # type: ignore[import-untyped]
    AMQPError,
    ChannelClosedByBroker,
    NackError,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    UnroutableError,
)

from scorer_client.endpoint import (
    ACCESS_REFUSED,
    CLOSE_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    NOT_ALLOWED,
    NOT_FOUND,
    OWN_QUEUE_ARGUMENTS,
    PREFETCH,
    REPLY_TIMEOUT_S,
    Delivery,
    Endpoint,
    Reason,
)
from scorer_client.errors import BrokerUnavailable
from scorer_client.nodes import Nodes, address, checked, virtual_host


class Broker:
    """Publishes jobs of one model and consumes results from `NAMESPACE.results.MODEL`.

    The URL may also be a sequence of URLs, one for each node of a cluster. When the node in use is lost, or accepts a
    connection and says nothing for 5 s, the next one is tried, in a random order that each Broker keeps.

    With `own_queue`, it declares a queue of that name and consumes from it instead; every result goes to both queues.
    The queue survives a lost connection and expires an hour after its consumer is gone.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str,
        namespace: str = "scorer",
        own_queue: str | None = None,
        reply_timeout_s: float = REPLY_TIMEOUT_S,
    ) -> None:
        self.endpoint = Endpoint(checked(url), model, namespace, own_queue)
        self._parameters = {url: _parameters(url) for url in self.endpoint.urls}
        self._nodes = Nodes(self.endpoint.urls)
        self._url = self.endpoint.urls[0]  # Of the node that was tried last.
        self._reply_timeout_s = reply_timeout_s
        self.consuming = False
        self._connection: Any = None
        self._channel: Any = None
        self._arrived: deque[Delivery] = deque()

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def node(self) -> str | None:
        """The node in use, as host:port."""
        return address(self._url) if self.connected else None

    def connect(self) -> None:
        """To the first node that answers. Raises BrokerUnavailable."""
        errors: dict[str, BaseException] = {}
        for self._url in self._nodes.round():
            try:
                return self._connect()
            # The last is what pika raises, and counts as none of its AMQPErrors, when a node says nothing.
            except (AMQPError, OSError, AMQPConnectorException) as error:
                self.close()
                errors[self._url] = error
        raise self.endpoint.unavailable({url: _reason(url, error) for url, error in errors.items()}) from errors[self._url]

    def _connect(self) -> None:
        self._connection = pika.BlockingConnection(self._parameters[self._url])
        with self._reply_timeout():
            self._open_channel()

    def close(self) -> None:
        """Results that were not acknowledged return to the queue."""
        connection = self._connection
        self._reset()
        if connection is None or not connection.is_open:
            return
        # If the connection is already lost, the broker drops it after two missed heartbeats.
        with contextlib.suppress(AMQPError, OSError), _timeout(CLOSE_TIMEOUT_S, connection):
            connection.close()

    def publish(self, submission_id: str, content_type: str, body: bytes, priority: int | None = None) -> None:
        """Returns when the broker has confirmed the job. Raises PublishRefused or BrokerUnavailable."""
        properties = pika.BasicProperties(
            content_type=content_type,
            delivery_mode=pika.DeliveryMode.Persistent,
            message_id=submission_id,
            correlation_id=submission_id,
            priority=priority,
        )
        try:
            with self._reply_timeout():
                self._channel.basic_publish(self.endpoint.jobs, self.endpoint.model, body, properties, mandatory=True)
        except UnroutableError as error:
            raise self.endpoint.unroutable(submission_id) from error
        except NackError as error:
            raise self.endpoint.nacked(submission_id) from error
        except ChannelClosedByBroker as error:
            self.close()
            raise self.endpoint.channel_closed(submission_id, error.reply_code, error.reply_text) from error
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
                    self._channel.basic_consume(self.endpoint.results_queue, self._on_message)
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
        if self.endpoint.own_queue is None or not self.connected:
            return
        try:
            with self._reply_timeout():
                self._channel.queue_delete(self.endpoint.own_queue)
        except (AMQPError, OSError) as error:
            raise self._unavailable(error) from error

    def wake(self) -> None:
        """Ends a `receive` that waits. The one method that another thread may call."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(AMQPError):
                connection.add_callback_threadsafe(lambda: None)

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
            queue = self.endpoint.results_queue
            if self.endpoint.own_queue is None:
                probe.queue_declare(queue, passive=True)
            else:
                probe.queue_declare(queue, durable=True, arguments=OWN_QUEUE_ARGUMENTS)
                probe.queue_bind(queue, self.endpoint.results, self.endpoint.results_key)
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

    def _unavailable(self, error: BaseException) -> BrokerUnavailable:
        self.close()
        return self.endpoint.unavailable({self._url: _reason(self._url, error)})

    def _reset(self) -> None:
        self._connection = self._channel = None
        self._arrived.clear()
        self.consuming = False


def _parameters(url: str) -> Any:
    parameters = pika.URLParameters(url)
    parameters.virtual_host = virtual_host(url)
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


def _reason(url: str, error: BaseException) -> Reason:
    """The innermost error: pika wraps it, and some of its own errors have no text."""
    inner = getattr(error, "exception", None) or next(iter(error.args), None)
    if isinstance(inner, BaseException):
        return _reason(url, inner)
    text = (str(error) or repr(error)).rstrip(".")
    match error, _closed(text):
        case ProbableAuthenticationError(), (code, _) if code == ACCESS_REFUSED:
            return Reason.login(url)
        case ProbableAccessDeniedError(), (code, said) if code == NOT_ALLOWED:
            return Reason.no_entry(url, said)
        case ChannelClosedByBroker(reply_code=code, reply_text=said), _ if code == ACCESS_REFUSED:
            return Reason(said, denied=True)
    return Reason(text)


def _closed(text: str) -> tuple[int, str] | None:
    """The code and the text with which RabbitMQ ended a login. pika guesses its errors of login also from a lost connection,
    and keeps only the repr of what happened."""
    found = re.search(r"ConnectionClosedByBroker: \((\d+)\) (['\"])(.*)\2", text)
    return found and (int(found[1]), found[3])
