"""Connections that the broker, or a router on the way, has closed because nothing was sent on them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from samphire import AsyncClient, AsyncTask, BrokerUnavailableError, ModelFaultError
from tests.stacks import Valkey
from tests.support.lane import broken, fake_triton, lane_worker, x


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def close_all(valkey: Valkey, sdk: AsyncClient) -> None:
    """Close what the client has open, as `timeout` of redis.conf does; and the proof that something was."""
    session = sdk._session
    ours = set()
    for connection in (session.publisher.connection, session.waiter._reads):
        stream = connection._connection
        if stream is not None:
            ours.add("{}:{}".format(*stream._writer.get_extra_info("sockname")))  # type: ignore[union-attr]
    killed = [found for found in valkey.client.client_list() if found["addr"] in ours]
    for found in killed:
        valkey.client.client_kill_filter(_id=found["id"])
    assert killed, "an open connection"


async def answer(task: AsyncTask) -> float:
    return float((await task.result(20)).outputs["y"][0, 0])


def test_every_call_goes_on_over_a_closed_connection(valkey: Valkey) -> None:
    """Once more on a fresh one, at once: nothing is raised, and nothing is done twice."""

    async def test() -> None:
        async with (
            fake_triton("m") as triton,
            lane_worker(valkey.url, triton, inline_output_bytes=0) as worker,
            AsyncClient(valkey.url) as sdk,
        ):
            await worker.endpoints.some_ready.wait()
            ended = await sdk.submit("m", x())
            assert await answer(ended) == 2
            triton.behave["m"] = broken
            failed = await sdk.submit("m", x(), max_attempts=1)
            with pytest.raises(ModelFaultError):
                await failed.result(20)
            del triton.behave["m"]
            later = await sdk.submit("m", x(), delay_s=600)
            while await later.status() != "scheduled" or await sdk.signature("m") is None:
                await asyncio.sleep(0.01)

            async def submit() -> float:
                return await answer(await sdk.submit("m", {"x": np.full((1, 1), 7, np.float32)}))

            async def delayed() -> float:
                sdk._session.clock._looked_at = 0.0  # it is asked again
                return await answer(await sdk.submit("m", x(), delay_s=0.01))

            calls: dict[str, tuple[Callable[[], Awaitable[Any]], Any]] = {
                "status": (ended.status, "succeeded"),
                "status of another": (later.status, "scheduled"),
                "signature": (lambda: sdk.signature("m"), None),
                "letters": (lambda: sdk.dead_letters.list(), None),
                "a letter": (lambda: sdk.dead_letters.get(failed.id), None),
                "result": (lambda: answer(sdk.task(ended.id)), 2.0),
                "submit": (submit, 8.0),
                "delayed": (delayed, 2.0),
                "cancel": (later.cancel, True),
                "redrive": (lambda: sdk.dead_letters.redrive([failed.id]), 1),
            }
            for name, (call, expected) in calls.items():
                sdk._session.catalogue._known.clear()
                close_all(valkey, sdk)
                found = await call()
                assert found is not None and (expected is None or found == expected), name
            assert triton.values.count(7) == 1, "queued once"
            assert await answer(failed) == 2

    run(test)


def test_a_signature_is_not_none_because_the_broker_is_away() -> None:
    """None means that no worker has told."""

    async def test() -> None:
        async with AsyncClient("redis://127.0.0.1:1/0") as sdk:
            with pytest.raises(BrokerUnavailableError):
                await sdk.signature("m")

    run(test)
