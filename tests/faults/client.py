"""A client under test, a process of its own: `python -m tests.faults.client URL JOURNAL OUTSTANDING FIRST REST_S`.

It keeps so many tasks under way, each place resting so long between two, and writes down, a line each, what it knows:

    S <event stream>          it has begun
    A <task id> <number> <s>  a submit of this number has returned, at this time of the monotonic clock
    U <error>                 a submit has raised: the task may or may not be queued
    E <task id> <verdict>     a result was read: `right`, `wrong`, or the name of the error
    R -                       it was told to rest, and no submit is under way any more

SIGUSR1: submit no more, read the results that are left. SIGUSR2: go on.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time

import numpy as np

from samphire import AsyncClient, SamphireError

MODEL = "recorder"
REFUSED_S = 0.05


def answer(number: int) -> int:
    """What the model makes of a number."""
    return 3 * number + 1


class Journal:
    """One write a line: whatever kills this process, what was written before stands."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


async def produce(broker_url: str, journal: Journal, outstanding: int, first: int, rest_s: float) -> None:
    """Keep `outstanding` tasks under way, for ever."""
    numbers = itertools.count(first)
    working = asyncio.Event()
    working.set()
    submitting = set[int]()

    def tell_rest() -> None:
        if not working.is_set() and not submitting:
            journal.write("R", "-")

    def rest() -> None:
        working.clear()
        tell_rest()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, rest)
    loop.add_signal_handler(signal.SIGUSR2, working.set)
    async with AsyncClient(broker_url) as client:
        journal.write("S", client._session.stream)  # the harness reads it as well

        async def one_after_the_other() -> None:
            while True:
                await asyncio.sleep(rest_s)
                await working.wait()
                number = next(numbers)
                submitting.add(number)
                try:
                    task = await client.submit(MODEL, {"x": np.array([[number]], np.int64)})
                except SamphireError as error:
                    journal.write("U", type(error).__name__)
                    await asyncio.sleep(REFUSED_S)
                    continue
                else:
                    journal.write("A", task.id, number, time.monotonic())
                finally:
                    submitting.remove(number)
                    tell_rest()
                try:
                    y = (await task.result()).outputs["y"].tolist()
                except SamphireError as error:
                    journal.write("E", task.id, type(error).__name__)
                else:
                    journal.write("E", task.id, "right" if y == [[answer(number)]] else "wrong")

        await asyncio.gather(*(one_after_the_other() for _ in range(outstanding)))


if __name__ == "__main__":
    url, path, outstanding, first, rest_s = sys.argv[1:]
    asyncio.run(produce(url, Journal(path), int(outstanding), int(first), float(rest_s)))
