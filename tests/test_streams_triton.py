"""Streams through the real Triton: ends, cancels, slots, progress, and what dies in the middle."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from samphire import (
    AsyncClient,
    AsyncTask,
    Client,
    EndpointUnavailableError,
    ModelFaultError,
    SamphireError,
    Step,
    Task,
    TaskEvent,
)
from samphire.wire.contract import INFER_TASK
from samphire_workers.triton.calls import GOES_ON_S, Running
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.errors import GivenUpError
from samphire_workers.triton.messages import Tensor, infer_request
from tests.stacks import Up, eventually, only, running_stack, samphire, standing_still
from tests.support.lane import fake_triton, held, in_a_loop
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.test_flower import connect
from tests.test_streams import ENDS


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A stack whose parts may die, with two workers."""
    folder = tmp_path_factory.mktemp("streams")
    settings = {"SAMPHIRE_LEASE_S": "2", "SAMPHIRE_BACKOFF_BASE_S": "0.05", "SAMPHIRE_TRITON_TIMEOUT_S": "10"}
    models = only(folder, "streamer", "token_stream", "normalize_text", "identity")
    with running_stack(folder, *models, "--workers", "2", env=settings) as up:
        with Client(up.broker_url) as client:
            eventually(lambda: client.signature("streamer"), 30, "the catalogue")
        yield up
    for log in (up.data_dir / "logs").glob("worker*.log"):
        # Whatever has ended for its client has ended in its worker, which has nothing to wait for.
        assert "the worker ends before its tasks have" not in log.read_text(), log.read_text()[-5000:]


def plan(**parts: Any) -> dict[str, Any]:
    """Inputs of `streamer`."""
    return {"plan": np.array([json.dumps(parts).encode()], dtype=object)}


async def all_of(task: AsyncTask, timeout_s: float = 120.0) -> list[TaskEvent]:
    """The events of a task, to its end."""
    async with asyncio.timeout(timeout_s):
        return [event async for event in task.events()]


def check_whole(events: list[TaskEvent]) -> None:
    """One end, last, which counts the outputs of its attempt."""
    assert [event for event in events if event.kind in ENDS] == events[-1:]
    outputs = [event for event in events if event.kind == "output" and event.attempt == events[-1].attempt]
    assert events[-1].output_count == len(outputs)
    assert [int(event.outputs["value"][0]) for event in outputs] == list(range(len(outputs)))


@in_a_loop
async def test_the_real_server_ends_streams_in_each_way(own_stack: Up) -> None:
    """The flag alone, on the last output, on the only one, and without any output."""
    async with AsyncClient(own_stack.broker_url) as client:
        for outputs, end in ((3, "alone"), (3, "with_last"), (1, "with_last"), (0, "alone")):
            task = await client.submit("streamer", plan(outputs=outputs, end=end))
            events = await all_of(task)
            assert events[-1].kind == "succeeded"
            assert (await task.result(timeout_s=30)).output_count == outputs
            if outputs:
                check_whole(events)


@in_a_loop
async def test_the_real_server_says_what_went_wrong(own_stack: Up) -> None:
    """A model that raises after three outputs, and one that gives out another type than it says."""
    async with AsyncClient(own_stack.broker_url) as client:
        for wrong, text, count in (
            ({"error_after": 3}, "the model raised", 3),
            ({"wrong_after": 2}, "expected FP32", 2),
        ):
            task = await client.submit("streamer", plan(outputs=5, **wrong), max_attempts=1)
            events = await all_of(task)
            check_whole(events)
            assert events[-1].output_count == count
            with pytest.raises(ModelFaultError, match=text):
                await task.result(timeout_s=30)


@in_a_loop
async def test_progress_is_shown_and_is_no_output(own_stack: Up) -> None:
    """As events, by `progress()`, by the commands, and in Flower in the place of the result."""
    flower = await asyncio.to_thread(connect, own_stack)
    async with AsyncClient(own_stack.broker_url) as client:
        task = await client.submit("streamer", plan(outputs=4, interval_s=3.0, progress=True))
        told, info = [], f"/api/task/info/{task.id}"
        async for event in task.events():
            if event.kind == "progress":
                told.append((event.fraction, event.message))
                last = await task.progress()
                assert last is not None
                assert last.fraction == event.fraction
                if len(told) == 1:
                    shown = await asyncio.to_thread(samphire, own_stack.broker_url, "result", task.id)
                    assert "is running, " in shown.stderr
                    await asyncio.to_thread(
                        eventually, lambda: "% step " in (flower.get(info)[1] or ""), 10, "the progress in Flower"
                    )
        assert told[-1] == (1.0, "step 4")
        assert (await task.result(timeout_s=30)).output_count == 4
        watched = await asyncio.to_thread(samphire, own_stack.broker_url, "watch", task.id)
        assert "running 100% step 4" in watched.stdout


