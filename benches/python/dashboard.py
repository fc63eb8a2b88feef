"""What a dashboard of a large fleet costs: 1,000 records a second in a real Redis, 200 results a second in a real RabbitMQ.

    WORKER_BINARY=target/release/scorer python3 benches/python/dashboard.py [WORKERS [SECONDS]]

Prints, for the real services and for `--demo`: the processor's time of the dashboard's process while a page is open, its
memory, the bytes of an update, and when the first picture was painted in Chromium. Needs what ops/setup gets.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

import pika
import redis
from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from live_stack import MODEL, Services, eventually  # noqa: E402

WORKERS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
SECONDS = int(sys.argv[2]) if len(sys.argv) > 2 else 60
RESULTS_PER_S = 200
BINARY = os.environ["WORKER_BINARY"]
EXAMPLES = ROOT / "schemas/examples/valid"


def example(name: str) -> dict[str, object]:
    return json.loads((EXAMPLES / f"{name}.json").read_text())


class Fleet(threading.Thread):
    """Beats for all workers once a second and publishes results, until it is stopped."""

    def __init__(self, services: Services) -> None:
        super().__init__(daemon=True)
        self.ends = threading.Event()
        self._redis = redis.Redis.from_url(services.redis)
        self._broker = pika.BlockingConnection(pika.URLParameters(services.amqp))
        self._channel = self._broker.channel()
        self._channel.exchange_declare("scorer.results", "topic", durable=True)
        self._channel.exchange_declare("scorer.dead", "direct", durable=True)
        self._record = example("heartbeat.v1-ready")
        self._result = example("score_result.v1-scored") | {"model": MODEL}
        self._ids = [f"gpu-{n // 8:03}-cuda{n % 8}" for n in range(WORKERS)]
        self._seq = 0

    def run(self) -> None:
        while not self.ends.is_set():
            began = time.monotonic()
            self._beat()
            self._publish()
            self._broker.sleep(max(0.0, 1.0 - (time.monotonic() - began)))

    def _beat(self) -> None:
        self._seq += 1
        now = time.time_ns() // 1_000_000
        pipe = self._redis.pipeline(transaction=False)
        for n, id in enumerate(self._ids):
            jobs = self._record["jobs"] | {"scored": self._seq * RESULTS_PER_S // WORKERS + n % 2 * self._seq}
            mine = {"worker_id": id, "incarnation": f"{n:08}-0", "seq": self._seq, "at_ms": now, "jobs": jobs}
            model = self._record["model"] | {"name": MODEL}
            pipe.set(f"scorer:{{{MODEL}}}:worker:{id}", json.dumps(self._record | mine | {"model": model}), px=5000)
            pipe.zadd(f"scorer:{{{MODEL}}}:workers", {id: now})
        pipe.execute()

    def _publish(self) -> None:
        for n in range(RESULTS_PER_S):
            mine = {"submission_id": f"s-{self._seq}-{n}", "worker_id": self._ids[n % WORKERS], "context": {"miner_id": n % 40}}
            properties = pika.BasicProperties(content_type="application/json", message_id=f"s-{self._seq}-{n}:7:scored:k{n}")
            body = json.dumps(self._result | mine)
            self._channel.basic_publish("scorer.results", f"{MODEL}.scored", body, properties)


def processor_s(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def updates(url: str, seconds: float) -> list[int]:
    """The bytes of each update that comes within this time, at least of one."""
    sizes, deadline = [], time.monotonic() + seconds
    with urllib.request.urlopen(f"{url}events", timeout=30) as events:
        kind = b""
        while not sizes or time.monotonic() < deadline:
            line = events.readline()
            if line.startswith(b"event: "):
                kind = line[7:].strip()
            elif line.startswith(b"data: ") and kind == b"now":
                sizes.append(len(line))
    return sizes


def painted_ms(url: str) -> float:
    """From the request until the workers are on the page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)  # Once for the browser's own start.
        page.locator("#status", has_text="workers").wait_for()
        began = time.monotonic()
        page.goto(url)
        page.locator("#status", has_text="workers").wait_for()
        took = (time.monotonic() - began) * 1e3
        browser.close()
        return took


def measure(name: str, arguments: list[str], environment: dict[str, str]) -> None:
    command = [BINARY, "dashboard", "--listen", "127.0.0.1:0", "--contributors", "miner_id", *arguments]
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    try:
        updates(url, 0.0)
        first_s = time.monotonic() - began
        sizes = updates(url, 12.0)  # It has settled by then.
        before, since = processor_s(process.pid), time.monotonic()
        sizes += updates(url, SECONDS)
        share = (processor_s(process.pid) - before) / (time.monotonic() - since)
        print(f"{name}: {share:.1%} of a core, {memory_mb(process.pid):.0f} MB at most, an update {statistics.median(sizes):,.0f} B"
              f" (largest {max(sizes):,}), first update {first_s:.2f} s after the start, first picture {painted_ms(url):.0f} ms")  # fmt: skip
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    services = Services()
    try:
        fleet = Fleet(services)
        fleet.start()
        eventually("the fleet beats", lambda: redis.Redis.from_url(services.redis).zcard(f"scorer:{{{MODEL}}}:workers") == WORKERS)
        environment = {"SCORER_AMQP__URL": services.amqp, "SCORER_REDIS__URL": services.redis, "SCORER_MODEL__NAME": MODEL}
        measure(f"{WORKERS} workers in Redis", [], environment)
        fleet.ends.set()
        fleet.join()
    finally:
        services.stop()
    measure("--demo 1000", ["--demo", "1000"], {})


if __name__ == "__main__":
    main()
