"""The measurements. Each returns figures by name; rates are a second, times are in the unit of the name."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import redis
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.stack import BenchStack
from samphire import AsyncClient, keys
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_workers.lane.planner import QueuePlanner

ROW = np.random.default_rng(0).random((1, 16), dtype=np.float32)
QUEUE = keys.queue_name("identity")
CONCURRENCIES = (32, 64, 128, 256)
Figures = dict[str, float]


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values are below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# -- the straight client ----------------------------------------------------------------------------


async def _infer(client: InferenceServerClient, rows: np.ndarray) -> None:
    tensor = InferInput("input_fp32", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    answer = (await client.infer("identity", [tensor])).as_numpy("output_fp32")
    assert answer is not None and answer.shape == rows.shape


async def _rate(client: InferenceServerClient, rows: np.ndarray, concurrency: int, requests: int) -> float:
    left = requests

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await _infer(client, rows)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return requests / (time.perf_counter() - began)


def direct(stack: BenchStack, scale: float) -> Figures:
    """`tritonclient.grpc.aio` straight to Triton, at the concurrency that is best for it."""

    async def run() -> Figures:
        async with InferenceServerClient(stack.triton_grpc) as client:
            await _rate(client, ROW, 64, int(1000 * scale) + 64)  # warm
            requests = int(16_000 * scale)
            single = [await _rate(client, ROW, concurrency, requests) for concurrency in CONCURRENCIES]
            batch = np.repeat(ROW, 64, axis=0)
            batched = [await _rate(client, batch, concurrency, requests // 4) for concurrency in (4, 16)]
        return {"direct_per_s": max(single), "direct_batched_64_rows_per_s": 64 * max(batched)}

    return asyncio.run(run())


# -- plain Celery -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _celery_worker(pool: list[str], environment: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.plain_celery", "worker", "--loglevel", "WARNING"]
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [*command, *pool],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def plain_celery(stack: BenchStack, scale: float) -> Figures:
    """A plain Celery worker that forwards to Triton; drain of a backlog, and end to end."""
    broker_url = stack.broker_url.removesuffix("/0") + "/1"
    environment = {**os.environ, "BENCH_BROKER_URL": broker_url, "BENCH_TRITON_URL": stack.triton_grpc}
    os.environ.update(environment)
    from benchmarks.plain_celery import app, infer

    values, figures = ROW.tolist(), Figures()
    count = max(200, int(4000 * scale))
    with app:
        for name, pool in {"threads": ["-P", "threads", "-c", "32"], "prefork": ["-P", "prefork", "-c", "2"]}.items():
            began = time.perf_counter()
            results = [infer.delay(values) for _ in range(count)]
            figures["send_task_per_s"] = max(figures.get("send_task_per_s", 0), count / (time.perf_counter() - began))
            with _celery_worker(pool, environment):
                first = count // 10
                results[first - 1].get(timeout=120)
                began = time.perf_counter()
                for result in results:
                    result.get(timeout=120)
                figures[f"celery_{name}_per_s"] = (count - first) / (time.perf_counter() - began)
                began = time.perf_counter()
                results = [infer.delay(values) for _ in range(count // 2)]
                for result in results:
                    result.get(timeout=120)
                figures[f"celery_{name}_end_to_end_per_s"] = (count // 2) / (time.perf_counter() - began)
    return figures


# -- Samphire ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _worker_stopped(stack: BenchStack) -> Iterator[None]:
    os.kill(stack.worker_pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(stack.worker_pid, signal.SIGCONT)


class _Memory:
    """The most that a process has held, while it runs as a context."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most_mb = 0.0

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.most_mb = max(self.most_mb, self._process.memory_info().rss / 2**20)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


async def _publish(client: AsyncClient, server: redis.Redis, count: int, queue: str = QUEUE) -> float:
    """Publish through `map`, and return the seconds until the broker has all of it."""
    results = client.map("identity", ({"input_fp32": ROW} for _ in range(count)), window=count, window_bytes=2**40)
    began = time.perf_counter()
    first = asyncio.ensure_future(anext(results))
    while server.llen(keys.queue_list(queue, keys.PRIORITIES["normal"])) < count:
        await asyncio.sleep(0.01)
    elapsed = time.perf_counter() - began
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    await results.aclose()  # type: ignore[attr-defined]
    return elapsed


