"""The nodes of a cluster, in the order in which a client tries them."""

import random
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671}


class Nodes:
    """Each client has a random order of its own, so that many of them spread over the nodes that are left, and keeps it."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = deque(random.sample(urls, len(urls)))

    def round(self) -> Iterator[str]:
        """Each node once. A round that ends early, at a node that answered, is followed by one that begins after it."""
        for _ in range(len(self._urls)):
            url = self._urls[0]
            self._urls.rotate(-1)
            yield url


def address(url: str) -> str:
    """Host and port, without the password."""
    parts = urlsplit(url)
    return f"{parts.hostname or 'localhost'}:{parts.port or DEFAULT_PORTS[parts.scheme]}"


def user(url: str) -> str:
    return unquote(urlsplit(url).username or "guest")


def with_heartbeat(url: str, seconds: int) -> str:
    """The URL with an AMQP heartbeat, unless it has one of its own."""
    parts = urlsplit(url)
    if "heartbeat" in parse_qs(parts.query):
        return url
    query = "&".join(filter(None, (parts.query, f"heartbeat={seconds}")))
    return urlunsplit(parts._replace(query=query))


def checked(urls: str | Sequence[str]) -> tuple[str, ...]:
    """The URLs of the nodes of one cluster, each once. Raises ValueError, without a password in it."""
    urls = listed(urls, "RabbitMQ")
    if not urls:
        raise ValueError("There must be at least one RabbitMQ URL.")
    for url in urls:
        scheme = urlsplit(url).scheme
        if scheme not in DEFAULT_PORTS:
            raise ValueError(f"The RabbitMQ URL must begin with amqp:// or amqps://, not '{scheme}:'.")
        _check_virtual_host(urlsplit(url).path)
    if len({urlsplit(url).scheme for url in urls}) > 1:
        raise ValueError("The RabbitMQ URLs must all begin with amqp://, or all with amqps://.")
    if len({virtual_host(url) for url in urls}) > 1:
        raise ValueError("The RabbitMQ URLs must have the same virtual host.")
    addresses = [address(url) for url in urls]
    for twice in addresses:
        if addresses.count(twice) > 1:
            raise ValueError(f"The RabbitMQ URLs name {twice} twice.")
    return urls


def listed(given: str | Sequence[str], service: str) -> tuple[str, ...]:
    """The URLs; a text is one URL, or a list of them as the workers read it from the environment: a TOML array."""
    if not isinstance(given, str):
        return tuple(given)
    if not given.lstrip().startswith("["):
        return (given,)
    try:
        urls = tomllib.loads(f"urls = {given}")["urls"]
    except tomllib.TOMLDecodeError:
        urls = None
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise ValueError(f"The {service} URLs begin with [ but are no TOML array of texts.")
    return tuple(urls)


def _check_virtual_host(path: str) -> None:
    if path == "/":
        why = "ends in /, which is the virtual host with an empty name: write /%2f for the virtual host /."
        raise ValueError(f"The RabbitMQ URL {why}")
    if path != "//" and "/" in path[1:]:
        raise ValueError("The RabbitMQ URL has a / in the name of the virtual host: write %2f.")


def virtual_host(url: str) -> str:
    """`//` is the virtual host /, too: Celery writes it so, and the workers accept it."""
    path = urlsplit(url).path
    return "/" if path in ("", "//") else unquote(path[1:])
