"""One connection to RabbitMQ, for asyncio: publishes jobs with confirms, and consumes results until they are acknowledged."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aio_pika
from aio_pika.exceptions import AMQPError, ChannelClosed, ChannelInvalidStateError, ChannelNotFoundEntity, DeliveryError
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelPreconditionFailed,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)

from scorer_client.endpoint import (
    ACCESS_REFUSED,
    CLOSE_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    NOT_FOUND,
    OWN_QUEUE_ARGUMENTS,
    PREFETCH,
    REPLY_TIMEOUT_S,
    Delivery,
    Endpoint,
    Reason,
)
from scorer_client.errors import BrokerUnavailable
from scorer_client.nodes import Nodes, address, checked, with_heartbeat

# The heartbeat where there is another node to go to. aiormq gives a node up after three times that, and three seconds.
ALERT_S = 2
LOST = (AMQPError, OSError, ChannelInvalidStateError)
CODES = {
    ChannelAccessRefused: ACCESS_REFUSED,
    ChannelNotFoundEntity: NOT_FOUND,
    ChannelLockedResource: 405,
    ChannelPreconditionFailed: 406,
}  # aiormq drops the codes for which it has a class.


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
        self._nodes = Nodes(self.endpoint.urls)
        self._url = self.endpoint.urls[0]  # Of the node that was tried last.
        self._reply_timeout_s = reply_timeout_s
        self.consuming = False
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._consumer: Any = None  # A channel of its own, so that one that closes says what was wrong.
        self._publisher: Any = None
        self._exchange: Any = None
        self._number = 0  # Of the connection.
        self._lost: BrokerUnavailable | None = None
        self._arrived: Callable[[Delivery], None] = lambda _: None
        self._woken: Callable[[], None] = lambda: None

    def listen(self, arrived: Callable[[Delivery], None], woken: Callable[[], None]) -> None:
        """`arrived` is called with each result; `woken` when the connection or the consumer is lost."""
        self._arrived, self._woken = arrived, woken

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def node(self) -> str | None:
        """The node in use, as host:port."""
        return address(self._url) if self.connected else None

    async def connect(self) -> None:
        """To the first node that answers. Raises BrokerUnavailable."""
        errors: dict[str, BaseException] = {}
        for self._url in self._nodes.round():
            try:
                return await self._connect()
            except LOST as error:
                await self.close()
                errors[self._url] = error
        raise self.endpoint.unavailable({url: _reason(url, error) for url, error in errors.items()}) from errors[self._url]

    async def _connect(self) -> None:
        self._number += 1
        self._lost = None
        async with _replies(CONNECT_TIMEOUT_S):
            self._connection = await aio_pika.connect(self._alert(self._url))
        async with self._replies():
            await self._open_channels(self._connection)

    async def close(self) -> None:
        """Results that were not acknowledged return to the queue."""
        connection, self._connection = self._connection, None
        self.consuming = False
        if connection is not None:
            # If the connection is already lost, the broker drops it after two missed heartbeats.
            with contextlib.suppress(*LOST):
                async with _replies(CLOSE_TIMEOUT_S):
                    await connection.close()

    async def check(self) -> None:
        """Raises BrokerUnavailable if the connection or a channel was lost meanwhile."""
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost
        if self._connection is None:
            return
        if self._connection.is_closed or self._consumer.is_closed or self._publisher.is_closed:
            raise await self._unavailable(ConnectionError("the connection was closed"))

    async def publish(
        self, submission_id: str, content_type: str, body: bytes, alone: bool = True, priority: int | None = None
    ) -> None:
        """Returns when the broker has confirmed the job. Raises PublishRefused or BrokerUnavailable.

        RabbitMQ refuses some jobs by closing the channel, and does not say which one it means. Unless the job is `alone`
        in waiting for its confirm, that is a BrokerUnavailable.
        """
        message = aio_pika.Message(
            body,
            content_type=content_type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=submission_id,
            correlation_id=submission_id,
            priority=priority,
        )
        try:
            async with self._replies():
                await self._exchange.publish(message, self.endpoint.model, mandatory=True)
        except PublishError as error:
            raise self.endpoint.unroutable(submission_id) from error
        except DeliveryError as error:
            raise self.endpoint.nacked(submission_id) from error
        except ChannelClosed as error:
            unavailable, code = await self._unavailable(error), _code(error)
            if code == NOT_FOUND or (code is not None and alone):
                raise self.endpoint.channel_closed(submission_id, code, str(error.args[-1])) from error
            raise unavailable from error
        except LOST as error:
            raise await self._unavailable(error) from error

    async def consume(self) -> bool:
        """Starts to consume results. Returns False while the queue (for an own queue: the exchange) does not exist."""
        if self.consuming:
            return True
        try:
            async with self._replies():
                self.consuming = await self._queue_exists()
                if self.consuming:
                    queue = await self._consumer.get_queue(self.endpoint.results_queue, ensure=False)
                    await queue.consume(self._on_message(self._number))
        except LOST as error:
            raise await self._unavailable(error) from error
        return self.consuming

    async def acknowledge(self, delivery: Delivery) -> None:
        """If its connection is lost, the result comes again by another one; `check` tells."""
        if delivery.connection != self._number or not self.connected:
            return
        try:
            async with self._replies():
                channel = await self._consumer.get_underlay_channel()
                await channel.basic_ack(delivery.tag)
        except LOST as error:
            if delivery.connection == self._number and self.connected:
                self._lost = await self._unavailable(error)
            self._woken()

    async def delete_own_queue(self) -> None:
        if self.endpoint.own_queue is None or not self.connected:
            return
        try:
            async with self._replies():
                await self._publisher.queue_delete(self.endpoint.own_queue)
        except LOST as error:
            raise await self._unavailable(error) from error

    def _alert(self, url: str) -> str:
        return with_heartbeat(url, ALERT_S) if len(self.endpoint.urls) > 1 else url

    def _replies(self) -> contextlib.AbstractAsyncContextManager[None]:
        return _replies(self._reply_timeout_s)

    async def _open_channels(self, connection: aio_pika.abc.AbstractConnection) -> None:
        self._publisher = await connection.channel(publisher_confirms=True, on_return_raises=True)
        self._exchange = await self._publisher.get_exchange(self.endpoint.jobs, ensure=False)
        self._consumer = await connection.channel(publisher_confirms=False)
        await self._consumer.set_qos(prefetch_count=PREFETCH)
        for channel in (self._publisher, self._consumer):
            channel.close_callbacks.add(self._on_close)
        underlay = await self._consumer.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(self._on_cancel)

    async def _queue_exists(self) -> bool:
        if self._connection is None:
            raise ConnectionError("the connection was closed")
        # On a separate channel: RabbitMQ closes the channel on which a missing queue is declared passively.
        probe: Any = await self._connection.channel()
        name = self.endpoint.results_queue
        try:
            if self.endpoint.own_queue is None:
                await probe.declare_queue(name, passive=True)
            else:
                queue = await probe.declare_queue(name, durable=True, arguments=OWN_QUEUE_ARGUMENTS)
                await queue.bind(self.endpoint.results, self.endpoint.results_key)
        except ChannelNotFoundEntity:
            return False
        await probe.close()
        return True

    def _on_message(self, number: int) -> Callable[[aio_pika.abc.AbstractIncomingMessage], Any]:
        async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            if number == self._number and message.delivery_tag is not None:
                tag, body = message.delivery_tag, message.body
                self._arrived(Delivery(tag, message.message_id, message.content_type, body, number))

        return on_message

    def _on_close(self, *_: object) -> None:
        self._woken()

    def _on_cancel(self, _frame: object) -> None:
        """The queue was deleted or moved: consume it again when it is back."""
        self.consuming = False
        self._woken()

    async def _unavailable(self, error: BaseException) -> BrokerUnavailable:
        await self.close()
        return self.endpoint.unavailable({self._url: _reason(self._url, error)})


def _reason(url: str, error: BaseException) -> Reason:
    text = (str(error) or repr(error)).rstrip(".")
    match error:
        case ProbableAuthenticationError():
            return Reason.login(url)
        # RabbitMQ closes the connection instead of opening it. aiormq drops why, and knows the two frames only by name.
        case InvalidFrameError() if "Connection.OpenOk" in text and "Connection.Close " in text:
            return Reason.no_entry(url)
        case ChannelAccessRefused():
            return Reason(text, denied=True)
    return Reason(text)


def _code(error: ChannelClosed) -> int | None:
    """None if it was not RabbitMQ that closed the channel."""
    code = CODES.get(type(error), error.args[0] if error.args else None)
    return code if isinstance(code, int) else None


@contextlib.asynccontextmanager
async def _replies(seconds: float) -> AsyncIterator[None]:
    """Ends what waits for a reply, and makes an OSError of what aiormq raises in it when a connection ends."""
    task = asyncio.current_task()
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise TimeoutError(f"no reply within {seconds:g} s") from error
    except asyncio.CancelledError as error:
        if task is None or task.cancelling():
            raise
        raise ConnectionError("the connection was closed") from error
    except Exception as error:
        if type(error) in (Exception, RuntimeError):
            raise ConnectionError(str(error) or "the connection was closed") from error
        raise
