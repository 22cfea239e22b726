"""The plain Celery worker of the benchmarks, with a visibility timeout short enough to wait for.

As a program it submits to it: `python -m tests.faults.plain_worker JOURNAL`, until SIGTERM, so that a backlog
stands in the queue. It writes `A <task id> <number>` for each submit that has returned.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time

from benchmarks.plain_celery import app, infer

from tests.faults.client import Journal
from tests.faults.plain import QUEUE, VISIBILITY_TIMEOUT_S, values

BACKLOG = 100

app.conf.broker_transport_options = {"visibility_timeout": VISIBILITY_TIMEOUT_S}


def produce(journal: Journal) -> None:
    """Keep a backlog in the queue."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    numbers = itertools.count()
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        while not stopping:
            for _ in range(BACKLOG - client.llen(QUEUE)):
                number = next(numbers)
                journal.write("A", infer.delay(values(number)).id, number)
            time.sleep(0.05)


if __name__ == "__main__":
    produce(Journal(sys.argv[1]))
