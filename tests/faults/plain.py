"""The same kills against what one would write without Samphire: a plain Celery worker that forwards to Triton.

Workers killed in turn under a backlog. `acks_late` is on, and after the last kill one waits for what Celery itself
redelivers: a worker looks for messages older than the visibility timeout ten seconds after its start, then every
hundred. What has no result then, and lies in no queue and with no worker, is lost.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis.asyncio

from samphire_broker.embedded.process import Part, PartSpec
from tests.faults.ledger import LOOK_S, Tail
from tests.faults.parts import alone, killed, until_async
from tests.faults.stand import ANSWER_TIMEOUT_S, ROOT, Stand
from tests.support.names import KEYS

QUEUE = "plain"
"""As in `benchmarks.plain_celery`, which reads its addresses when it is imported."""
COLUMNS = 16
VISIBILITY_TIMEOUT_S = 10
"""Celery's is one hour by default: nobody would wait for it."""
WORKERS = 3
POOL = ("-P", "threads", "-c", "8")
UNACKED = "unacked"
REDELIVERED_WITHIN_S = 400.0
"""A worker that dies while it looks for what is to be redelivered keeps the others from looking for 300 s."""
BETWEEN_KILLS_S = 1.0


def values(number: int) -> list[list[float]]:
    """What is submitted, and expected back."""
    return [[float(number)] * COLUMNS]


@dataclass
class PlainResult:
    """What came of the kills of plain workers."""

    trials: int = 0
    tasks: int = 0
    lost: int = 0
    stuck: int = 0
    """Without a result, but still in a queue or with a worker."""
    wrong: int = 0
    delivered_again: int = 0
    took_nothing: int = 0
    """Workers that ran and took nothing, for as long as we wait, beside a backlog."""
    recovery_s: list[float] = field(default_factory=list)
    visibility_timeout_s: int = VISIBILITY_TIMEOUT_S
    seconds: float = 0.0


