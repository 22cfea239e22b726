"""What is not the caller's fault: a bug of ours, and what the worker is short of."""

from __future__ import annotations

import asyncio
import errno
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from celery import Celery
from redis.exceptions import InvalidResponse

from samphire import AsyncClient, Backoff, Client, InternalError, ModelFaultError
from samphire.errors import SamphireError
from samphire.transport.address import Address, broker_of
from samphire.transport.direct import DirectConnection
from samphire_broker.retry import GiveUp, Retry, RetryPolicy, decide
from samphire_broker.settings import Settings
from samphire_broker.store import Store, WorkerInfo
from samphire_workers.lane.lane import Lane
from samphire_workers.monitoring.celery_events import CeleryEvents
from samphire_workers.monitoring.observers import Observers
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.unexpected import ShortageError, our_error
from samphire_workers.upkeep.lease import keep_lease
from tests.stacks import Up, Valkey, eventually
from tests.support.names import KEYS
from tests.workers import running_worker

TIMEOUT_S = 60


def one(value: float) -> dict[str, Any]:
    return {"input_fp32": np.array([[value]], np.float32)}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        ExceptionGroup("x", [ValueError(), ExceptionGroup("y", [MemoryError()])]),
    ],
)
def test_what_the_worker_is_short_of_is_nobodys_fault(error: Exception) -> None:
    """Whatever it is called."""
    assert isinstance(our_error(error), ShortageError)


def test_what_nobody_expected_is_a_bug_of_ours() -> None:
    """It is tried again, and told from what the caller or the model did; errors of ours stay what they are."""
    for error in (KeyError("x"), ValueError("x"), AssertionError(), RuntimeError("x"), OSError(errno.EPERM, "x")):
        found = our_error(error)
        assert type(found) is InternalError and type(error).__name__ in str(found)
        policy = RetryPolicy(2, Backoff(0))
        assert isinstance(decide(found, 1, float("inf"), policy), Retry)
        assert decide(found, 2, float("inf"), policy) == GiveUp("internal")
    known: SamphireError = ModelFaultError("x")
    assert our_error(known) is known


@contextmanager
def lane_beside(valkey: Valkey, triton_grpc: str) -> Iterator[asyncio.Runner]:
    """A real lane in this process, whose code a test can break, on a broker of its own and the stack's Triton."""
    settings = Settings(broker_url=valkey.url, triton_urls=(triton_grpc,))
    info = WorkerInfo("w1", "w1@host", 1)
    app = Celery("samphire", broker=valkey.url, backend=valkey.url, set_as_current=False)
    app.conf.update(task_serializer="json", result_serializer="json", accept_content=["json"])
    with asyncio.Runner() as runner:

        async def start() -> Callable[[], Awaitable[None]]:
            store, registered = Store(settings, "w1"), asyncio.Event()
            beating = asyncio.create_task(keep_lease(store, settings, info, registered))
            await registered.wait()
            events, watch, canvas = (
                CeleryEvents(app, info.hostname, 0),
                QueueWatch(broker_of(valkey.url)),
                Canvas(app, "w1@host"),
            )
            endpoints = Endpoints((triton_grpc,))
            lane = Lane(settings, store, endpoints, info, Observers(events, now=store.clock.now), watch, canvas)
            running = asyncio.create_task(lane.run())

            async def stop() -> None:
                lane.stop()
                await running
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
                watch.close()
                canvas.close()
                await endpoints.close()
                await store.close()

            return stop

        stop = runner.run(start())
        try:
            yield runner
        finally:
            runner.run(stop())
            app.close()


