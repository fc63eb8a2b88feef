"""The RabbitMQ, the Redis and the workers of the live tests, to be broken and mended."""

import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = ROOT / "tests/model/cases.json"
MODEL, VERSION = "tinylm", 7
DEAD_NODE = "amqp://guest:guest@127.0.0.1:1/%2f"  # Of a cluster, for a client: nothing listens there.
RABBITMQ_BIN = "/usr/lib/rabbitmq/bin"
SOON_S = 120.0  # Debug builds and RabbitMQ's start beside a compiler take long.


def eventually(what: str, holds: Callable[[], object], within_s: float = SOON_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"in vain for {within_s:.0f} s: {what}")
        time.sleep(0.05)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Services:
    """What ops/services starts, in a folder of its own. What was killed comes back on its port, RabbitMQ with its data."""

    def __init__(self) -> None:
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="scorer-live-"))
        self._directory = self._folder / "services"
        printed = self._ops("start")
        urls = dict(line.removeprefix("export ").split("=", 1) for line in printed.splitlines())
        self.amqp = shlex.split(urls["SCORER_AMQP__URL"])[0]
        self.redis = shlex.split(urls["SCORER_REDIS__URL"])[0]
        ports = map(int, (self._directory / "ports").read_text().split())
        self._amqp_port, _, _, self._redis_port, *_ = ports
        self._closing: list[subprocess.Popen[bytes]] = []

    @property
    def folder(self) -> pathlib.Path:
        return self._folder

    def stop(self) -> None:
        for process in self._closing:
            process.wait()
        self._ops("stop")
        shutil.rmtree(self._folder)

    def kill_rabbitmq(self) -> None:
        self._end("rabbitmq", signal.SIGKILL, self._amqp_port)

    def remembers(self, queues: list[str]) -> None:
        """Waits until they would survive a kill: RabbitMQ writes the table that leads from a queue's name to its log some three
        seconds after the queue was declared; killed before, it finds no leader for the queue ever again.
        """
        tables = list(self._directory.glob("rabbitmq/data/*/quorum/*/names.dets"))

        def written() -> bool:
            bytes = b"".join(table.read_bytes() for table in tables)
            return all(queue.encode() in bytes for queue in queues)

        eventually(f"{queues} are on the disk", written)

    def start_rabbitmq(self) -> None:
        """Returns at once; it serves some seconds later."""
        environment = shlex.quote(str(self._directory / "rabbitmq/environment"))
        self._launch("rabbitmq", ["bash", "-c", f"source {environment}; exec {RABBITMQ_BIN}/rabbitmq-server"])

    def freeze_rabbitmq(self) -> None:
        self._signal("rabbitmq", signal.SIGSTOP)

    def thaw_rabbitmq(self) -> None:
        self._signal("rabbitmq", signal.SIGCONT)

    def close_connections(self) -> None:
        """As an operator does it; returns at once."""
        environment = shlex.quote(str(self._directory / "rabbitmq/environment"))
        command = f"source {environment}; exec {RABBITMQ_BIN}/rabbitmqctl close_all_connections 'by the test'"
        quiet = subprocess.DEVNULL
        self._closing.append(subprocess.Popen(["bash", "-c", command], stdin=quiet, stdout=quiet, stderr=quiet))

    def stop_redis(self) -> None:
        self._end("redis", signal.SIGTERM, self._redis_port)

    def start_redis(self) -> None:
        here, port = str(self._directory / "redis"), str(self._redis_port)
        self._launch("redis", ["redis-server", "--bind", "127.0.0.1", "--port", port, "--dir", here, "--save", ""])
        eventually("Redis serves", lambda: answers(self._redis_port))

    def _ops(self, action: str) -> str:
        command = [ROOT / "ops/services", action, self._directory]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def _end(self, name: str, how: signal.Signals, port: int) -> None:
        self._signal(name, how)
        eventually(f"{name} is gone", lambda: not answers(port))

    def _signal(self, name: str, signal: signal.Signals) -> None:
        os.killpg(int((self._directory / f"{name}.group").read_text()), signal)

    def _launch(self, name: str, command: list[str]) -> None:
        """As ops/services does it: no child of ours, in a group and with a log that ops/services finds when it stops all."""
        log = self._directory / f"{name}.log"
        shell = ["bash", "-c", 'setsid "${@:2}" >>"$1" 2>&1 </dev/null & echo $!', "launch", log, *command]
        group = subprocess.run(shell, check=True, stdout=subprocess.PIPE, text=True).stdout
        (self._directory / f"{name}.group").write_text(group)


class Binary:
    """The `scorer` that WORKER_BINARY names, and the package that it made of tests/model."""

    def __init__(self, services: Services) -> None:
        try:
            self._path = os.environ["WORKER_BINARY"]
        except KeyError:
            raise SystemExit("WORKER_BINARY is not set: it names the built scorer, such as target/debug/scorer.") from None
        self._services = services
        self._package = services.folder / "package"
        graph, weights = ROOT / "tests/model/graph-named.onnx", ROOT / "tests/model/checkpoint.safetensors"
        inputs = ["--graph", graph, "--weights", weights, "--shards", ROOT / "tests/model/shards"]
        named = ["--name", MODEL, "--version", str(VERSION), "--out", self._package]
        subprocess.run([self._path, "package", *inputs, *named], check=True, stdout=subprocess.DEVNULL, env=self._environment())

    @property
    def package(self) -> pathlib.Path:
        return self._package

    def worker(self, namespace: str, id: str = "w1", **changed: str) -> "Worker":
        """A changed setting is written with two underscores for the dot."""
        settings = {
            "model.dir": self._package,
            "model.state_dir": self._services.folder / f"state-{namespace}",
            "amqp.namespace": namespace,
            "amqp.retry_delays": '["200ms"]',
            "redis.namespace": namespace,
            "engine.execution_provider": "cpu",
            "engine.threads": "1",
            "candidates.allow": f'["file://{ROOT}/tests/model/"]',
            "worker.id": id,
        } | {key.replace("__", "."): value for key, value in changed.items()}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return Worker([self._path, "run", *words], self._environment(), self._services.folder / f"{namespace}-{id}.log")

    def dashboard(self, namespace: str, *more: str) -> "Dashboard":
        settings = {"model.name": MODEL, "amqp.namespace": namespace, "redis.namespace": namespace}
        words = [*more, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
        return Dashboard([self._path, "dashboard", "--listen", "127.0.0.1:0", *words], self._environment())

    def demo(self, workers: int) -> "Dashboard":
        """A dashboard of a simulated fleet, with contributors."""
        chosen = ["--demo", str(workers), "--contributors", "miner_id"]
        return Dashboard([self._path, "dashboard", "--listen", "127.0.0.1:0", *chosen], self._environment())

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SCORER_")}
        return own | {"SCORER_AMQP__URL": self._services.amqp, "SCORER_REDIS__URL": self._services.redis}


class Worker:
    """A process that can be killed and started again under the same id."""

    def __init__(self, command: list[str], environment: dict[str, str], log: pathlib.Path) -> None:
        self._command = command
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else "(no log)"


class Dashboard:
    """A running `scorer dashboard`."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=environment, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