def _ended(server: redis.Redis) -> int:
    """Tasks whose result is stored; none of them may have failed."""
    assert not server.zcard(keys.DEAD)
    return sum(1 for _ in server.scan_iter(f"{keys.META_PREFIX}*", count=10_000))


def _unsettled(server: redis.Redis) -> int:
    """Tasks that are queued or in flight."""
    inflight = sum(server.hlen(f"worker:{worker.decode()}:inflight") for worker in server.smembers(keys.WORKERS))
    return server.llen(keys.queue_list(QUEUE, keys.PRIORITIES["normal"])) + inflight


def samphire(stack: BenchStack, scale: float) -> Figures:
    """Publication, memory of a backlog, its drain, and submit to result in one client."""
    backlog = int(100_000 * scale)
    figures = Figures()
    with stack.redis() as server:

        async def publish() -> None:
            before = server.info("memory")["used_memory"]
            async with AsyncClient(stack.broker_url) as client:
                figures["publish_per_s"] = backlog / await _publish(client, server, backlog)
            used = server.info("memory")["used_memory"] - before
            payload = len(ROW.tobytes())
            figures["queued_bytes_over_payload"] = used / backlog - payload

        already = _ended(server)
        # The lease outlives the publication; nothing is claimed meanwhile.
        with _worker_stopped(stack):
            asyncio.run(publish())
        with _Memory(stack.worker_pid) as memory:
            while (left := _unsettled(server)) > backlog * 0.95:
                time.sleep(0.02)
            began = time.perf_counter()
            while _unsettled(server):
                time.sleep(0.02)
            figures["drain_per_s"] = left / (time.perf_counter() - began)
            assert _ended(server) - already == backlog

            async def end_to_end() -> float:
                async with AsyncClient(stack.broker_url) as client:
                    count = int(60_000 * scale)
                    began = time.perf_counter()
                    seen = 0
                    async for result in client.map("identity", ({"input_fp32": ROW} for _ in range(count))):
                        assert result.outputs["output_fp32"].shape == ROW.shape
                        seen += 1
                    assert seen == count
                    return count / (time.perf_counter() - began)

            figures["end_to_end_per_s"] = asyncio.run(end_to_end())
        figures["worker_memory_mb"] = memory.most_mb
        figures["broker_memory_mb"] = psutil.Process(stack.broker_pid).memory_info().rss / 2**20
    return figures


def latency(stack: BenchStack, scale: float) -> Figures:
    """One request at a time, in blocks that take turns: straight to Triton, and through Samphire."""

    async def run() -> Figures:
        straight: list[float] = []
        queued: list[float] = []
        async with InferenceServerClient(stack.triton_grpc) as triton, AsyncClient(stack.broker_url) as client:

            async def through_samphire() -> None:
                task = await client.submit("identity", {"input_fp32": ROW})
                await task.result(timeout_s=30)

            for _ in range(10):
                for times, request in ((straight, lambda: _infer(triton, ROW)), (queued, through_samphire)):
                    for i in range(int(500 * scale) + 20):
                        began = time.perf_counter()
                        await request()
                        if i >= 20:
                            times.append((time.perf_counter() - began) * 1000)
        return {
            "direct_p50_ms": statistics.median(straight),
            "direct_p99_ms": percentile(straight, 0.99),
            "samphire_p50_ms": statistics.median(queued),
            "samphire_p99_ms": percentile(queued, 0.99),
        }

    return asyncio.run(run())


