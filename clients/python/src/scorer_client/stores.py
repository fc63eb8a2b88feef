"""How Redis is reached: one server, the master that sentinels name, or a cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from redis.connection import parse_url

from scorer_client.nodes import listed

Mode = Literal["single", "sentinel", "cluster"]

MODES: tuple[Mode, ...] = ("single", "sentinel", "cluster")
MASTER = "mymaster"  # the default of redis.master
TIMEOUT_S = 2.0
PORTS = {"single": 6379, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True)
class Addresses:
    """The URLs of the modes sentinel and cluster differ in host and port only: the other servers are learnt from these.

    User, password and database are those of Redis. Sentinels with a password of their own have it in the query, as
    `sentinel_password`, and their user as `sentinel_user`.
    """

    urls: tuple[str, ...]
    mode: Mode
    master: str

    @classmethod
    def checked(cls, urls: str | Sequence[str], mode: Mode, master: str) -> "Addresses":
        """Raises ValueError, without a password in it."""
        if mode not in MODES:
            raise ValueError(f"The mode of Redis must be one of {', '.join(MODES)}, not '{mode}'.")
        urls = listed(urls, "Redis")
        if not urls:
            raise ValueError("There must be at least one Redis URL.")
        if mode == "single" and len(urls) > 1:
            raise ValueError("A list of Redis URLs needs the mode sentinel or cluster; one server has one URL.")
        for url in urls:
            _check_database(url, mode)
        if len({_besides(url) for url in urls}) > 1:
            raise ValueError("The Redis URLs must differ in host and port only.")
        return cls(urls, mode, master)

    @property
    def places(self) -> str:
        """Hosts and ports, without passwords."""
        return ", ".join(f"{host}:{port}" for host, port in self.nodes())

    @property
    def user(self) -> str:
        return str(self._parsed().get("username") or "default")

    def nodes(self) -> list[tuple[str, int]]:
        parts = [urlsplit(url) for url in self.urls]
        return [(part.hostname or "localhost", part.port or PORTS[self.mode]) for part in parts]

    def options(self) -> dict[str, Any]:
        """What redis-py is told of Redis, but where it is."""
        options = self._parsed()
        options.pop("sentinel_user", None)
        options.pop("sentinel_password", None)
        return options

    def sentinel_options(self) -> dict[str, Any]:
        """What redis-py is told of the sentinels, but where they are."""
        parsed = self._parsed()
        login = {"username": parsed.get("sentinel_user"), "password": parsed.get("sentinel_password")}
        kept = {name: value for name, value in parsed.items() if name.startswith("ssl") or name.startswith("socket_")}
        return kept | {name: value for name, value in login.items() if value is not None}

    def _parsed(self) -> dict[str, Any]:
        parsed: dict[str, Any] = dict(parse_url(self.urls[0]))  # type: ignore[no-untyped-call]
        for name in ("host", "port", "path", "connection_class"):
            parsed.pop(name, None)
        if urlsplit(self.urls[0]).scheme == "rediss":
            parsed["ssl"] = True
        return {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S} | parsed


def _besides(url: str) -> tuple[str, str | None, str | None, str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.username, parts.password, parts.path.strip("/") or "0", parts.query


def _check_database(url: str, mode: Mode) -> None:
    """redis-py silently uses database 0 if the path is not a number, and a cluster has no other."""
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss"):
        if mode != "single":
            raise ValueError(f"The Redis URL must begin with redis:// or rediss:// in the mode {mode}.")
        return
    path = parts.path.strip("/")
    if path and not path.isdecimal():
        raise ValueError(f"The path of the Redis URL, '{path}', is not a database number.")
    asked = parse_qs(parts.query).get("db", ["0"])[0]
    if mode == "cluster" and (int(path or 0) or asked != "0"):
        raise ValueError("The Redis URL names a database, but a cluster has only database 0.")


def opened(addresses: Addresses, package: Any, retry: Callable[[int], Any]) -> Any:
    """A client of redis-py. `package` is redis or redis.asyncio; `retry` makes its policy of so many further attempts."""
    match addresses.mode:
        case "single":
            options = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S, "retry": retry(0)}
            return package.Redis.from_url(addresses.urls[0], **options)
        case "sentinel":
            sentinels = package.sentinel.Sentinel(
                addresses.nodes(), sentinel_kwargs=addresses.sentinel_options() | {"retry": retry(0)}
            )
            return sentinels.master_for(addresses.master, **addresses.options(), retry=retry(0))
        case "cluster":
            nodes = [package.cluster.ClusterNode(host, port) for host, port in addresses.nodes()]
            options = addresses.options()
            options.pop("db", None)
            # Once more, since a slot may have moved. What is left of a cluster answers for its own slots.
            return package.cluster.RedisCluster(
                startup_nodes=nodes, require_full_coverage=False, retry=retry(1), **options
            )
