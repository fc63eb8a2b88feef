"""A Celery worker that scores; run as a program with a number, it enqueues so many jobs.

Acknowledges late, as a scorer must, holds as many jobs as ours does, and uses the same kind of queue.
"""

import os
import sys

import celery

import model

app = celery.Celery("bench", broker=os.environ["BENCH_AMQP"], backend=os.environ["BENCH_REDIS"])
app.conf.update(
    task_acks_late=True,
    task_default_queue=os.environ["BENCH_QUEUE"],
    task_default_queue_type="quorum",
    worker_detect_quorum_queues=True,
    broker_transport_options={"confirm_publish": True},
    worker_prefetch_multiplier=int(os.environ["BENCH_PREFETCH"]),
    worker_concurrency=1,
    worker_send_task_events=False,
    task_ignore_result=False,
    broker_connection_retry_on_startup=True,
)
scorer = None


@app.task(name="score")
def score(body):
    global scorer
    if scorer is None:
        scorer = model.Model()
    return scorer.score(body)


if __name__ == "__main__":
    body = model.job()
    for _ in range(int(sys.argv[1])):
        app.send_task("score", args=[body])
