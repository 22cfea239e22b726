"""Where the time of a task went, as its result, Celery's clients, Flower and the command tell it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from samphire import AsyncClient, Client, Timings
from samphire.wire.contract import InferRequest, InputTensor
from samphire.wire.envelope import encode_task
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.statistics import LOOK_S, NOT_KNOWN, REST_S, Averages, Statistics
from tests.stacks import ENDS_S, SAMPHIRE, Up, Valkey, clean_environment, eventually
from tests.support.lane import (
    FakeTriton,
    away,
    body,
    counting,
    fake_triton,
    in_a_loop,
    lane_worker,
    until,
    until_set,
    x,
)
from tests.support.plain import plain_celery

TIMEOUT_S = 30
APART_S = 0.5
"""By so much the broker's clock may be known wrongly on a busy machine."""
FRAME = {"input_fp32": np.ones((1, 1), np.float32)}


def timings_of(result: Any) -> Timings:
    assert isinstance(result.timings, Timings)
    return result.timings


def test_the_parts_are_the_whole(stack: Up) -> None:
    """From the submit to the end there is no time that no part tells; Triton's own times are within its call."""
    with Client(stack.broker_url) as client:
        client.submit("identity", FRAME).result(ENDS_S)
        before = time.time()
        task = client.submit("identity", FRAME)
        timings = timings_of(task.result(ENDS_S))
        after = time.time()
    assert timings.submitted_at is not None and timings.queued_s is not None
    assert before - APART_S <= timings.submitted_at <= timings.claimed_at <= timings.settled_at <= after + APART_S
    parts = timings.queued_s + timings.waited_s + timings.triton_s + timings.settling_s
    assert parts == pytest.approx(timings.settled_at - timings.submitted_at, abs=1e-3)
    assert (timings.attempts, timings.batch_size) == (1, 1) and timings.worker.startswith("worker")


def test_triton_tells_averages(stack: Up) -> None:
    """After the first look, soon after an answer."""
    with Client(stack.broker_url) as client:

        def told() -> bool:
            timings = timings_of(client.submit("identity", FRAME).result(ENDS_S))
            return bool(timings.triton_queue_s and timings.triton_compute_s)

        eventually(told, ENDS_S, "means of Triton's own times")


def test_celery_reads_them(stack: Up) -> None:
    """A plain producer does not say when it submitted; all else is there."""
    with plain_celery(stack.broker_url) as app:
        sent = app.send_task("samphire.infer", kwargs=IDENTITY, queue="inference.identity")
        told = sent.get(timeout=TIMEOUT_S)["timings"]
    assert "queued_s" not in told and told["triton_s"] > 0 and told["settled_at"] > 1e9
    assert str(Timings(**told)).startswith("waited ")


IDENTITY = {
    "model_name": "identity",
    "inputs": [{"name": "input_fp32", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}],
}


def test_the_command_prints_them(stack: Up) -> None:
    """To people beside the result, to scripts within it."""
    command = [SAMPHIRE, "submit", "identity", "--input", "input_fp32=[[1]]", "--wait"]
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": stack.broker_url}
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=ENDS_S, env=environment)
        assert done.returncode == 0, done.stderr
        if more:
            assert json.loads(done.stdout)["timings"]["batch_size"] == 1
        else:
            assert "queued " in done.stderr and "; attempt 1, worker worker" in done.stderr


@in_a_loop
async def test_the_size_of_a_batch(valkey: Valkey) -> None:
    """What waits together is asked together, and each is told so."""
    go_on = asyncio.Event()

    async with fake_triton("one") as triton, AsyncClient(valkey.url) as client, lane_worker(valkey.url, triton):
        triton.behave["one"] = until_set(go_on)
        tasks = [await client.submit("one", x()) for _ in range(30)]
        await until(lambda: triton.asked, "a first batch")
        go_on.set()
        sizes = [timings_of(await task.result(TIMEOUT_S)).batch_size for task in tasks]
    assert max(sizes) > 1 and all(1 <= size <= 8 for size in sizes)


@in_a_loop
async def test_attempts_are_counted(valkey: Valkey) -> None:
    """A task that failed once tells two attempts; the first is part of its wait in the queue."""
    failed = asyncio.Event()

    async def once(context: Any) -> None:
        if not failed.is_set():
            failed.set()
            await asyncio.sleep(0.2)
            await context.abort(13, "the model raised")

    async with fake_triton("one") as triton, AsyncClient(valkey.url) as client:
        triton.behave["one"] = once
        async with lane_worker(valkey.url, triton, backoff_base_s=0):
            timings = timings_of(await (await client.submit("one", x())).result(TIMEOUT_S))
    assert timings.attempts == 2 and timings.queued_s is not None and timings.queued_s >= 0.2


