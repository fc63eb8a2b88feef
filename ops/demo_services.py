"""The demonstration's dealings with a RabbitMQ and a Redis that belong to somebody else.

    python3 ops/demo_services.py check                      do both answer?
    python3 ops/demo_services.py delete NAMESPACE MODEL     deletes what that namespace holds, and nothing else

The addresses come from SCORER_AMQP__URL and SCORER_REDIS__URL. Needs pika and redis (ops/python.txt).
"""

import logging
import os
import sys
import urllib.parse

import pika
import redis

PREFIX = "scorer-demo-"  # only a namespace of the demonstration's own is ever deleted
RETRY_DELAYS = ("5s", "30s", "5m")


def place(url):
    """The address without its password."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname


def why(error):
    return (str(error) or repr(error)).rstrip(".")


def connect_amqp():
    url = os.environ["SCORER_AMQP__URL"]
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = parameters.stack_timeout = 10
    try:
        return pika.BlockingConnection(parameters)
    except (pika.exceptions.AMQPError, OSError) as error:
        sys.exit(f"RabbitMQ at {place(url)} (SCORER_AMQP__URL) does not let us in: {why(error)}.")


def connect_redis():
    url = os.environ["SCORER_REDIS__URL"]
    try:
        client = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=10)
        client.ping()
        return client
    except (redis.RedisError, OSError) as error:
        sys.exit(f"Redis at {place(url)} (SCORER_REDIS__URL) does not let us in: {why(error)}.")


def queues(namespace, model):
    jobs = f"{namespace}.jobs.{model}"
    ladder = [f"{jobs}.retry.{delay}" for delay in RETRY_DELAYS]
    return [jobs, *ladder, f"{namespace}.dead.{model}", f"{namespace}.results.{model}", f"{namespace}.results.unrouted"]


def exchanges(namespace):
    return [f"{namespace}.{name}" for name in ("jobs", "dead", "results", "results.unrouted", "control")]


def delete(namespace, model):
    if not namespace.startswith(PREFIX):
        sys.exit(f"'{namespace}' is no namespace of the demonstration: only {PREFIX}... is ever deleted.")
    with connect_amqp() as connection:
        channel = connection.channel()
        for name in queues(namespace, model):
            channel.queue_delete(name)  # deleting what is not there succeeds
        for name in exchanges(namespace):
            channel.exchange_delete(name)
    client = connect_redis()
    for key in client.scan_iter(match=f"{namespace}:*", count=1000):
        client.unlink(key)


def main():
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # our one sentence says it all
    match sys.argv[1:]:
        case ["check"]:
            connect_amqp().close()
            connect_redis().close()
        case ["delete", namespace, model]:
            delete(namespace, model)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