def large_tensors(stack: BenchStack, scale: float) -> Figures:
    """FP32 [1, 150000], 600 KB each way."""

    async def run() -> Figures:
        tensor = np.random.default_rng(1).random((1, 150_000), dtype=np.float32)
        count = int(600 * scale)
        async with InferenceServerClient(stack.triton_grpc) as triton, AsyncClient(stack.broker_url) as client:
            rates = [await _rate(triton, tensor, concurrency, count) for concurrency in (4, 16)]
            began = time.perf_counter()
            async for result in client.map("identity", ({"input_fp32": tensor} for _ in range(count)), window=64):
                assert result.outputs["output_fp32"].shape == tensor.shape
            elapsed = time.perf_counter() - began
        return {"direct_600kb_per_s": max(rates), "samphire_600kb_per_s": count / elapsed}

    with _Memory(stack.worker_pid) as memory:
        figures = asyncio.run(run())
    return figures | {"worker_memory_600kb_mb": memory.most_mb}


def fairness(stack: BenchStack, scale: float) -> Figures:
    """How long a tenant waits for its first task: alone, and beside one that has 100,000 tasks queued on the model."""
    backlog, rounds, trials = int(100_000 * scale), 3, 10
    neighbour = keys.queue_name("identity", "neighbour")
    waiting = keys.queue_list(neighbour, keys.PRIORITIES["normal"])
    newcomers = (f"newcomer{number}" for number in itertools.count())

    async def first_task() -> float:
        async with AsyncClient(stack.broker_url, tenant=next(newcomers)) as client:
            await client.signature("identity")  # it is connected, and nothing more
            began = time.perf_counter()
            await (await client.submit("identity", {"input_fp32": ROW})).result(timeout_s=60)
            return (time.perf_counter() - began) * 1000

    async def run() -> Figures:
        alone, beside = [await first_task() for _ in range(rounds * trials)], list[float]()
        with stack.redis() as server:
            for _ in range(rounds):
                with _worker_stopped(stack):
                    async with AsyncClient(stack.broker_url, tenant="neighbour") as client:
                        await _publish(client, server, backlog, neighbour)
                while server.llen(waiting) > backlog * 0.98:  # the worker is awake again
                    await asyncio.sleep(0.01)
                for _ in range(trials):
                    taken = await first_task()
                    if not server.llen(waiting):
                        break  # the neighbour has nothing left: this was no trial
                    beside.append(taken)
                while server.llen(waiting) or _unsettled(server):
                    await asyncio.sleep(0.02)
        assert beside, "the neighbour's backlog was gone before the first trial ended"
        return {
            "first_task_alone_p50_ms": statistics.median(alone),
            "first_task_alone_max_ms": max(alone),
            "first_task_beside_backlog_p50_ms": statistics.median(beside),
            "first_task_beside_backlog_max_ms": max(beside),
            "first_task_trials_beside_backlog": len(beside),
        }

    return asyncio.run(run())


def claim_cost(stack: BenchStack, most: int) -> Figures:
    """A claim of 64 with few and with many queued, in interleaved pairs; medians."""
    sizes = {"1k": 1000, "100k": most // 10, "1m": most}
    message = b"x" * 700

    async def run() -> Figures:
        settings = Settings(broker_url=stack.broker_url)
        store = Store(settings, "bench")
        planner = QueuePlanner({})
        times: dict[str, list[float]] = {name: [] for name in sizes}
        with stack.redis() as server:
            plans = {}
            for name, size in sizes.items():
                queue = f"bench-claims-{name}"  # no inference queue: the lane does not see it
                for begin in range(0, size, 1000):
                    server.lpush(queue, *[message] * min(1000, size - begin))
                planner.add([queue])
                turns = [turn for turn in planner.plan(64, set()).turns if turn.list_key == queue]
                plans[name] = [turn._replace(group=0) for turn in turns]
            lease, inflight = "worker:bench", "worker:bench:inflight"
            server.set(lease, 1)
            for _ in range(400):
                for name, turns in plans.items():
                    began = time.perf_counter()
                    claimed = await store.claim(turns, [64], 64, 10**9)
                    times[name].append(time.perf_counter() - began)
                    assert len(claimed) == 64
                    await store.release([claim.field for claim in claimed])
            for name in sizes:
                server.unlink(f"bench-claims-{name}")
            server.delete(lease, inflight)
        await store.close()
        return {f"claim_us_{name}": statistics.median(values) * 1e6 for name, values in times.items()}

    return asyncio.run(run())