@in_a_loop
async def test_a_stream_and_a_chain(valkey: Valkey) -> None:
    """The result of a stream has them too, and each step of a chain its own."""
    async with fake_triton("one", "many") as triton, AsyncClient(valkey.url) as client:
        triton.streams["many"] = counting(3)
        async with lane_worker(valkey.url, triton):
            result = await (await client.submit("many", x(), collect=True)).result(TIMEOUT_S)
            assert timings_of(result).batch_size == 1 and result.output_count == 3
            with plain_celery(valkey.url) as app:
                second = {"model_name": "one", "inputs": [{"name": "x", "from": "y"}]}
                steps = app.signature("samphire.infer", kwargs=body("one"), queue="inference.one") | app.signature(
                    "samphire.infer", kwargs=second, queue="inference.one"
                )
                end = steps.apply_async()
                given = await asyncio.to_thread(end.get, timeout=TIMEOUT_S)
                first = await asyncio.to_thread(end.parent.get, timeout=TIMEOUT_S)
    assert first["timings"]["settled_at"] < given["timings"]["settled_at"]


class Clock:
    """A monotonic clock that a test sets, and the looks that were begun."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.begun: list[Coroutine[Any, Any, None]] = []
        self.statistics = Statistics(self.begun.append, lambda: self.now)

    async def look(self) -> None:
        """Let a look that was begun come to its end."""
        await self.begun.pop()


def tell(triton: FakeTriton, requests: int, queue_ns: int, compute_ns: int) -> None:
    """Let Triton tell so many requests since the model was loaded, and their sums."""
    told = triton.statistics
    told.queue.count, told.queue.ns = requests, queue_ns
    told.compute_infer.count, told.compute_infer.ns = requests, compute_ns


@in_a_loop
async def test_averages_are_of_the_requests_between_two_looks() -> None:
    """Seldom asked for, and nobody waits but the first; a model that was loaded again begins anew."""
    async with fake_triton("one") as triton:
        endpoint, clock = Endpoint(triton.address), Clock()

        async def averages() -> Averages:
            return await clock.statistics.averages(endpoint, "one", "1")

        tell(triton, 10, 20_000_000, 50_000_000)
        assert await averages() == Averages(0.002, 0.005)
        tell(triton, 11, 24_000_000, 51_000_000)
        assert await averages() == Averages(0.002, 0.005) and triton.looks == 1 and not clock.begun
        clock.now += LOOK_S
        assert await averages() == Averages(0.002, 0.005) and len(clock.begun) == 1
        await clock.look()
        assert await averages() == Averages(0.004, 0.001) and triton.looks == 2
        tell(triton, 2, 2_000_000, 6_000_000)
        for expected in (Averages(0.001, 0.003), NOT_KNOWN):  # then no request since
            clock.now += LOOK_S
            await averages()
            await clock.look()
            assert await averages() == expected
        await endpoint.close()


@in_a_loop
async def test_a_triton_that_does_not_tell_is_left_alone() -> None:
    """It has no statistics, or hides them: results come without, and it is not asked at each."""
    async with fake_triton("one") as triton:
        asked: list[str] = []

        async def refuse(request: Any, context: Any) -> Any:
            asked.append(request.name)
            await away(context)

        triton.ModelStatistics = refuse  # type: ignore[method-assign]
        await triton.stop()
        await triton.start()
        endpoint, clock = Endpoint(triton.address), Clock()
        for _ in range(3):
            assert await clock.statistics.averages(endpoint, "one", "1") == NOT_KNOWN
            clock.now += LOOK_S
        assert len(asked) == 1 and not clock.begun
        clock.now += REST_S
        await clock.statistics.averages(endpoint, "one", "1")
        await clock.look()
        assert len(asked) == 2
        await endpoint.close()


@pytest.mark.parametrize("sent_at", [-1e308, 0.0, 1e300])
@in_a_loop
async def test_a_submit_at_an_odd_time_is_answered(valkey: Valkey, sent_at: float) -> None:
    """Anybody may write anything there: then it is not told how long it was queued."""
    async with fake_triton("one") as triton, lane_worker(valkey.url, triton), AsyncClient(valkey.url) as client:
        request = InferRequest("one", [InputTensor("x", "FP32", [1, 1], raw="AACAPw==")])
        message = encode_task("samphire.infer", "odd", request, "inference.one", 0, sent_at=sent_at)
        valkey.client.lpush("inference.one", message)
        timings = timings_of(await client.task("odd").result(TIMEOUT_S))
        assert timings.queued_s is None and len(triton.asked) == 1
