"""The client for asyncio: the same as the blocking one, over aio-pika and redis.asyncio. Needs `scorer-client[aio]`."""

from scorer_client.aio.broker import Broker
from scorer_client.aio.client import Client
from scorer_client.aio.fleet import Fleet

__all__ = ["Broker", "Client", "Fleet"]