def test_the_command_streams_text(own_stack: Up) -> None:
    """Word by word, whole, and resumable by the position that it prints."""
    text = "A text – word by word, with an “é” in it."
    submitted = samphire(own_stack.broker_url, "submit", "token_stream", "--input", f"text={json.dumps([text])}")
    task_id = submitted.stdout.strip()
    assert samphire(own_stack.broker_url, "watch", task_id, "--stream").stdout.strip() == text
    events = [
        json.loads(line) for line in samphire(own_stack.broker_url, "watch", task_id, "--json").stdout.splitlines()
    ]
    pieces = [event["outputs"]["token"][0] for event in events if event["kind"] == "output"]
    assert "".join(pieces) == text
    rest = samphire(
        own_stack.broker_url, "watch", task_id, "--json", "--after", events[2]["position"]
    ).stdout.splitlines()
    assert [json.loads(line)["position"] for line in rest] == [event["position"] for event in events[3:]]
    bad = samphire(own_stack.broker_url, "watch", task_id, "--after", "12")
    assert bad.returncode == 1
    assert "expected a position" in bad.stderr


def test_a_result_is_there_after_its_stream_was_read(own_stack: Up) -> None:
    """By the same handle, or by another one of the same client, and after a failure too."""
    inputs = {"text": np.array([b"one two"], dtype=object)}
    with Client(own_stack.broker_url) as client:
        for read in (Task.stream, Task.events):
            task, other = client.submit("token_stream", inputs), client.submit("token_stream", inputs)
            assert list(read(task))
            assert task.result(timeout_s=3).output_count == 2
            assert list(read(client.task(other.id)))
            assert other.result(timeout_s=3).output_count == 2
        failing = client.submit("streamer", plan(error_after=1), max_attempts=1)
        with pytest.raises(ModelFaultError):
            list(failing.stream())
        with pytest.raises(ModelFaultError):
            failing.result(timeout_s=3)


def test_a_plain_producer_and_a_chain_get_collected_outputs(own_stack: Up) -> None:
    """Joined along the first dimension; the next step of a chain takes them all."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["one two three"]}
    with plain_celery(own_stack.broker_url) as app:
        sent = app.send_task(INFER_TASK, kwargs={"model_name": "token_stream", "inputs": [tensor]}, queue="inference")
        answer = sent.get(timeout=60)
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs == {"token": ["one", " two", " three"], "index": [0, 1, 2]}
    assert answer["streamed"]["outputs"] == 3
    first = Step("token_stream", {"text": np.array([b"a b"], dtype=object)})
    second = Step("token_stream", {"text": np.array([b"x"], dtype=object), "delay_ms": first["index"]})
    with Client(own_stack.broker_url) as client:
        with pytest.raises(SamphireError, match="shape"):  # two numbers where one is expected: both were handed on
            client.chain(first, second).result(timeout_s=60)
        only_one = Step("token_stream", {"text": np.array([b"a"], dtype=object)})
        last = Step("token_stream", {"text": only_one["token"]})
        assert client.chain(only_one, last).result(timeout_s=60).outputs["token"].tolist() == [b"a"]


@in_a_loop
async def test_a_cancelled_stream_frees_its_slot(own_stack: Up, tmp_path: Path) -> None:
    """An engine with two slots, both full: one is cancelled, and a third begins within one output's time."""
    log = tmp_path / "log"
    async with AsyncClient(own_stack.broker_url) as client:

        def held(name: str) -> dict[str, Any]:
            return plan(outputs=10_000, interval_s=0.1, slots=True, log=str(log), name=name)

        full = [await client.submit("streamer", held(name)) for name in ("a", "b")]
        streams = [task.stream() for task in full]
        for stream in streams:
            await anext(stream)
        waiting = await client.submit("streamer", held("c"))
        third = waiting.stream()
        assert await full[0].cancel()
        async with asyncio.timeout(30):
            assert (await anext(third)).kind == "output"
        await full[1].cancel()
        await waiting.cancel()
        for task in (*full, waiting):
            events = await all_of(client.task(task.id))
            check_whole(events)
            assert events[-1].kind == "cancelled"
        await asyncio.to_thread(eventually, lambda: log.read_text().count("cancelled") == 3, 10, "the model's word")
        lines = [line.split()[:2] for line in log.read_text().splitlines()]
        assert lines.index(["a", "cancelled"]) < lines.index(["c", "begin"])
        for stream in (*streams, third):
            await stream.aclose()


