"""`make bench-gpu`: how much of what a straight client gets out of a GPU arrives through Samphire, by the workers.

Valkey, Triton and the workers run on loopback. Two models are asked: `identity`, which costs nothing, and an image
classifier, which runs on CUDA where there is a device. What a straight client reaches at the best of some
concurrencies is measured first; then backlogs are drained by more and more workers. Every answer is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.answers import Ends, WrongAnswerError, check_ended, queued, stream_of, unsettled
from benchmarks.gpu_models import MODELS, Model
from benchmarks.stack import drain_rate, standing_still
from samphire import AsyncClient
from samphire.transport.address import broker_of
from samphire_broker.embedded.ports import choose_port
from samphire_broker.embedded.process import Part
from samphire_broker.embedded.tritonserver import triton_spec
from samphire_broker.embedded.valkey import valkey_spec
from samphire_broker.embedded.worker import worker_spec
from samphire_broker.settings import shipped_model_repository

CONCURRENCIES = (16, 64, 256)
WORKERS = (1, 2, 4, 8)
SUBMITS_AT_ONCE = 512
NO_GPU = "no GPU"


class Busy:
    """The share of the time in which the GPU ran something, as nvidia-smi samples it, while it runs as a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.share: float | None = None

    def __enter__(self) -> Self:
        if shutil.which("nvidia-smi"):
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
            self._process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        output = self._process.communicate()[0]
        samples = [float(line) for line in output.split() if line.replace(".", "").isdigit()]
        self.share = statistics.mean(samples) / 100 if samples else None


def device() -> str:
    """The GPU's name, or that there is none."""
    if not shutil.which("nvidia-smi"):
        return NO_GPU
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or NO_GPU


@dataclass
class Row:
    """One line of the table."""

    model: str
    way: str
    requests: int
    per_s: float
    share: float
    busy: float | None

    def cells(self) -> list[str]:
        """As they are shown."""
        busy = NO_GPU if self.busy is None else f"{self.busy:.0%}"
        return [self.model, self.way, f"{self.requests:,}", f"{self.per_s:,.0f}", f"{self.share:.2f}", busy]


