"""Streams from a model to their readers, through a real lane and broker; only Triton is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from samphire import (
    AsyncClient,
    AsyncTask,
    EndpointTimeoutError,
    InvalidInputError,
    ModelFaultError,
    ResultExpiredError,
    StreamDiffersError,
    TaskCancelledError,
    TaskEvent,
)
from samphire.wire.positions import ATTEMPTS
from samphire_broker.store import Appended, LogEntry, Store
from tests.stacks import Valkey
from tests.support.lane import (
    FakeTriton,
    LaneWorker,
    Streams,
    counting,
    fake_triton,
    given,
    in_a_loop,
    lane_worker,
    last,
    until,
    x,
)
from tests.support.names import KEYS

ENDS = ("succeeded", "failed", "cancelled", "expired")


@asynccontextmanager
async def streaming(
    valkey: Valkey, streams: Streams, **settings: Any
) -> AsyncIterator[tuple[FakeTriton, LaneWorker, AsyncClient]]:
    """A lane, a client, and a model that streams."""
    async with fake_triton("m") as triton:
        triton.streams["m"] = streams
        quick = {"backoff_base_s": 0.01, "backoff_cap_s": 0.02, "lease_s": 2.0} | settings
        async with lane_worker(valkey.url, triton, **quick) as worker, AsyncClient(valkey.url) as client:
            yield triton, worker, client


async def all_of(task: AsyncTask, after: str | None = None, timeout_s: float = 60.0) -> list[TaskEvent]:
    """The events of a task, to its end."""
    async with asyncio.timeout(timeout_s):
        return [event async for event in task.events(after)]


async def all_outputs(stream: AsyncIterator[TaskEvent]) -> list[TaskEvent]:
    """What a stream gives, to its end."""
    return [event async for event in stream]


def values(events: list[TaskEvent]) -> list[float]:
    """The numbers that the outputs have."""
    return [float(event.outputs["y"].ravel()[0]) for event in events if event.kind == "output"]


def check_whole(events: list[TaskEvent]) -> None:
    """Exactly one end, which is the last and tells how many outputs the last attempt has given out."""
    ends = [event for event in events if event.kind in ENDS]
    assert ends == events[-1:]
    attempt = (events[-1].run, events[-1].attempt)
    given_out = [event for event in events if event.kind == "output" and (event.run, event.attempt) == attempt]
    assert events[-1].output_count == len(given_out)
    assert events[-1].output_bytes == sum(event.outputs["y"].nbytes for event in given_out)
    assert [event.index for event in given_out] == list(range(len(given_out)))


def ending_with_the_last(outputs: int) -> Streams:
    """A model that marks its last output as the end."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        for number in range(outputs):
            yield given(number, final=number == outputs - 1)

    return streams


@pytest.mark.parametrize(
    ("streams", "count"),
    [
        (counting(3), 3),
        (ending_with_the_last(3), 3),
        (counting(0), 0),
        (ending_with_the_last(1), 1),
        (counting(12), 12),
    ],
)
@in_a_loop
async def test_each_way_to_end_a_stream_is_one_success(valkey: Valkey, streams: Streams, count: int) -> None:
    """The flag stands on the last output, alone, or on the only one; the empty final answer is no output."""
    async with streaming(valkey, streams) as (_, _, client):
        task = await client.submit("m", x())
        events = await all_of(task)
        assert values(events) == list(range(count))
        assert events[-1].kind == "succeeded"
        result = await task.result(timeout_s=20)
        assert result.output_count == count
        assert [value for output in result.outputs.values() for value in output.ravel()] == list(range(count))
        if count:
            check_whole(events)


@pytest.mark.parametrize("count", [0, 2])
@in_a_loop
async def test_a_stream_without_a_final_response_is_no_success(valkey: Valkey, count: int) -> None:
    """A server that goes away in the middle leaves a partial text: that is tried again, and fails."""
    async with streaming(valkey, counting(count, end=False)) as (triton, _, client):
        task = await client.submit("m", x(), max_attempts=2)
        with pytest.raises(ModelFaultError, match="ended without a final response"):
            await task.result(timeout_s=30)
        assert len(triton.asked) == 2
        events = await all_of(client.task(task.id))
        assert events[-1].kind == "failed"
        if count:
            check_whole(events)
            assert [event.kind for event in events].count("retrying") == 1


