"""What Samphire is measured beside: a straight Triton client, and a plain Celery worker that forwards to Triton."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.answers import FloatArray, check_equal, rows
from benchmarks.stack import BenchStack, Figures

CONCURRENCIES = (32, 64, 128, 256)
DISTINCT = 4096
"""So many different questions take turns."""


async def infer(client: InferenceServerClient, question: FloatArray) -> FloatArray | None:
    """One request straight to `identity`."""
    tensor = InferInput("input_fp32", list(question.shape), "FP32")
    tensor.set_data_from_numpy(question)
    answer: FloatArray | None = (await client.infer("identity", [tensor])).as_numpy("output_fp32")
    return answer


async def rate(client: InferenceServerClient, asked: Sequence[FloatArray], concurrency: int, requests: int) -> float:
    """Requests a second with so many under way at once; the answers are compared afterwards."""
    answers: list[FloatArray | None] = [None] * requests
    left = iter(range(requests))

    async def worker() -> None:
        for number in left:
            answers[number] = await infer(client, asked[number % len(asked)])

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    elapsed = time.perf_counter() - began
    check_equal("straight client", [asked[number % len(asked)] for number in range(requests)], answers)
    return requests / elapsed


def direct(stack: BenchStack, scale: float) -> Figures:
    """`tritonclient.grpc.aio` straight to Triton, at the concurrency that is best for it."""

    async def run() -> Figures:
        single = rows(DISTINCT)
        batches = [np.repeat(row, 64, axis=0) + np.arange(64, dtype=np.float32)[:, None] for row in single[:64]]
        async with InferenceServerClient(stack.triton_grpc) as client:
            await rate(client, single, 64, int(1000 * scale) + 64)  # warm
            requests = int(16_000 * scale)
            rates = [await rate(client, single, concurrency, requests) for concurrency in CONCURRENCIES]
            batched = [await rate(client, batches, concurrency, requests // 4) for concurrency in (4, 16)]
        return {"direct_per_s": max(rates), "direct_batched_64_rows_per_s": 64 * max(batched)}

    return asyncio.run(run())


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

    figures = Figures()
    count = max(200, int(4000 * scale))
    asked = rows(count)
    values = [question.tolist() for question in asked]

    def check(answers: list[object]) -> None:
        found = [np.array(answer, np.float32) for answer in answers]
        check_equal("plain Celery", asked[: len(found)], found)

    with app:
        for name, pool in {"threads": ["-P", "threads", "-c", "32"], "prefork": ["-P", "prefork", "-c", "2"]}.items():
            began = time.perf_counter()
            results = [infer.delay(value) for value in values]
            figures["send_task_per_s"] = max(figures.get("send_task_per_s", 0), count / (time.perf_counter() - began))
            with _celery_worker(pool, environment):
                first = count // 10
                results[first - 1].get(timeout=120)
                began = time.perf_counter()
                answers = [result.get(timeout=120) for result in results]
                figures[f"celery_{name}_per_s"] = (count - first) / (time.perf_counter() - began)
                check(answers)
                began = time.perf_counter()
                results = [infer.delay(value) for value in values[: count // 2]]
                answers = [result.get(timeout=120) for result in results]
                figures[f"celery_{name}_end_to_end_per_s"] = (count // 2) / (time.perf_counter() - began)
                check(answers)
    return figures