@in_a_loop
async def test_random_cancels_and_short_deadlines(own_stack: Up, tmp_path: Path) -> None:
    """Before the call, while it opens, in the middle: each task has one end, and nothing runs on at the model.

    Nor in the workers, as `own_stack` sees to at its end.
    """
    log = tmp_path / "log"
    chance = random.Random(7)
    async with AsyncClient(own_stack.broker_url) as client:

        async def one(number: int) -> None:
            parts = plan(outputs=1000, interval_s=0.02, log=str(log), name=str(number))
            deadline_s = 0.002 * chance.randint(1, 40) if number % 4 == 0 else None
            task = await client.submit("streamer", parts, deadline_s=deadline_s, max_attempts=1)
            await asyncio.sleep(chance.random() * 0.2)
            if deadline_s is None:
                await task.cancel(timeout_s=60)
            events = await all_of(client.task(task.id))
            assert [event.kind for event in events if event.kind in ENDS] == [events[-1].kind]
            expected = {"cancelled"} if deadline_s is None else {"failed", "expired"}
            assert events[-1].kind in expected

        for _ in range(4):
            await asyncio.gather(*(one(number) for number in range(25)))
        await asyncio.to_thread(eventually, lambda: not _running(log), 10, "the end of all at the model")
        assert " end " not in log.read_text()  # none ran to its own end


@in_a_loop
async def test_kill_9_of_a_worker_and_of_triton_mid_stream(own_stack: Up) -> None:
    """The reader sees what happened, and every stream ends whole."""
    async with AsyncClient(own_stack.broker_url) as client:
        for victim in ("worker", "triton"):
            tasks = [await client.submit("streamer", plan(outputs=100, interval_s=0.1)) for _ in range(6)]
            reading = [asyncio.create_task(all_of(task)) for task in tasks]
            first = tasks[0].stream()
            await anext(first)
            await first.aclose()
            is_worker = victim == "worker"
            writer = await asyncio.to_thread(_writer_of, own_stack, tasks[0].id)
            pid = writer if is_worker else own_stack.ready["pids"][victim]
            psutil.Process(pid).kill()
            everything = await asyncio.gather(*reading)
            for events in everything:
                check_whole(events)
                assert events[-1].kind == "succeeded"
                assert events[-1].output_count == 100
            assert any(events[-1].attempt > 1 for events in everything), (victim, pid, own_stack.worker_log()[-3000:])
            await asyncio.to_thread(
                eventually,
                lambda pid=pid: pid not in _pids(own_stack) and len(_pids(own_stack)) == 5,
                60,
                "the restart",
            )


@in_a_loop
async def test_streams_of_a_server_that_hangs_are_cancelled_once_it_goes_on(own_stack: Up, tmp_path: Path) -> None:
    """Not before, since Triton may die of it; whoever waits is told at once, also who held an output meanwhile."""
    log = tmp_path / "log"
    endpoint = Endpoint(own_stack.triton_grpc)
    streams = []
    for number in range(3):
        wanted = json.dumps({"outputs": 3000, "interval_s": 0.1, "log": str(log), "name": str(number)}).encode()
        tensor = Tensor("plan", "BYTES", [1], len(wanted).to_bytes(4, "little") + wanted)
        streams.append(endpoint.stream(infer_request("streamer", "", [tensor], [], {}), inf, 60, Running()))
        await anext(streams[-1])
    waiting = asyncio.create_task(anext(streams[0]))
    with standing_still(own_stack.ready["pids"]["triton"]):
        while not endpoint.is_silent:
            await endpoint.is_ready()
            if waiting.done():  # what had come before
                waiting = asyncio.create_task(anext(streams[0]))
        endpoint.give_up_all(GivenUpError("nobody waits for it"))
        with pytest.raises(GivenUpError):
            await waiting
        with pytest.raises(GivenUpError):
            while True:
                await anext(streams[1])
        goes_on = time.time()
    await asyncio.to_thread(eventually, lambda: log.read_text().count("cancelled") >= 2, 30, "their ends at the model")
    assert endpoint.is_silent
    cancelled = [float(line.split()[2]) for line in log.read_text().splitlines() if "cancelled" in line]
    assert min(cancelled) > goes_on + GOES_ON_S / 2
    await streams[2].aclose()
    await endpoint.close()


