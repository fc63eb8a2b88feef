"""The fleet's state, and candidates scored from the command line.

    python3 -m scorer_client --model tinylm status
    python3 -m scorer_client --model tinylm score *.json --format binary_v2 --semantics gradient --learning-rate 0.1

Exit codes: 0 done, 1 no worker is ready or a candidate was not scored, 64 bad usage, 69 RabbitMQ or Redis is away.
"""

import argparse
import hashlib
import logging
import os
import re
import sys
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Never

from scorer_client import candidates
from scorer_client.broker import Broker, BrokerAway, PublishRefused, Unroutable
from scorer_client.client import Aggregator, TopologyMissing
from scorer_client.console import printable, say
from scorer_client.fleet import Fleet, FleetUnknown, Worker, ready
from scorer_client.jobs import Candidate, Job
from scorer_client.settings import Settings
from scorer_client.verdicts import Verdicts

DONE, NEGATIVE, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 64, 69, 130
MAX_INLINE_BYTES = 4 * 1024 * 1024  # the default of candidates.max_inline_bytes
ZSTD_MAGIC = bytes.fromhex("28b52ffd")


class Usage(Exception):
    """What is wrong with the command line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # Our one sentence says it all.
    try:
        return status(arguments) if arguments.command == "status" else score(arguments)
    except Usage as problem:
        return complain(problem, USAGE)
    except (BrokerAway, FleetUnknown, TopologyMissing, Unroutable) as away:
        return complain(away, UNAVAILABLE)
    except KeyboardInterrupt:
        return complain("Interrupted: jobs that were submitted are scored all the same.", INTERRUPTED)


def parser() -> Parser:
    top = Parser(prog="aggregator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--model", required=True)
    top.add_argument("--amqp", metavar="URL", default=os.environ.get("SCORER_AMQP__URL", "amqp://guest:guest@127.0.0.1:5672/%2f"))
    top.add_argument("--redis", metavar="URL", default=os.environ.get("SCORER_REDIS__URL", "redis://127.0.0.1:6379/0"))
    top.add_argument("--namespace", default="scorer")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="one line for every worker that is alive")
    add_score(commands.add_parser("score", help="submits candidates and prints a line for every verdict"))
    return top


def add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("files", nargs="+", type=Path, metavar="FILE")
    score.add_argument("--format", required=True, choices=("binary_v2", "safetensors", "pt_chunks"))
    score.add_argument("--semantics", required=True, choices=("gradient", "param_diff"))
    score.add_argument("--learning-rate", type=float, help="required for gradients")
    score.add_argument("--model-version", type=int, help="default: the newest that a ready worker serves")
    score.add_argument("--nonce", default="", help="chooses the windows")
    score.add_argument("--compression", choices=("zstd",), help="files that are not compressed yet are compressed here")
    score.add_argument("--timeout", type=float, default=900.0, help="seconds for each candidate, waiting included")
    score.add_argument("--without-heartbeats", action="store_true", help="submit although Redis is away; else wait for it")


def status(arguments: argparse.Namespace) -> int:
    try:
        workers = the_fleet(arguments).workers()
    except FleetUnknown:
        print("unknown")
        raise
    for worker in workers:
        print(worker_line(worker))
    if ready(workers):
        return DONE
    return complain(f"No worker for {arguments.model} is ready: jobs wait for one.", NEGATIVE)


def worker_line(worker: Worker) -> str:
    serves = "no model" if worker.model_version is None else f"v{worker.model_version}"
    takes = "accepting" if worker.accepting else "ready, full" if worker.ready else "not ready"
    line = f"{worker.id}  {worker.state}/{worker.detail}  {takes}  {serves}  holds {worker.held}  {worker.age_ms} ms ago"
    return printable(line)


def score(arguments: argparse.Namespace) -> int:
    check_rate(arguments)
    fleet, broker = the_fleet(arguments), the_broker(arguments)
    version = served(fleet, arguments.model) if arguments.model_version is None else arguments.model_version
    files = {name_for(path): path for path in arguments.files}
    jobs = [Job(name, version, candidate(path, arguments), arguments.nonce) for name, path in files.items()]
    verdicts = Verdicts(files)
    blind = len(jobs) if arguments.without_heartbeats else 0
    settings = Settings(timeout_s=arguments.timeout, outstanding_without_heartbeats=blind)
    with Aggregator(broker, fleet, settings) as aggregator:
        for job in jobs:
            aggregator.submit(job)
        while len(aggregator):
            try:
                aggregator.collect(verdicts.take)
            except Unroutable:
                raise
            except PublishRefused as refused:
                verdicts.refused(refused)
        broker.delete_own_queue()
    verdicts.print_copies()
    return DONE if len(verdicts.scores) == len(files) else NEGATIVE


def the_fleet(arguments: argparse.Namespace) -> Fleet:
    try:
        return Fleet(arguments.redis, arguments.model, arguments.namespace)
    except ValueError as error:
        raise Usage(f"--redis is no address of a Redis: {error}") from error


def the_broker(arguments: argparse.Namespace) -> Broker:
    """With a queue of its own, so that no result is taken from the aggregator that is in service."""
    own_queue = f"{arguments.namespace}.results.{arguments.model}.{uuid.uuid4().hex}"
    try:
        return Broker(arguments.amqp, arguments.model, arguments.namespace, own_queue)
    except ValueError as error:
        raise Usage(f"--amqp is no address of a RabbitMQ: {error}") from error


def served(fleet: Fleet, model: str) -> int:
    versions = [worker.model_version for worker in ready(fleet.workers()) if worker.model_version is not None]
    if not versions:
        raise Usage(f"No worker for {model} is ready, so the model's version is not known: give --model-version.")
    return max(versions)


def check_rate(arguments: argparse.Namespace) -> None:
    if (arguments.semantics == "gradient") != (arguments.learning_rate is not None):
        raise Usage("--learning-rate is needed for --semantics gradient, and has no meaning for param_diff.")


def name_for(path: Path) -> str:
    """Never used before: an answer is remembered under the job's name."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', path.name)[:90]}:{uuid.uuid4().hex}"


def candidate(path: Path, arguments: argparse.Namespace) -> Candidate:
    """Inside the job where it fits, else as a file:// URL, which the workers must be able and allowed to read."""
    stored = read(path)
    data = stored
    if arguments.compression and not stored.startswith(ZSTD_MAGIC):
        data = candidates.zstd(stored)
    describe = partial(
        Candidate, arguments.format, arguments.semantics, arguments.learning_rate, compression=arguments.compression
    )
    if len(data) <= MAX_INLINE_BYTES:
        return describe(data=data)
    if data is not stored:
        raise Usage(f"{path} is too large for a job even when compressed here: compress it on disk, so that it goes by URL.")
    return describe(url=path.resolve().as_uri(), sha256=hashlib.sha256(stored).hexdigest(), size=len(stored))


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"{path} cannot be read: {error.strerror}.") from error


def complain(problem: object, code: int) -> int:
    say(problem)
    return code


if __name__ == "__main__":
    sys.exit(main())
