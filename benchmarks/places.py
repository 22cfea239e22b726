"""How long it takes to tell the place of one task among a million that are queued, and what it costs the broker."""

from __future__ import annotations

import asyncio
import random
import statistics
import time

from benchmarks.stack import BenchStack, Figures

MOST = 1_000_000
ASKED = 200
QUEUE = "inference.digits"
LIST = f"{QUEUE}\x06\x163"
TASKS_PER_S = (2_000.0, 5_000.0, 15_000.0, 25_000.0)
"""Producers come and go: every 5,000 tasks another rate, and now and then a second of nothing."""


def place(stack: BenchStack, scale: float) -> Figures:
    """Times of `status(detail=True)`, in ms, each with the right place; the broker's slowest command, in ms."""
    from samphire import AsyncClient  # a version that is compared with may have none of these
    from samphire.wire.contract import INFER_TASK, InferRequest, InputTensor
    from samphire.wire.envelope import encode_task, new_task_id

    request = InferRequest("digits", [InputTensor("image", "FP32", [1, 8, 8], raw="A" * 344)])
    chance, at, ids = random.Random(7), time.time() - 3600, list[str]()
    messages: list[bytes] = []
    with stack.redis() as server, stack.worker_stopped():
        for number in range(max(10_000, int(MOST * scale))):
            if number % 5000 == 0:
                rate = chance.choice(TASKS_PER_S)
                at += chance.choice([0.0, 0.0, 0.0, 1.0])
            at += chance.expovariate(rate)
            ids.append(new_task_id(at))
            messages.append(encode_task(INFER_TASK, ids[-1], request, QUEUE, 3, sent_at=int(at * 1000) / 1000))
            if len(messages) == 1000:
                server.lpush(LIST, *messages)
                messages = []
        server.sadd(stack.keys.queues, QUEUE)

        async def ask() -> list[float]:
            times = []
            async with AsyncClient(stack.broker_url) as client:
                await client.task(ids[0]).status(detail=True)  # connections are opened once
                server.slowlog_reset()
                for position in chance.sample(range(len(ids)), ASKED):
                    began = time.perf_counter()
                    told = await client.task(ids[position]).status(detail=True)
                    times.append(time.perf_counter() - began)
                    assert (told.queue, told.ahead) == (QUEUE, position), f"{told}: expected {position}"
            return times

        server.config_set("slowlog-log-slower-than", 500)
        server.config_set("slowlog-max-len", 10_000)
        assert server.llen(LIST) == len(ids)
        times = asyncio.run(ask())
        slowest_us = max([entry["duration"] for entry in server.slowlog_get(10_000)], default=0)
        server.config_set("slowlog-log-slower-than", 10_000)
        server.unlink(LIST)
    return {
        "place_p50_ms": statistics.median(times) * 1000,
        "place_p95_ms": statistics.quantiles(times, n=20)[-1] * 1000,
        "place_max_ms": max(times) * 1000,
        "place_slowest_command_ms": slowest_us / 1000,
    }
