"""Shows the workers, scores candidates, and makes packages of models.

    python3 -m scorer_client --model tinylm status
    python3 -m scorer_client --model tinylm score *.json --format binary_v2 --semantics gradient --learning-rate 0.1
    python3 -m scorer_client export MODEL --out package --shards held-out.txt

Exit codes: 0 success, 1 no worker is ready, a candidate was not scored, a merge or an export failed, 64 wrong usage, 69
RabbitMQ, Redis, torch or scorer is unavailable.
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
from scorer_client.broker import Broker
from scorer_client.client import Client
from scorer_client.console import print_error, printable
from scorer_client.errors import BrokerUnavailable, NoResult, PublishRefused, TopologyMissing, Unroutable
from scorer_client.export.arguments import add_export
from scorer_client.export.command import export
from scorer_client.fleet import Fleet
from scorer_client.jobs import Candidate, Job
from scorer_client.outcomes import NotSent, Outcome
from scorer_client.report import Report
from scorer_client.rounds import Round, Unsettled
from scorer_client.settings import Settings
from scorer_client.stops import ASSUMPTION, Stop
from scorer_client.stores import MASTER
from scorer_client.workers import FleetUnknown, Worker, ready

SUCCESS, NEGATIVE, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 64, 69, 130
MAX_INLINE_BYTES = 4 * 1024 * 1024  # the default of candidates.max_inline_bytes
ZSTD_MAGIC = bytes.fromhex("28b52ffd")
STOP_HELP = (
    "end an evaluation once it is decided that delta is below 0, or below MARGIN; of the evaluations where it is not, a "
    f"share of at most ALPHA ends so (0.01 is a good choice). {ASSUMPTION} K = max(8, 2.5 * N^(1/4)) for a plan of N "
    "windows. The line of a result that ended early begins with `stopped`."
)
MERGE_HELP = (
    "then merge the candidates whose whole 95%% interval is above 0, with equal weights, and print what they are worth "
    "together and what each contributes"
)


class UsageError(Exception):
    """Says what is wrong with the command line."""


class Parser(argparse.ArgumentParser):
    """Exits with 64, as scorer does; argparse itself would exit with 2."""

    def error(self, message: str) -> Never:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # One sentence of ours reports the error.
    try:
        if arguments.command == "export":
            return export(arguments)
        if arguments.model is None:
            raise UsageError("--model is required, before the command.")
        return status(arguments) if arguments.command == "status" else score(arguments)
    except UsageError as problem:
        return fail(problem, USAGE)
    except (BrokerUnavailable, FleetUnknown, TopologyMissing, Unroutable) as error:
        return fail(error, UNAVAILABLE)
    except (NoResult, PublishRefused, Unsettled) as error:
        return fail(error, NEGATIVE)
    except KeyboardInterrupt:
        return fail("Interrupted. Jobs that were already submitted will still be scored.", INTERRUPTED)


def parser() -> Parser:
    top = Parser(prog="scorer-client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--model", help="the name of the model; all commands but export need it")
    amqp = os.environ.get("SCORER_AMQP__URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
    top.add_argument("--amqp", metavar="URL", default=amqp, help="may be a TOML array of URLs, the nodes of a cluster")
    redis = os.environ.get("SCORER_REDIS__URL", "redis://127.0.0.1:6379/0")
    top.add_argument("--redis", metavar="URL", default=redis, help="may be a TOML array of URLs, but in the mode single")
    mode = os.environ.get("SCORER_REDIS__MODE", "single")
    top.add_argument("--redis-mode", default=mode, help="what the URLs lead to: single, sentinel or cluster")
    master = os.environ.get("SCORER_REDIS__MASTER", MASTER)
    top.add_argument("--redis-master", metavar="NAME", default=master, help="the sentinels' name of the master")
    top.add_argument("--namespace", default="scorer")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="print a line for every live worker")
    add_score(commands.add_parser("score", help="submit candidates and print a line for every result"))
    add_export(commands.add_parser("export", help="make a package of a PyTorch model, and prove it"))
    return top


def add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("files", nargs="+", type=Path, metavar="FILE")
    score.add_argument("--format", required=True, choices=("binary_v2", "safetensors", "pt_chunks"))
    score.add_argument("--semantics", required=True, choices=("gradient", "param_diff"))
    score.add_argument("--learning-rate", type=float, help="required for gradients, not allowed for param_diff")
    score.add_argument("--model-version", type=int, help="default: the newest version that a ready worker serves")
    score.add_argument("--nonce", default="", help="selects the evaluation windows")
    score.add_argument("--stop", type=stop, metavar="ALPHA[,MARGIN[,proven]]", help=STOP_HELP)
    score.add_argument("--merge", action="store_true", help=MERGE_HELP)
    score.add_argument("--leave-out-negative", action="store_true", help="merge again without those that contribute less than 0")
    score.add_argument("--compression", choices=("zstd",), help="compress files that are not compressed yet")
    score.add_argument("--timeout", type=float, default=900.0, help="seconds for each candidate, including waiting")
    score.add_argument("--without-heartbeats", action="store_true", help="submit even while Redis is unavailable")


def stop(text: str) -> Stop:
    """The value of --stop."""
    alpha, *rest = text.split(",")
    margin, *last = rest or ["0"]
    try:
        if last not in ([], ["proven"]):
            raise ValueError("the third part can only be the word proven.")
        return Stop(float(alpha), float(margin), proven=bool(last))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not ALPHA[,MARGIN[,proven]]: {error}") from error


def status(arguments: argparse.Namespace) -> int:
    try:
        workers = open_fleet(arguments).workers()
    except FleetUnknown:
        print("unknown")
        raise
    for worker in workers:
        print(worker_line(worker))
    if ready(workers):
        return SUCCESS
    return fail(f"No worker for {arguments.model} is ready; jobs wait until one is.", NEGATIVE)


def worker_line(worker: Worker) -> str:
    serves = "no model" if worker.model_version is None else f"v{worker.model_version}"
    takes = "accepting" if worker.accepting else "ready, full" if worker.ready else "not ready"
    line = f"{worker.id}  {worker.state}/{worker.detail}  {takes}  {serves}  holds {worker.held}  {worker.age_ms} ms ago"
    return printable(line)


def score(arguments: argparse.Namespace) -> int:
    check_learning_rate(arguments)
    if arguments.leave_out_negative and not arguments.merge:
        raise UsageError("--leave-out-negative is about the merge: it needs --merge.")
    fleet, broker = open_fleet(arguments), open_broker(arguments)
    version = newest_version(fleet, arguments.model) if arguments.model_version is None else arguments.model_version
    files = {unique_name(path): path for path in arguments.files}
    jobs = [Job(name, version, candidate(path, arguments), arguments.nonce, stop=arguments.stop) for name, path in files.items()]
    report = Report(files)
    blind = len(jobs) if arguments.without_heartbeats else 0
    settings = Settings(timeout_s=arguments.timeout, outstanding_without_heartbeats=blind)

    def add(outcome: Outcome) -> None:
        match outcome:
            case NotSent(error=Unroutable() | TopologyMissing() as error):
                raise error
        report.add(outcome)

    with Client(broker, fleet, settings) as client:
        client.collect(add, jobs)
        report.print_copies()
        if arguments.merge:
            merge(client, report, arguments)
        broker.delete_own_queue()
    return SUCCESS if len(report.scores) == len(files) else NEGATIVE


def merge(client: Client, report: Report, arguments: argparse.Namespace) -> None:
    round = Round(f"merge:{uuid.uuid4().hex}", report.answers, leave_out_negative=arguments.leave_out_negative)
    while (asked := round.next_merge()) is not None:
        future = client.submit(asked)
        client.collect()
        round.add(future.result())
    report.print_round(round)


def open_fleet(arguments: argparse.Namespace) -> Fleet:
    try:
        mode, master = arguments.redis_mode, arguments.redis_master
        return Fleet(arguments.redis, arguments.model, arguments.namespace, mode=mode, master=master)
    except ValueError as error:
        raise UsageError(f"--redis is not a valid Redis URL: {error}") from error


def open_broker(arguments: argparse.Namespace) -> Broker:
    """With its own queue, so that it takes no result from the client in production."""
    own_queue = f"{arguments.namespace}.results.{arguments.model}.{uuid.uuid4().hex}"
    try:
        return Broker(arguments.amqp, arguments.model, arguments.namespace, own_queue)
    except ValueError as error:
        raise UsageError(f"--amqp is not a valid RabbitMQ URL: {error}") from error


def newest_version(fleet: Fleet, model: str) -> int:
    versions = [worker.model_version for worker in ready(fleet.workers()) if worker.model_version is not None]
    if not versions:
        raise UsageError(f"No worker for {model} is ready, so the model version is not known: set --model-version.")
    return max(versions)


def check_learning_rate(arguments: argparse.Namespace) -> None:
    if (arguments.semantics == "gradient") != (arguments.learning_rate is not None):
        raise UsageError("--learning-rate is required for --semantics gradient, and not allowed for param_diff.")


def unique_name(path: Path) -> str:
    """A submission_id that was never used: workers answer a repeated one with the stored result."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', path.name)[:90]}:{uuid.uuid4().hex}"


def candidate(path: Path, arguments: argparse.Namespace) -> Candidate:
    """Inline if it fits, else as a file:// URL, which the workers must be allowed to read."""
    stored = read(path)
    data = stored
    if arguments.compression and not stored.startswith(ZSTD_MAGIC):
        data = compressed(stored)
    describe = partial(
        Candidate, arguments.format, arguments.semantics, arguments.learning_rate, compression=arguments.compression
    )
    if len(data) <= MAX_INLINE_BYTES:
        return describe(data=data)
    if data is not stored:
        raise UsageError(f"{path} is too large to send inline, even compressed: compress the file, so that it goes by URL.")
    return describe(url=path.resolve().as_uri(), sha256=hashlib.sha256(stored).hexdigest(), size=len(stored))


def compressed(data: bytes) -> bytes:
    try:
        return candidates.zstd(data)
    except ModuleNotFoundError as error:
        raise UsageError("--compression needs the package zstandard: install scorer-client[zstd].") from error


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def fail(problem: object, code: int) -> int:
    print_error(problem)
    return code