@pytest.mark.parametrize("where", ["read", "check", "load", "send"])
def test_a_bug_of_ours_is_retried_and_leaves_its_traceback(
    valkey: Valkey, stack: Up, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """Wherever it happens: the caller is not blamed, the neighbours go on."""

    def bug(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyError("a bug in the code")

    def break_it() -> None:
        if where == "read":
            monkeypatch.setattr("samphire_workers.lane.sorting.read", bug)
        elif where == "check":
            monkeypatch.setattr("samphire_workers.intake.checking._form", bug)
        elif where == "load":
            monkeypatch.setattr("samphire_workers.inference.dispatcher.load", bug)
        else:
            monkeypatch.setattr("samphire_workers.inference.batching.merge", bug)

    async def test() -> None:
        async with AsyncClient(valkey.url) as client:
            before = await client.submit("identity", one(1))
            assert (await before.result(TIMEOUT_S)).outputs["output_fp32"].tolist() == [[1]]
            break_it()
            task = await client.submit("identity", one(2), max_attempts=2, backoff=Backoff(0.01))
            if where == "read":  # what it says itself of its attempts is not read: three, within 2 s
                task = await client.submit("identity", one(2))
            with pytest.raises(InternalError, match="a bug in the code"):
                await task.result(TIMEOUT_S)
            letter = await client.dead_letters.get(task.id)
            assert letter.reason == "internal" and len(letter.history) == (3 if where == "read" else 2)
            assert all("in bug" in attempt.traceback for attempt in letter.history)
            monkeypatch.undo()
            assert (await (await client.submit("identity", one(3))).result(TIMEOUT_S)).outputs

    with lane_beside(valkey, stack.triton_grpc) as runner:
        runner.run(test())
    assert "Samphire has a bug" in caplog.text and "in bug" in caplog.text


def test_a_worker_short_of_threads_gives_its_tasks_to_others(stack: Up, valkey: Valkey, tmp_path: Path) -> None:
    """It cannot start a thread any more: no task is blamed, none is stuck with it, and it ends by itself."""
    with running_worker(tmp_path / "short", valkey.url, stack.triton_grpc) as worker, Client(valkey.url) as client:
        client.submit("identity", one(1)).result(TIMEOUT_S)
        process = psutil.Process(worker.process.pid)
        limit = process.memory_info().vms + 6 * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))  # a thread's stack takes 8 MiB
        large = {"input_fp32": np.ones((1, 200_000), np.float32)}  # whose claim check is verified in a thread
        tasks = [client.submit("identity", large) for _ in range(10)]
        eventually(lambda: "can't start new thread" in worker.log() or "MemoryError" in worker.log(), 30, "the fault")
        with running_worker(tmp_path / "well", valkey.url, stack.triton_grpc):
            for task in tasks:
                assert task.result(TIMEOUT_S).outputs["output_fp32"].shape == (1, 200_000)
        assert not valkey.client.zcard(KEYS.dead)


def test_a_reply_without_room_is_a_shortage(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """hiredis says so in an error that redis-py takes for one of the protocol; the connection is opened anew."""

    async def test() -> None:
        connection = DirectConnection(Address.parse(valkey.url))
        await connection.execute("SET", "k", "v")

        async def no_room(*_args: object, **_kwargs: object) -> None:
            raise InvalidResponse("Out of memory")

        assert connection._connection is not None
        monkeypatch.setattr(connection._connection, "read_response", no_room)
        with pytest.raises(MemoryError) as raised:
            await connection.execute("GET", "k")
        assert isinstance(our_error(raised.value), ShortageError)
        assert await connection.execute("GET", "k") == b"v" and connection.opened == 2
        await connection.close()

    asyncio.run(test())


def test_a_worker_that_stays_short_ends(stack: Up, valkey: Valkey, tmp_path: Path) -> None:
    """It lets go of its lease with everything that it holds, and its supervisor is to start another."""
    with running_worker(tmp_path / "short", valkey.url, stack.triton_grpc) as worker, Client(valkey.url) as client:
        client.submit("identity", one(1)).result(TIMEOUT_S)
        process = psutil.Process(worker.process.pid)
        limit = process.memory_info().vms + 6 * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
        large = {"input_fp32": np.ones((1, 200_000), np.float32)}
        tasks = [client.submit("identity", large) for _ in range(60)]
        worker.process.wait(TIMEOUT_S)
        assert worker.process.returncode not in (0, -signal.SIGTERM)
        began = time.monotonic()
        with running_worker(tmp_path / "well", valkey.url, stack.triton_grpc):
            assert all(task.result(TIMEOUT_S).outputs for task in tasks)
        assert not valkey.client.zcard(KEYS.dead), time.monotonic() - began
