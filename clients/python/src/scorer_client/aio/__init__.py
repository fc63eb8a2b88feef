"""The client for asyncio: the same as the blocking one, over aio-pika and redis.asyncio. Needs `scorer-client[aio]`."""

try:
    import aio_pika  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("scorer_client.aio needs the package aio-pika: install scorer-client[aio].") from error

from scorer_client.aio.broker import Broker
from scorer_client.aio.client import Client
from scorer_client.aio.fleet import Fleet

__all__ = ["Broker", "Client", "Fleet"]
