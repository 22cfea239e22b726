"""The measurements of Samphire. Each returns figures by name; rates are a second, times are in the unit of the name."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import psutil
import redis
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.answers import (
    META_PREFIX,
    NORMAL,
    QUEUE,
    Ends,
    FloatArray,
    check_backlog,
    check_equal,
    check_once,
    queued,
    rows,
    stream_of,
    unsettled,
)
from benchmarks.rivals import infer, rate
from benchmarks.stack import BenchStack, Figures, Memory, drain_rate
from samphire import AsyncClient

TASKS = 100_000
STANDSTILL_S = 30.0
END_TO_END = 60_000
READS = 10_000
READ_TIMEOUT_S = 60.0
"""For all of them together."""
BETWEEN_S = 0.002


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values are below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def publish(client: AsyncClient, server: redis.Redis, questions: Sequence[FloatArray], queue: str) -> float:
    """Publish through `map`, and return the seconds until the broker has all of it."""
    inputs = [{"input_fp32": question} for question in questions]
    results = client.map("identity", iter(inputs), window=len(inputs), window_bytes=2**40)
    began = moved = time.perf_counter()
    first = asyncio.ensure_future(anext(results))
    there = 0
    while (now := int(server.llen(queue + NORMAL))) < len(inputs):
        if first.done():
            first.result()  # its error, or else somebody has answered although the worker stands still
            raise AssertionError("an answer came before all was published")
        if now > there:
            there, moved = now, time.perf_counter()
        elif time.perf_counter() - moved > STANDSTILL_S:
            raise AssertionError(f"{there} of {len(inputs)} are published, and no more for {STANDSTILL_S:.0f} s")
        await asyncio.sleep(0.01)
    elapsed = time.perf_counter() - began
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    await results.aclose()  # type: ignore[attr-defined]
    return elapsed


def ended(server: redis.Redis) -> int:
    """Tasks whose result is stored."""
    return sum(1 for _ in server.scan_iter(f"{META_PREFIX}*", count=10_000))


@contextlib.contextmanager
def ends_of(stack: BenchStack, messages: Sequence[bytes]) -> Iterator[Counter[str]]:
    """How often each task of these messages ends, known once the context has ended."""
    counted = Counter[str]()
    with Ends(stack.broker_url, stream_of(messages[0])) as ends:
        yield counted
    counted.update(ends.counted())


def drain(stack: BenchStack, scale: float) -> Figures:
    """Publication, memory of a backlog, its drain, and submit to result in one client."""
    figures = Figures()
    questions = rows(max(500, int(TASKS * scale)))
    with stack.redis() as server:
        with stack.worker_stopped():  # the lease outlives the publication; nothing is claimed meanwhile
            figures |= asyncio.run(_backlog(stack, server, questions))
            messages = queued(server)
            already = ended(server)
        with Memory(stack.worker_pid) as memory:
            with ends_of(stack, messages) as ends:
                figures["drain_per_s"] = drain_rate(len(questions), lambda: unsettled(server))
            assert ended(server) - already == len(questions)
            check_backlog(server, messages, ends)
            figures["end_to_end_per_s"] = asyncio.run(_end_to_end(stack, rows(max(300, int(END_TO_END * scale)))))
        figures["worker_memory_mb"] = memory.most_mb
        figures["broker_memory_mb"] = psutil.Process(stack.broker_pid).memory_info().rss / 2**20
    return figures


async def _backlog(stack: BenchStack, server: redis.Redis, questions: Sequence[FloatArray]) -> Figures:
    before = server.info("memory")["used_memory"]
    async with AsyncClient(stack.broker_url) as client:
        rate_per_s = len(questions) / await publish(client, server, questions, QUEUE)
    used = server.info("memory")["used_memory"] - before
    return {
        "publish_per_s": rate_per_s,
        "queued_bytes_over_payload": used / len(questions) - questions[0].nbytes,
    }


async def _end_to_end(stack: BenchStack, questions: Sequence[FloatArray]) -> float:
    inputs = [{"input_fp32": question} for question in questions]
    async with AsyncClient(stack.broker_url) as client:
        began = time.perf_counter()
        results = [result async for result in client.map("identity", iter(inputs))]
        elapsed = time.perf_counter() - began
    check_equal("end to end", questions, [result.outputs["output_fp32"] for result in results])
    check_once("end to end", (result.task_id for result in results))
    return len(questions) / elapsed


def latency(stack: BenchStack, scale: float) -> Figures:
    """One request at a time, in blocks that take turns: straight to Triton, and through Samphire."""
    warm, blocks, requests = 20, 10, int(500 * scale) + 20
    questions = rows(requests)

    async def run() -> Figures:
        straight, through = list[float](), list[float]()
        async with InferenceServerClient(stack.triton_grpc) as triton, AsyncClient(stack.broker_url) as client:

            async def through_samphire(question: FloatArray) -> FloatArray:
                task = await client.submit("identity", {"input_fp32": question})
                return (await task.result(timeout_s=30)).outputs["output_fp32"]

            ways = ((straight, lambda question: infer(triton, question)), (through, through_samphire))
            for _, (times, request) in itertools.product(range(blocks), ways):
                answers = []
                for number, question in enumerate(questions):
                    began = time.perf_counter()
                    answers.append(await request(question))
                    if number >= warm or requests <= warm:
                        times.append((time.perf_counter() - began) * 1000)
                check_equal("one at a time", questions, answers)
        return {
            "direct_p50_ms": statistics.median(straight),
            "direct_p99_ms": percentile(straight, 0.99),
            "samphire_p50_ms": statistics.median(through),
            "samphire_p99_ms": percentile(through, 0.99),
        }

    return asyncio.run(run())


def large_tensors(stack: BenchStack, scale: float) -> Figures:
    """FP32 [1, 150000], 600 KB each way."""
    tensors = rows(8, 150_000)

    async def run() -> Figures:
        count = max(8, int(600 * scale))
        asked = [tensors[number % len(tensors)] for number in range(count)]
        async with InferenceServerClient(stack.triton_grpc) as triton, AsyncClient(stack.broker_url) as client:
            rates = [await rate(triton, tensors, concurrency, count) for concurrency in (4, 16)]
            began = time.perf_counter()
            results = [
                result async for result in client.map("identity", ({"input_fp32": one} for one in asked), window=64)
            ]
            elapsed = time.perf_counter() - began
        check_equal("600 KB tensors", asked, [result.outputs["output_fp32"] for result in results])
        check_once("600 KB tensors", (result.task_id for result in results))
        return {"direct_600kb_per_s": max(rates), "samphire_600kb_per_s": count / elapsed}

    with Memory(stack.worker_pid) as memory:
        figures = asyncio.run(run())
    return figures | {"worker_memory_600kb_mb": memory.most_mb}


def fairness(stack: BenchStack, scale: float) -> Figures:
    """How long a tenant waits for its first task: alone, and beside one that has 100,000 tasks queued on the model."""
    rounds, trials = 3, 10
    questions = rows(max(500, int(TASKS * scale)))
    neighbour = f"{QUEUE}@neighbour"
    newcomers = (f"newcomer{number}" for number in itertools.count())

    async def first_task() -> float:
        async with AsyncClient(stack.broker_url, tenant=next(newcomers)) as client:
            await client.signature("identity")  # it is connected, and nothing more
            began = time.perf_counter()
            result = await (await client.submit("identity", {"input_fp32": questions[1]})).result(timeout_s=60)
            taken = (time.perf_counter() - began) * 1000
        check_equal("a tenant's first task", questions[1:2], [result.outputs["output_fp32"]])
        return taken

    async def beside_backlog(server: redis.Redis) -> list[float]:
        with stack.worker_stopped():
            async with AsyncClient(stack.broker_url, tenant="neighbour") as client:
                await publish(client, server, questions, neighbour)
            messages, times = queued(server, neighbour), list[float]()
        with ends_of(stack, messages) as ends:
            while server.llen(neighbour + NORMAL) > len(questions) * 0.98:  # the worker is awake again
                await asyncio.sleep(0.01)
            for _ in range(trials):
                taken = await first_task()
                if not server.llen(neighbour + NORMAL):
                    break  # the neighbour has nothing left: this was no trial
                times.append(taken)
            while server.llen(neighbour + NORMAL) or unsettled(server):
                await asyncio.sleep(0.02)
        check_backlog(server, messages, ends)
        return times

    async def run() -> Figures:
        alone = [await first_task() for _ in range(rounds * trials)]
        with stack.redis() as server:
            beside = [taken for _ in range(rounds) for taken in await beside_backlog(server)]
        assert beside, "the neighbour's backlog was gone before the first trial ended"
        return {
            "first_task_alone_p50_ms": statistics.median(alone),
            "first_task_alone_max_ms": max(alone),
            "first_task_beside_backlog_p50_ms": statistics.median(beside),
            "first_task_beside_backlog_max_ms": max(beside),
            "first_task_trials_beside_backlog": len(beside),
        }

    return asyncio.run(run())


def claim_cost(stack: BenchStack, scale: float) -> Figures:
    """A claim of 64 with few and with many queued, in interleaved pairs; medians."""
    from samphire_broker.settings import Settings  # of the version that is measured
    from samphire_broker.store import Store, Turn

    most = max(20_000, int(1_000_000 * scale))
    sizes = {"1k": 1000, "100k": most // 10, "1m": most}
    message = b"x" * 700

    async def run() -> Figures:
        settings = Settings(broker_url=stack.broker_url)
        store = Store(settings, "bench")
        times: dict[str, list[float]] = {name: [] for name in sizes}
        with stack.redis() as server:
            plans = {}
            for name, size in sizes.items():
                queue = f"bench-claims-{name}"  # no inference queue: the lane does not see it
                for begin in range(0, size, 1000):
                    server.lpush(queue, *[message] * min(1000, size - begin))
                plans[name] = [Turn(queue, 64, 0)]
            lease, inflight = store._lease, store._inflight  # every version has these
            server.set(lease, 1)
            for _ in range(400):
                for name, turns in plans.items():
                    began = time.perf_counter()
                    claimed = await store.claim(turns, [64], 64, 10**9)
                    times[name].append(time.perf_counter() - began)
                    assert [claim.message for claim in claimed] == [message] * 64
                    assert len({claim.field for claim in claimed}) == 64
                    await store.release([claim.field for claim in claimed])
            for name, size in sizes.items():
                assert server.llen(f"bench-claims-{name}") == size, "a claim was lost, or returned twice"
                server.unlink(f"bench-claims-{name}")
            server.delete(lease, inflight)
        await store.close()
        return {f"claim_us_{name}": statistics.median(values) * 1e6 for name, values in times.items()}

    return asyncio.run(run())


def read_one_by_one(stack: BenchStack, scale: float, reads: int = READS, timeout_s: float = READ_TIMEOUT_S) -> Figures:
    """Results that are there already, each settled alone, read one after the other by the client that submitted them.

    Where they are not all read after `timeout_s`, the figures say how many were, and no more.
    """
    return asyncio.run(_read_one_by_one(stack, max(50, int(reads * scale)), timeout_s))


async def _read_one_by_one(stack: BenchStack, count: int, timeout_s: float) -> Figures:
    questions, times, answers = rows(count), list[float](), list[FloatArray | None]()
    async with AsyncClient(stack.broker_url) as client:
        tasks = []
        for question in questions:
            tasks.append(await client.submit("identity", {"input_fp32": question}))
            await asyncio.sleep(BETWEEN_S)  # so that each is settled alone
        with stack.redis() as server:
            while unsettled(server):
                await asyncio.sleep(0.02)
            until = time.perf_counter() + timeout_s
            with stack.worker_stopped():  # so that the broker's commands are the client's
                before = _commands(server)
                for task in tasks:
                    began = time.perf_counter()
                    try:
                        async with asyncio.timeout(max(0.0, until - began)):
                            answers.append((await task.result()).outputs["output_fp32"])
                    except TimeoutError:
                        break
                    times.append((time.perf_counter() - began) * 1000)
                commands = _commands(server) - before
    check_equal("one by one", questions[: len(answers)], answers)
    if len(answers) < count:
        return {"read_one_by_one_done": len(answers)}
    return {
        "read_one_by_one_done": count,
        "read_one_by_one_p50_ms": statistics.median(times),
        "read_one_by_one_p99_ms": percentile(times, 0.99),
        "read_one_by_one_round_trips": commands / count,
    }


def _commands(server: redis.Redis) -> int:
    """Commands that the broker has carried out, but for the asking."""
    stats = server.info("commandstats")
    return sum(int(found["calls"]) for name, found in stats.items() if name != "cmdstat_info")
