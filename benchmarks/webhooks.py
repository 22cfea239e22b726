"""The measurements of webhooks: a filled outbox, and how soon one arrives; receivers are processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from benchmarks.measure import percentile
from benchmarks.stack import BenchStack, Figures
from samphire import AsyncClient
from samphire.webhooks import verify
from samphire_broker.settings import Settings
from samphire_broker.webhooks.endpoint import Endpoint
from samphire_broker.webhooks.registry import Registry, open_registry

OUTBOX, HANGING = 20_000, 200
RATE_PER_S, SECONDS = 200, 20
VALUES = 100
"""FP32 of each result, which goes along: a body of about 1 KB."""
TIMEOUT_S = 300.0

Arrival = tuple[float, str, str]
"""When it came, the task, and when the task had ended."""


@contextlib.contextmanager
def receiving(port: int, file: str) -> Iterator[None]:
    """A receiver while it serves; it has written what it got when this is left."""
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "benchmarks.receiver", str(port), file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.terminate()


def arrivals(file: Path, secret: str, tasks: Sequence[str]) -> list[Arrival]:
    """What has arrived, in its order: each signed, of about 1 KB, and of each task exactly one."""
    found, ids = list[Arrival](), set[str]()
    for line in file.read_text().splitlines():
        at, headers, body = json.loads(line)
        event = verify(body, headers, secret, now_s=int(headers["webhook-timestamp"]))
        assert event.type == "task.succeeded"
        assert event.data["result"]["outputs"][0]["shape"] == [1, VALUES]
        assert 900 < len(body) < 1300
        ids.add(event.id)
        found.append((at, event.data["task_id"], event.data["finished_at"]))
    assert len(ids) == len(found) == len(tasks), "a webhook is missing, or came twice"
    assert sorted(task for _, task, _ in found) == sorted(tasks)
    return found


@contextlib.contextmanager
def _registered(stack: BenchStack, names: Sequence[str]) -> Iterator[tuple[Registry, dict[str, str]]]:
    settings = Settings(
        broker_url=stack.broker_url,
        data_dir=stack.data_dir,
        webhook_schemes=("http",),
        webhook_ports=stack.webhook_ports,
        webhook_allow_private=True,
    )
    with open_registry(settings) as registry:
        secrets = {}
        for name, port in zip(names, stack.webhook_ports, strict=False):
            endpoint = Endpoint(name, f"http://127.0.0.1:{port}/hook", result_bytes=4096)
            secrets[name] = registry.add(endpoint, "v1").secrets[0]
        try:
            yield registry, secrets
        finally:
            for name in names:
                registry.remove(name)


def _input() -> dict[str, np.ndarray]:
    return {"input_fp32": np.random.default_rng(7).random((1, VALUES), np.float32)}


def outbox(stack: BenchStack, scale: float) -> Figures:
    """A filled outbox goes to a healthy receiver while another endpoint hangs."""
    count = max(500, int(OUTBOX * scale))

    async def fill(registry: Registry) -> list[str]:
        async with AsyncClient(stack.broker_url) as client:
            hanging = [await client.submit("identity", _input(), webhook="hangs") for _ in range(HANGING)]
            results = client.map("identity", [_input()] * count, webhook="outbox")
            tasks = [result.task_id async for result in results]
            for task in hanging:
                await task.result(timeout_s=TIMEOUT_S)
        assert registry.state("outbox").waiting == count
        return tasks

    with tempfile.TemporaryDirectory() as folder, _registered(stack, ("outbox", "hangs")) as (registry, secrets):
        file = Path(folder) / "got"
        with receiving(stack.webhook_ports[0], str(file)), receiving(stack.webhook_ports[1], "-"):
            registry.disable("outbox")
            time.sleep(1)  # so that the worker has seen it
            tasks = asyncio.run(fill(registry))
            registry.enable("outbox")
            give_up = time.monotonic() + TIMEOUT_S
            while registry.state("outbox").waiting:
                assert time.monotonic() < give_up, f"{registry.state('outbox').waiting} of {count} have not arrived"
                time.sleep(0.05)
            assert registry.state("hangs").waiting == HANGING
        found = arrivals(file, secrets["outbox"], tasks)
    times = [at for at, _, _ in found]
    return {"webhooks_per_s": (len(times) - 1) / (times[-1] - times[0])}


def arrival(stack: BenchStack, scale: float) -> Figures:
    """How long after a task's end its webhook is there, at 200 tasks a second."""
    count = max(200, int(RATE_PER_S * SECONDS * scale))

    async def submit() -> list[str]:
        async with AsyncClient(stack.broker_url) as client, asyncio.TaskGroup() as group:
            began, tasks = time.perf_counter(), []
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / RATE_PER_S - time.perf_counter()))
                tasks.append(group.create_task(client.submit("identity", _input(), webhook="arrival")))
        return [task.result().id for task in tasks]

    with tempfile.TemporaryDirectory() as folder, _registered(stack, ("arrival",)) as (registry, secrets):
        file = Path(folder) / "got"
        with receiving(stack.webhook_ports[0], str(file)):
            tasks = asyncio.run(submit())
            give_up = time.monotonic() + TIMEOUT_S
            while registry.client.zcard(stack.keys.ended_deliveries("arrival")) < count:
                assert time.monotonic() < give_up, "not all have arrived"
                time.sleep(0.05)
        found = arrivals(file, secrets["arrival"], tasks)
    waits_ms = [(at - datetime.fromisoformat(ended).timestamp()) * 1000 for at, _, ended in found]
    return {
        "webhook_p50_ms": statistics.median(waits_ms),
        "webhook_p99_ms": percentile(waits_ms, 0.99),
    }
