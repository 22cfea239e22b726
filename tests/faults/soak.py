"""Half an hour under mixed faults: is memory flat?

One worker is spared, so that its memory can be followed; it lives through every fault of the others, of Triton, of
Valkey and of the clients. Growth is the median of the last fifth against that of the third: two are warm-up. The
broker keeps results for minutes and deletes what has expired little by little, so coming into balance takes twice that.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil

from tests.faults.matrix import FAULTS
from tests.faults.rounds import CLIENTS, Round, account, one_trial
from tests.faults.stand import Stand

SAMPLE_S = 2.0
PAUSE_S = 5.0
ACCOUNT_EVERY_S = 120.0
OFTEN = 3
MIXED = [fault for fault in FAULTS if fault not in ("valkey-kill-everysec", "client-kill")] * OFTEN + ["client-kill"]
"""The stream of a client that was killed stays for an hour, so this is done less often."""
SETTINGS = {"SAMPHIRE_RESULT_TTL_S": "300"}
"""Results would pile up for an hour, which is longer than the soak."""
REST_S = 1.0
"""Of each place of a client between two tasks: with a steady load the broker's data are steady."""
Samples = dict[str, list[float]]
Kinds = dict[str, int]
"""Bytes of the broker's data by kind of key, when nothing is under way."""


async def soak(
    stand: Stand,
    seconds: float,
    seed: int,
    may_go_on: Callable[[], bool],
    done: Callable[[list[Round], Samples, list[Kinds]], None],
) -> tuple[list[Round], Samples, list[Kinds]]:
    """Let faults happen in random order, and follow the memory; `done` is called after each accounting."""
    samples: Samples = {"worker": [], "valkey": [], "valkey, data": []}
    stand.spared = {stand.workers[0]}
    await stand.set_fsync("always")
    sampler = asyncio.create_task(_sample(stand, samples))
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    rounds: list[Round] = []
    kinds: list[Kinds] = []
    try:
        while time.monotonic() < until and may_go_on():
            began = time.monotonic()
            total = Round("soak")
            await stand.load(CLIENTS)
            while time.monotonic() < min(until, began + ACCOUNT_EVERY_S) and may_go_on():
                await one_trial(stand, chance.choice(MIXED), total)
                await asyncio.sleep(PAUSE_S)
            await account(stand, total)
            kinds.append(await stand.memory_by_kind())
            total.seconds = time.monotonic() - began
            rounds.append(total)
            done(rounds, samples, kinds)
    finally:
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)
    return rounds, samples, kinds


async def _sample(stand: Stand, samples: Samples) -> None:
    worker = psutil.Process(stand.workers[0].pid)
    while True:
        data = (await stand.ask("INFO", "memory"))["used_memory"]
        try:
            valkey = psutil.Process(stand.broker.pid).memory_info().rss
        except psutil.NoSuchProcess:  # between two lives
            continue
        samples["worker"].append(worker.memory_info().rss / 2**20)
        samples["valkey"].append(valkey / 2**20)
        samples["valkey, data"].append(data / 2**20)
        await asyncio.sleep(SAMPLE_S)


def growth(samples: Samples) -> dict[str, Any]:
    """Medians of the third and the last fifth, and of all."""
    found = {}
    for name, values in samples.items():
        fifth = len(values) // 5
        if not fifth:
            continue
        begin, end = statistics.median(values[2 * fifth : 3 * fifth]), statistics.median(values[-fifth:])
        found[name] = {
            "samples": len(values),
            "begin_mb": round(begin, 2),
            "end_mb": round(end, 2),
            "growth": round(end / begin - 1, 4),
            "fifths_mb": [round(statistics.median(values[n * fifth : (n + 1) * fifth]), 2) for n in range(5)],
        }
    return found
