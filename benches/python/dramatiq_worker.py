"""A dramatiq worker that scores; run as a program with a number, it enqueues so many jobs.

Its queues are classic ones: it declares them with arguments that quorum queues do not take.
"""

import os
import sys

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

import model

broker = RabbitmqBroker(url=os.environ["BENCH_AMQP"])
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BENCH_REDIS"])))
dramatiq.set_broker(broker)
scorer = None


@dramatiq.actor(actor_name="score", queue_name=os.environ["BENCH_QUEUE"], store_results=True)
def score(body):
    global scorer
    if scorer is None:
        scorer = model.Model()
    return scorer.score(body)


if __name__ == "__main__":
    body = model.job()
    for _ in range(int(sys.argv[1])):
        score.send(body)