@pytest.mark.parametrize(("give_up", "quiet_s"), [(Running.stop, 0.0), (Running.stop, 0.1), (Running.leave, 0.1)])
@in_a_loop
async def test_a_stream_that_is_given_up_while_it_connects_ends(
    give_up: Callable[[Running, SamphireError], None], quiet_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of its start, and when a connection stands; the server takes it, and says nothing."""
    monkeypatch.setattr("samphire_workers.triton.calls.QUIET_S", quiet_s)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for steps in range(8):
            running = Running()
            async with asking(f"127.0.0.1:{silent.getsockname()[1]}", running) as reading:
                for _ in range(steps):
                    await asyncio.sleep(0)
                give_up(running, GivenUpError("nobody waits for it"))
                done, _ = await asyncio.wait({reading}, timeout=30)
                assert done, steps
                with pytest.raises(GivenUpError, match="nobody waits"):
                    await reading


@in_a_loop
async def test_a_request_that_grpc_gives_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cancels the call itself then: nobody has cancelled the task that waits for it.

    The server is a stand-in: a Triton may have answered before.
    """

    async def fails(_: object) -> None:
        raise RuntimeError("as where the connection breaks just then")

    monkeypatch.setattr("grpc.aio._call.StreamStreamCall._done_writing", fails)
    async with fake_triton("streamer") as triton:
        triton.streams["streamer"] = held(asyncio.Event())
        async with asking(triton.address, Running()) as reading:
            with pytest.raises(EndpointUnavailableError, match="gRPC has given up the request"):
                await reading


@in_a_loop
async def test_a_task_that_is_cancelled_with_its_stream_is_cancelled() -> None:
    """Though somebody has just stopped the stream: a lane that ends is not held up by it."""
    running = Running()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with asking(f"127.0.0.1:{silent.getsockname()[1]}", running) as reading:
            await asyncio.sleep(0)
            running.stop(GivenUpError("nobody waits for it"))
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading


@asynccontextmanager
async def asking(url: str, running: Running) -> AsyncIterator[asyncio.Task[list[Tensor]]]:
    """The wait for the first output of a stream that is asked for without a worker."""
    endpoint = Endpoint(url)
    stream = endpoint.stream(infer_request("streamer", "", [], [], {}), inf, 60, running)
    try:
        yield asyncio.create_task(anext(stream))
    finally:
        await endpoint.close()


def _running(log: Path) -> set[str]:
    """Names of the requests that have begun at the model, and not ended.

    Triton 24.10 may die of a cancellation: what ran in a process that is gone runs no more.
    """
    counted: Counter[tuple[str, str]] = Counter()
    for name, what, _, pid in [line.split() for line in log.read_text().splitlines()]:
        counted[name, pid] += 1 if what == "begin" else -1
    return {name for (name, pid), count in counted.items() if count and psutil.pid_exists(int(pid))}


def _pids(up: Up) -> list[int]:
    return [pid for part in up.ready["pids"].values() for pid in (part if isinstance(part, list) else [part])]


@in_a_loop
async def test_a_worker_that_stood_still_writes_nothing_more(own_stack: Up) -> None:
    """Stopped mid-stream, taken for lost, and going on afterwards: the second attempt is whole, and the last."""
    async with AsyncClient(own_stack.broker_url) as client:
        task = await client.submit("streamer", plan(outputs=60, interval_s=0.1))
        seen: list[TaskEvent] = []
        was_stopped = False
        with ExitStack() as stopped:
            async with asyncio.timeout(120):
                async for event in task.events():
                    seen.append(event)
                    if event.kind == "output" and not was_stopped:
                        holder = await asyncio.to_thread(_writer_of, own_stack, task.id)
                        stopped.enter_context(standing_still(holder))
                        was_stopped = True
                    if event.kind == "started" and event.attempt == 2:
                        stopped.close()
        assert was_stopped
        check_whole(seen)
        assert seen[-1].kind == "succeeded"
        assert seen[-1].attempt >= 2
        attempts = [event.attempt for event in seen if event.kind == "output"]
        assert attempts == sorted(attempts)


def _writer_of(up: Up, task_id: str) -> int:
    """Process id of the worker whose claim writes a task's log."""
    with up.redis() as client:
        state = client.hget(KEYS.logs, task_id)
        assert state is not None
        worker = state.split(b" ", 5)[5].partition(b"|")[0].decode()
        info = client.get(f"{KEYS.worker_prefix}{worker}:info")
        assert info is not None
        return int(json.loads(info)["pid"])
