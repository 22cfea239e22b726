"""Readers of event logs: slow ones, many at once, those that follow before there is anything, and a redrive."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from samphire import AsyncClient, ClientClosedError, ModelFaultError, TaskEvent
from samphire.client.log_reader import PAGE, PUSHED_MAX, Entry
from tests.proxy import cutting_proxy
from tests.stacks import Valkey
from tests.support.lane import counting, given, held, in_a_loop, last, until, x
from tests.support.names import KEYS
from tests.test_streams import ENDS, streaming


@in_a_loop
async def test_wishes_to_follow_are_bounded_and_harm_nothing(valkey: Valkey) -> None:
    """Junk, ended and unknown tasks; ids over the limit; each wish is served once."""
    async with streaming(valkey, counting(1)) as (triton, _, client):
        triton.models.add("plain")
        task = await client.submit("plain", x())
        await task.result(timeout_s=20)
        for wish in [task.id, "x" * 300, "", "unknown", "unknown", b"\xff\xfe"]:
            valkey.client.rpush(KEYS.follows, wish)
        await until(lambda: not valkey.client.exists(KEYS.follows), "they are served")
        assert not valkey.client.exists(KEYS.log_prefix + task.id)
        assert valkey.client.xlen(KEYS.log_prefix + "unknown") == 1
        assert 0 < valkey.client.ttl(KEYS.log_prefix + "unknown") <= 86_400
        valkey.client.set(KEYS.follows, "of another type")
        again = await client.submit("plain", x())
        await again.result(timeout_s=20)


@in_a_loop
async def test_a_stalled_reader_holds_up_nobody_and_keeps_nothing(valkey: Valkey) -> None:
    """Of 100,000 outputs it gets each one when it asks for it, or a gap, and the end; others are done long before."""
    outputs = 100_000
    async with streaming(valkey, counting(outputs)) as (_, _, client), AsyncClient(valkey.url) as apart:
        task = await client.submit("m", x())
        stalled = apart.task(task.id).events()
        await anext(stalled)
        prompt, late = Told(), Told()
        async with asyncio.timeout(300):  # the stalled one takes no other event before this is done
            async for event in client.task(task.id).events():
                prompt.take(event)
        gc.collect()
        kept = sum(isinstance(thing, Entry) for thing in gc.get_objects())
        there = valkey.client.xlen(KEYS.log_prefix + task.id)
        assert kept <= 2 * (PUSHED_MAX + PAGE) < there / 2
        async for event in stalled:
            late.take(event)
        assert late.gaps <= 1  # nothing was written any more
        for told in (prompt, late):
            assert told.end is not None
            assert told.end.output_count == outputs == told.next


class Told:
    """What a reader was told of one attempt: outputs in order, with a gap wherever one is missing, and the end last."""

    def __init__(self) -> None:
        self.next = self.gaps = 0
        self.end: TaskEvent | None = None
        self._gap: TaskEvent | None = None

    def take(self, event: TaskEvent) -> None:
        """The next event."""
        assert self.end is None
        if self._gap is not None:
            assert event.position == self._gap.earliest
        if event.kind == "output":
            assert event.index is not None
            assert event.index == self.next or (self._gap is not None and event.index > self.next)
            self.next = event.index + 1
        elif event.kind in ENDS:
            self.end = event
        self._gap = event if event.kind == "gap" else None
        self.gaps += event.kind == "gap"


@in_a_loop
async def test_a_stream_is_read_over_its_redrive(valkey: Valkey) -> None:
    """From the beginning on: the first run's end is not the end, and its outputs do not count."""
    fails = True

    async def streams(context: Any) -> AsyncIterator[Any]:
        yield given(0)
        if fails:
            await context.abort(grpc.StatusCode.INTERNAL, "the model raised")
        yield given(1)
        yield last()

    async with streaming(valkey, streams) as (_, _, client):
        task = await client.submit("m", x(), max_attempts=1)
        with pytest.raises(ModelFaultError):
            await task.result(timeout_s=30)
        fails = False
        await client.dead_letters.redrive([task.id])
        seen = [event async for event in client.task(task.id).stream()]
        assert [event.kind for event in seen] == ["output", "restarted", "output", "output"]
        assert seen[-1].run == 2
        assert (await client.task(task.id).result(timeout_s=30)).outputs["y"].ravel().tolist() == [0, 1]


@in_a_loop
async def test_a_client_that_closes_ends_its_readers(valkey: Valkey) -> None:
    """Whoever waits in a stream, or is just reading, gets an error; nobody waits for ever."""
    async with streaming(valkey, held(1, asyncio.Event())) as (_, _, client):
        task = await client.submit("m", x())
        other = AsyncClient(valkey.url)
        streams = [other.task(task.id).stream() for _ in range(5)]
        for stream in streams:
            await anext(stream)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        await other.close()
        async with asyncio.timeout(20):
            ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(error) for error in ended} == {ClientClosedError}


@in_a_loop
async def test_readers_cost_no_connections(valkey: Valkey) -> None:
    """Four hundred readers of two hundred streams wait on as many connections as one; outputs are written meanwhile."""
    hold = asyncio.Event()
    async with (
        streaming(valkey, held(1, hold)) as (_, _, client),
        cutting_proxy(valkey.url) as counted,
        AsyncClient(counted.url) as reader,
    ):
        tasks = [await client.submit("m", x()) for _ in range(200)]
        first = reader.task(tasks[0].id).stream()
        await anext(first)
        before = len(counted.connections)
        assert before > 0
        streams = [reader.task(task.id).stream() for task in tasks for _ in range(2)]
        for stream in streams:
            assert (await anext(stream)).index == 0
        assert len(counted.connections) == before
        hold.set()
        for stream in (*streams, first):
            assert [event.index async for event in stream] == [1]
        assert len(counted.connections) == before