@pytest.mark.parametrize("by_status", [False, True])
@in_a_loop
async def test_an_error_after_three_outputs(valkey: Valkey, by_status: bool) -> None:
    """Older servers put the error into a response and keep the call open; newer ones close it with a status."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        for number in range(3):
            yield given(number)
        if by_status:
            await context.abort(grpc.StatusCode.INTERNAL, "the model raised")
        yield service_pb2.ModelStreamInferResponse(error_message="the model raised")
        await asyncio.sleep(600)

    async with streaming(valkey, streams) as (triton, worker, client):
        task = await client.submit("m", x(), max_attempts=1)
        events = await all_of(task)
        assert values(events) == [0, 1, 2]
        assert events[-1].kind == "failed"
        check_whole(events)
        with pytest.raises(ModelFaultError, match="the model raised"):
            await task.result(timeout_s=20)
        await until(lambda: not worker.lane.requests(), "the slot is free again")
        if not by_status:
            await until(lambda: triton.cancelled, "the call is closed")


@in_a_loop
async def test_an_output_that_does_not_fit_ends_the_stream(valkey: Valkey) -> None:
    """What came before it stands; the error says what was expected and what was given."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        yield given(0)
        yield given(1)  # alike: it is not checked again
        wrong = given(2)
        wrong.infer_response.outputs[0].datatype = "INT64"
        yield wrong
        yield last()

    async with streaming(valkey, streams) as (_, _, client):
        task = await client.submit("m", x(), max_attempts=1)
        events = await all_of(task)
        assert values(events) == [0, 1]
        check_whole(events)
        with pytest.raises(ModelFaultError, match="expected FP32, answered INT64"):
            await task.result(timeout_s=20)


def failing_once(outputs: int, then: Callable[[int], float] = float) -> Streams:
    """A model that raises after some outputs the first time, and then gives out one more than that."""
    tries: list[int] = []

    async def streams(context: Any) -> AsyncIterator[Any]:
        tries.append(1)
        for number in range(outputs):
            yield given(number if len(tries) == 1 else then(number))
        if len(tries) == 1:
            await context.abort(grpc.StatusCode.INTERNAL, "the model raised")
        yield given(outputs)
        yield last()

    return streams


@in_a_loop
async def test_another_attempt_begins_anew_and_says_so(valkey: Valkey) -> None:
    """A reader gets `restarted` before the first output of the second attempt, and both are marked."""
    async with streaming(valkey, failing_once(2)) as (_, _, client):
        task = await client.submit("m", x())
        seen = [event async for event in task.stream()]
        assert [event.kind for event in seen] == ["output"] * 2 + ["restarted"] + ["output"] * 3
        assert seen[2].begins_anew
        assert [event.attempt for event in seen] == [1, 1, 2, 2, 2, 2]
        check_whole(await all_of(client.task(task.id)))
        assert (await task.result(timeout_s=20)).outputs["y"].ravel().tolist() == [0, 1, 2]
        # Who goes on after a position of the first attempt is told as well.
        resumed = [event.kind async for event in client.task(task.id).stream(seen[0].position)]
        assert resumed == ["output", "restarted", "output", "output", "output"]


@in_a_loop
async def test_a_deterministic_model_goes_on_where_it_was(valkey: Valkey) -> None:
    """`resume="skip"`: what was given out already is left out, here and by a reader that comes back."""
    async with streaming(valkey, failing_once(2)) as (_, _, client):
        task = await client.submit("m", x())
        seen = [event async for event in task.stream(resume="skip")]
        assert values(seen) == [0, 1, 2]
        assert [event.kind for event in seen] == ["output"] * 3
        resumed = [event async for event in client.task(task.id).stream(seen[0].position, resume="skip")]
        assert values(resumed) == [1, 2]
        key = KEYS.log_prefix + task.id
        starts = [entry for entry, fields in valkey.client.xrange(key) if fields[b"e"] in (b"started", b"retrying")]
        valkey.client.xtrim(key, minid=starts[1], approximate=False)  # the first attempt's outputs are gone
        with pytest.raises(StreamDiffersError, match="cannot be compared"):
            await all_outputs(client.task(task.id).stream(seen[1].position, resume="skip"))


@in_a_loop
async def test_other_outputs_are_no_continuation(valkey: Valkey) -> None:
    """`resume="skip"` with a model that gives out something else is an error, and nothing is spliced."""
    async with streaming(valkey, failing_once(2, then=lambda number: number + 10)) as (_, _, client):
        task = await client.submit("m", x())
        seen: list[TaskEvent] = []
        with pytest.raises(StreamDiffersError, match="output 0 is not what it was"):
            async for event in task.stream(resume="skip"):
                seen.append(event)
        assert values(seen) == [0, 1]