@dataclass
class Servers:
    """Valkey, Triton and as many workers as were started."""

    folder: Path
    parts: list[Part] = field(default_factory=list)
    workers: list[Part] = field(default_factory=list)
    broker_url: str = ""
    triton: str = ""

    async def start(self) -> None:
        """Start Valkey, and Triton with both models."""
        repository = self.folder / "model_repository"
        shutil.copytree(shipped_model_repository() / "identity", repository / "identity")
        shutil.copytree(Path(__file__).parent / "models", repository, dirs_exist_ok=True)
        broker = valkey_spec(self.folder, choose_port(0, ""), 8 * 2**30, "everysec")
        grpc, http, metrics = (choose_port(0, "") for _ in range(3))
        triton = triton_spec(self.folder, grpc, http, metrics, lambda _line: None)
        self.broker_url, self.triton = broker.address, triton.address
        self.parts = [Part(broker), Part(triton)]
        await asyncio.gather(*(part.start() for part in self.parts))

    async def grow(self, count: int) -> None:
        """Start workers until there are so many."""
        numbers = range(len(self.workers) + 1, count + 1)
        more = [Part(worker_spec(self.folder, number, broker_of(self.broker_url), self.triton)) for number in numbers]
        self.workers += more
        await asyncio.gather(*(worker.start() for worker in more))

    async def stop(self) -> None:
        """End everything."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        await asyncio.gather(*(part.stop() for part in self.parts))


# -- the straight client ----------------------------------------------------------------------------


async def straight_rate(client: InferenceServerClient, model: Model, concurrency: int, requests: int) -> float:
    """Requests a second, one row each; the answers are checked."""
    answers: list[Any] = [None] * requests
    left = iter(range(requests))

    async def ask() -> None:
        for number in left:
            question = model.questions[number % len(model.questions)]
            tensor = InferInput(model.input, list(question.shape), model.datatype)
            tensor.set_data_from_numpy(question)
            answers[number] = (await client.infer(model.name, [tensor])).as_numpy(model.output)

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(concurrency)))
    elapsed = time.perf_counter() - began
    wrong = sum(
        answer is None or not model.same(model.expected[number % len(model.expected)], answer.tobytes())
        for number, answer in enumerate(answers)
    )
    if wrong:
        raise WrongAnswerError(f"{wrong} of {requests} answers of {model.name} to the straight client are wrong")
    return requests / elapsed


async def straight(servers: Servers, model: Model, seconds: float, most: int) -> Row:
    """The best of some concurrencies."""
    rows = []
    async with InferenceServerClient(servers.triton) as client:
        guess = await straight_rate(client, model, 16, min(most, 128))  # it warms up as well
        guess = await straight_rate(client, model, 64, min(most, max(64, int(guess * seconds / 4))))
        for concurrency in CONCURRENCIES:
            requests = min(most, max(concurrency, int(guess * seconds)))
            with Busy() as busy:
                rate = await straight_rate(client, model, concurrency, requests)
            rows.append(Row(model.name, f"straight client, {concurrency} at once", requests, rate, 1.0, busy.share))
    return max(rows, key=lambda row: row.per_s)


# -- Samphire -----------------------------------------------------------------------------------------


async def publish(servers: Servers, model: Model, count: int) -> dict[str, bytes]:
    """Submit so many tasks; what is expected of each, by its id."""
    expected: dict[str, bytes] = {}
    async with AsyncClient(servers.broker_url) as client:

        async def submit(number: int) -> None:
            question = model.questions[number % len(model.questions)]
            task = await client.submit(model.name, {model.input: question})
            expected[task.id] = model.expected[number % len(model.expected)]

        for begin in range(0, count, SUBMITS_AT_ONCE):
            await asyncio.gather(*(submit(number) for number in range(begin, min(count, begin + SUBMITS_AT_ONCE))))
    return expected


async def drained(servers: Servers, model: Model, count: int, best: float) -> Row:
    """Publish a backlog while the workers stand still, and measure how fast they drain it."""
    queue = f"inference.{model.name}"
    with redis.Redis.from_url(servers.broker_url, socket_timeout=60) as server:
        with standing_still(worker.pid for worker in servers.workers):
            expected = await publish(servers, model, count)
            messages = queued(server, queue)
            assert len(messages) == count
        with Ends(servers.broker_url, stream_of(messages[0])) as ends, Busy() as busy:
            rate = drain_rate(count, lambda: unsettled(server, queue))
        check_ended(server, expected, ends.counted(), model.same)
    workers = len(servers.workers)
    way = f"Samphire, {workers} worker{'s' * (workers > 1)}"
    return Row(model.name, way, count, rate, rate / best, busy.share)


# -- all of it ----------------------------------------------------------------------------------------


async def bench(options: argparse.Namespace) -> list[Row]:
    """All rows; what would begin after the time limit is left out."""
    until = time.monotonic() + options.limit_s
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="samphire-gpu-") as folder:
        servers = Servers(Path(folder))
        try:
            await servers.start()
            best = {}
            for model in MODELS:
                rows.append(await straight(servers, model, options.seconds, options.most))
                best[model.name] = rows[-1].per_s
            for count in options.workers:
                await servers.grow(count)
                for model in MODELS:
                    if time.monotonic() > until:
                        print(f"no time is left for {model.name} with {count} workers", flush=True)
                        continue
                    requests = min(options.most, max(64, int(best[model.name] * options.seconds * 2)))
                    rows.append(await drained(servers, model, requests, best[model.name]))
        finally:
            await servers.stop()
    return sorted(rows, key=lambda row: [model.name for model in MODELS].index(row.model))


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    head = ["model", "", "requests", "requests/s", "of the straight client's best", "GPU busy"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="how many, one after the other")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a straight run is to take")
    parser.add_argument("--most", type=int, default=40_000, help="requests of one run, at most")
    parser.add_argument("--limit-s", type=float, default=170.0, help="nothing begins after so long")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of gpu.json")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("SAMPHIRE_")]:
        del os.environ[name]
    began = time.monotonic()
    rows = asyncio.run(bench(options))
    report = {
        "device": device(),
        "seconds": round(time.monotonic() - began),
        "ratios": {f"{row.model}: {row.way}": round(row.share, 4) for row in rows},
        "rows": [vars(row) for row in rows],
    }
    print(f"{report['device']}, {os.cpu_count()} cores, {report['seconds']} s\n\n{markdown(rows)}\n")
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