class PlainStand:
    """Celery workers beside the servers of a stand that has no workers of its own, in another database."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.url = stand.broker_url.removesuffix("/0") + "/1"
        self.workers = [Part(self._worker_spec(number + 1)) for number in range(WORKERS)]
        self.journal = stand.folder / "plain.journal"
        command = [sys.executable, "-m", "tests.faults.plain_worker", str(self.journal)]
        self.client = Part(self._spec("plain-client", command, self._submits))
        self.redis = redis.asyncio.Redis.from_url(self.url)
        self._turn = 0
        self._began: dict[Part, int] = {}

    def _spec(self, name: str, command: list[str], wait_ready: Callable[[int], Any]) -> PartSpec:
        variables = {"BENCH_BROKER_URL": self.url, "BENCH_TRITON_URL": self.stand.triton_grpc, "PYTHONPATH": str(ROOT)}
        variables["PYTHONWARNINGS"] = "ignore::celery.platforms.SecurityWarning"
        return alone(PartSpec(name, command, self.stand.folder / "logs" / f"{name}.log", "", wait_ready, variables))

    def _worker_spec(self, number: int) -> PartSpec:
        name = f"plain{number}"
        log = Tail(self.stand.folder / "logs" / f"{name}.log")

        async def wait_ready(_pid: int) -> None:
            while not any(line.endswith(" ready.") for line in log.lines()):
                await asyncio.sleep(LOOK_S)

        command = [sys.executable, "-m", "celery", "-A", "tests.faults.plain_worker", "worker", *POOL]
        command += ["--loglevel", "INFO", "--hostname", f"{name}@%h"]
        return self._spec(name, command, wait_ready)

    async def _submits(self, _pid: int) -> None:
        while not self.journal.exists() or not self.journal.stat().st_size:
            await asyncio.sleep(LOOK_S)

    async def stop(self) -> None:
        await self.redis.aclose()
        await asyncio.gather(*(part.stop() for part in (self.client, *self.workers) if part.process))

    async def unacknowledged(self) -> set[str]:
        """Ids of what workers have, as far as the broker knows."""
        found: Any = await self.redis.hvals(UNACKED)
        return {json.loads(entry)[0]["headers"]["id"] for entry in found}

    async def unended(self, task_ids: set[str]) -> set[str]:
        """Those without a result."""
        ordered = sorted(task_ids)
        if not ordered:
            return set()
        metas = await self.redis.mget([(KEYS.meta_prefix + task_id) for task_id in ordered])
        return {task_id for task_id, meta in zip(ordered, metas, strict=True) if meta is None}

    async def held(self, worker: Part) -> set[str]:
        """Ids of what the worker says that it has received since its start, and that has no result."""
        return await self.unended(set(_received(worker.spec.log_file, self._began[worker])))

    async def start_worker(self, worker: Part) -> None:
        """Start it, and mind where its log begins."""
        log = worker.spec.log_file
        self._began[worker] = log.stat().st_size if log.exists() else 0
        await worker.start()

    def next_worker(self) -> Part:
        """Whose turn it is."""
        self._turn = (self._turn + 1) % len(self.workers)
        return self.workers[self._turn]


async def run_plain(stand: Stand, trials: int, may_go_on: Callable[[], bool]) -> PlainResult:
    """Kill plain workers in turn, `trials` times, and account for every task."""
    began = time.monotonic()
    result = PlainResult()
    plain = PlainStand(stand)
    recoveries: list[asyncio.Task[None]] = []

    async def recovery(held: set[str], since: float) -> None:
        while held := await plain.unended(held):
            await asyncio.sleep(0.2)
        result.recovery_s.append(round(time.monotonic() - since, 3))

    try:
        await plain.client.start()
        await asyncio.gather(*(plain.start_worker(worker) for worker in plain.workers))
        while result.trials < trials and may_go_on():
            worker = plain.next_worker()
            try:
                await until_async(lambda: plain.held(worker), ANSWER_TIMEOUT_S, "tasks with it")  # noqa: B023
            except TimeoutError:
                result.took_nothing += 1
            since = time.monotonic()
            await killed(worker)
            if held := await plain.held(worker):
                result.trials += 1
                recoveries.append(asyncio.create_task(recovery(held, since)))
            await plain.start_worker(worker)
            await asyncio.sleep(BETWEEN_KILLS_S)
        assert plain.client.process is not None
        plain.client.process.send_signal(signal.SIGTERM)
        await plain.client.process.wait()
        with suppress(TimeoutError):
            await until_async(lambda: _all_delivered(plain), REDELIVERED_WITHIN_S, "the end of redelivery")
        await asyncio.sleep(2.0)  # what was taken from the queue last is still being answered
        await _account(plain, result)
    finally:
        for task in recoveries:
            task.cancel()
        await asyncio.gather(*recoveries, return_exceptions=True)
        await plain.stop()
    result.seconds = round(time.monotonic() - began, 1)
    return result


async def _all_delivered(plain: PlainStand) -> bool:
    queued: Any = await plain.redis.llen(QUEUE)
    return not queued and not await plain.unacknowledged()


async def _account(plain: PlainStand, result: PlainResult) -> None:
    submitted: dict[str, int] = {}
    for line in Tail(plain.journal).lines():
        _, task_id, number = line.split(" ")
        submitted[task_id] = int(number)
    queued: Any = await plain.redis.lrange(QUEUE, 0, -1)
    somewhere = {json.loads(message)["headers"]["id"] for message in queued} | await plain.unacknowledged()
    result.tasks = len(submitted)
    for task_id, sent in submitted.items():
        meta = await plain.redis.get(KEYS.meta_prefix + task_id)
        if meta is None:
            result.stuck += task_id in somewhere
            result.lost += task_id not in somewhere
        elif json.loads(meta)["result"] != values(sent):
            result.wrong += 1
    received: Counter[str] = Counter()
    for worker in plain.workers:
        received.update(_received(worker.spec.log_file, 0))
    result.delivered_again = sum(count - 1 for count in received.values())


def _received(log: Path, offset: int) -> Counter[str]:
    """How often a worker says that it has received a task, by its id."""
    received: Counter[str] = Counter()
    for line in Tail(log, offset).lines():
        _, found, rest = line.partition("Task plain.infer[")
        if found and rest.endswith("] received"):
            received[rest.removesuffix("] received")] += 1
    return received