def endless(interval_s: float = 0.01) -> Streams:
    """A model that never stops."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        number = 0
        while True:
            yield given(number)
            number += 1
            await asyncio.sleep(interval_s)

    return streams


@in_a_loop
async def test_a_cancelled_stream_stops_at_the_model_and_has_one_end(valkey: Valkey) -> None:
    """Cancelled by another client, through a handle of its own; what was given out until then is there, and whole."""
    async with streaming(valkey, endless()) as (triton, _, client), AsyncClient(valkey.url) as other:
        task = await client.submit("m", x())
        stream = task.stream()
        assert (await anext(stream)).kind == "output"
        assert await other.task(task.id).cancel()
        with pytest.raises(TaskCancelledError):
            async for _ in stream:
                pass
        await until(lambda: triton.cancelled, "the call is cancelled")
        check_whole(await all_of(client.task(task.id)))


@in_a_loop
async def test_a_reader_that_leaves_stops_nothing(valkey: Valkey) -> None:
    """Who breaks off leaves the task running; who breaks off at its end finds it succeeded."""
    go_on = asyncio.Event()

    async def streams(context: Any) -> AsyncIterator[Any]:
        yield given(0)
        await go_on.wait()
        yield given(1)
        yield last()

    async with streaming(valkey, streams) as (triton, _, client):
        task = await client.submit("m", x())
        async for _ in task.stream():
            break
        assert await task.status() == "running"
        go_on.set()
        async for event in task.events():
            if event.kind in ENDS:
                break
        assert await task.status() == "succeeded"
        assert not triton.cancelled


@in_a_loop
async def test_deadline_and_silence_end_a_stream(valkey: Valkey) -> None:
    """A deadline ends it while outputs come; a model that gives out nothing for too long is given up."""
    async with streaming(valkey, endless(), triton_timeout_s=0.5) as (triton, _, client):
        task = await client.submit("m", x(), deadline_s=1.5)
        with pytest.raises(EndpointTimeoutError, match="deadline"):
            await task.result(timeout_s=20)
        events = await all_of(client.task(task.id))
        assert len(values(events)) > 50  # for longer than the limit of a call
        check_whole(events)

        async def silent(context: Any) -> AsyncIterator[Any]:
            yield given(0)
            await asyncio.sleep(600)

        triton.streams["m"] = silent
        task = await client.submit("m", x(), max_attempts=1)
        with pytest.raises(EndpointTimeoutError, match=r"nothing for 0\.5 s"):
            await task.result(timeout_s=20)
        check_whole(await all_of(client.task(task.id)))


@pytest.mark.parametrize("limits", [{"stream_max_outputs": 20}, {"stream_max_bytes": 1024}])
@in_a_loop
async def test_a_model_that_never_stops_is_bounded(valkey: Valkey, limits: dict[str, Any]) -> None:
    """By outputs and by bytes; the error names the setting, and it is not tried again."""
    async with streaming(valkey, endless(0.0), **limits) as (triton, _, client):
        task = await client.submit("m", x())
        with pytest.raises(ModelFaultError, match="SAMPHIRE_STREAM_MAX"):
            await task.result(timeout_s=20)
        assert len(triton.asked) == 1
        events = await all_of(client.task(task.id))
        assert len(values(events)) == (20 if "stream_max_outputs" in limits else 256)
        check_whole(events)


@in_a_loop
async def test_a_lost_worker_mid_stream_is_followed_by_another(valkey: Valkey) -> None:
    """The reader sees that the task went back, began again, and ended; nothing of the first attempt comes after."""
    hold = asyncio.Event()
    tries: list[int] = []

    async def streams(context: Any) -> AsyncIterator[Any]:
        tries.append(1)
        yield given(0)
        yield given(1)
        if len(tries) == 1:
            await hold.wait()
        yield last()

    async with streaming(valkey, streams) as (triton, worker, client):
        task = await client.submit("m", x())
        events: list[TaskEvent] = []
        async with lane_worker(valkey.url, triton, lease_s=2.0), asyncio.timeout(60):
            async for event in task.events():
                events.append(event)
                if event.kind == "output" and event.index == 1 and event.attempt == 1:
                    await worker.down()
        check_whole(events)
        kinds = [event.kind for event in events if event.kind != "snapshot"]
        assert kinds == ["started", "output", "output", "queued", "started", "output", "output", "succeeded"]
        assert events[-1].attempt == 2


def _positions(events: list[TaskEvent]) -> list[str]:
    return [event.position for event in events if event.kind != "snapshot"]


@in_a_loop
async def test_all_attempts_used_up_is_an_end_for_every_reader(valkey: Valkey) -> None:
    """Two readers, one of which came back from a position: both see the end.

    What a task is doing when a reader begins is told to that reader: a snapshot is not compared.
    """
    async with streaming(valkey, counting(2, end=False)) as (_, _, client):
        task = await client.submit("m", x(), max_attempts=2)
        first = await all_of(task)
        check_whole(first)
        assert first[-1].kind == "failed"
        for number, event in enumerate(first, 1):
            rest = await all_of(client.task(task.id), event.position)
            assert _positions(rest) == _positions(first[number:])


@in_a_loop
async def test_a_result_collects_where_that_is_asked_for(valkey: Valkey) -> None:
    """`collect` keeps all outputs in the result, also once the log is gone; without, the error says what to do."""
    async with streaming(valkey, counting(4)) as (_, _, client):
        kept = await client.submit("m", x(), collect=True)
        read = await client.submit("m", x())
        for task in (kept, read):
            assert (await task.result(timeout_s=20)).outputs["y"].ravel().tolist() == [0, 1, 2, 3]
            valkey.client.delete(KEYS.log_prefix + task.id)
        assert (await kept.result(timeout_s=20)).outputs["y"].ravel().tolist() == [0, 1, 2, 3]
        with pytest.raises(ResultExpiredError, match="collect=True"):
            await read.result(timeout_s=20)
        mapped = [result async for result in client.map("m", [x(), x()])]
        assert [result.outputs["y"].ravel().tolist() for result in mapped] == [[0, 1, 2, 3]] * 2


@in_a_loop
async def test_outputs_that_cannot_be_joined(valkey: Valkey) -> None:
    """Shapes that differ beyond the first dimension can be streamed, and not collected."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        yield given(0, size=2)
        yield given(1, size=3)
        yield last()

    async with streaming(valkey, streams) as (triton, _, client):
        triton.widths["m"] = -1
        read = await client.submit("m", x())
        assert [event.outputs["y"].shape async for event in read.stream()] == [(1, 2), (1, 3)]
        with pytest.raises(InvalidInputError, match="cannot be joined"):
            await read.result(timeout_s=20)
        task = await client.submit("m", x(), collect=True)
        with pytest.raises(InvalidInputError, match="cannot be collected"):
            await task.result(timeout_s=20)


@in_a_loop
async def test_large_outputs_are_claim_checks(valkey: Valkey) -> None:
    """They are in the log by reference, and whole for the reader."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        yield given(1, size=20_000)
        yield given(2, size=1)
        yield last()

    async with streaming(valkey, streams) as (triton, _, client):
        triton.widths["m"] = -1
        task = await client.submit("m", x())
        assert [event.outputs["y"].shape async for event in task.stream()] == [(1, 20_000), (1, 1)]
        assert (
            sum(len(v) for _, fields in valkey.client.xrange(KEYS.log_prefix + task.id) for v in fields.values()) < 2000
        )


@in_a_loop
async def test_many_streams_go_on_side_by_side(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the setting says, the next when one has ended; a slow broker's entries are shared, nothing is lost."""
    under_way = most = 0
    all_places_are_taken = asyncio.Event()

    async def streams(context: Any) -> AsyncIterator[Any]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == 20:
            all_places_are_taken.set()
        await all_places_are_taken.wait()
        for number in range(50):
            yield given(number)
            await asyncio.sleep(0.001)
        under_way -= 1
        yield last()

    append = Store.append

    async def slowly(store: Store, entries: Sequence[LogEntry]) -> list[Appended]:
        await asyncio.sleep(0.05)
        return await append(store, entries)

    monkeypatch.setattr(Store, "append", slowly)
    async with streaming(valkey, streams, streams_per_model=20) as (_, _, client):
        tasks = [await client.submit("m", x()) for _ in range(60)]
        everything = await asyncio.gather(*(all_of(task) for task in tasks))
        for events in everything:
            assert values(events) == list(range(50))
            check_whole(events)
        assert most == 20
        entries = sum(valkey.client.xlen(KEYS.log_prefix + task.id) for task in tasks)
        assert entries < 60 * 50


@in_a_loop
async def test_places_are_in_the_order_of_numbers(valkey: Valkey) -> None:
    """Position 9 comes before 10, and a run's attempt before its next."""
    async with streaming(valkey, counting(25)) as (_, _, client):
        task = await client.submit("m", x())
        events = await all_of(task)
        for number in (8, 9, 10, 11):
            rest = await all_of(client.task(task.id), events[number].position)
            assert [e.seq for e in rest] == [e.seq for e in events[number + 1 :]]
        ids = [entry.decode().split("-") for entry, _ in valkey.client.xrange(KEYS.log_prefix + task.id)]
        assert all(int(major) // ATTEMPTS == 1 for major, _ in ids)
