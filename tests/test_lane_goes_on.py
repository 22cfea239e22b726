"""What must not end a lane, or let a task wait for ever: with the real lane and SDK and a stand-in for Triton."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from samphire import AsyncClient, EndpointTimeoutError, ResultTimeoutError
from tests.stacks import Valkey
from tests.support.lane import LaneWorker, body, fake_triton, lane_worker, remember, until, x
from tests.support.names import KEYS

HALF = "\ud800"
"""Half a surrogate pair: JSON may say it, and UTF-8 cannot."""


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def message(headers: dict[str, Any], embed: dict[str, Any], correlation_id: str = "c") -> str:
    """As kombu writes it without base64."""
    coded = json.dumps([[], body("one"), embed])
    properties = {"correlation_id": correlation_id}
    return json.dumps(
        {
            "body": coded,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"task": "samphire.infer", **headers},
            "properties": properties,
        }
    )


@pytest.mark.parametrize(
    ("headers", "embed"),
    [
        ({"id": HALF}, {}),
        ({"id": f"a{HALF}"}, {"chord": {"task": "body"}}),
        ({"id": "a", "group": HALF}, {"chord": {"task": HALF}}),
        ({"id": "a", "root_id": HALF, "retries": 10**30}, {"chain": [{"task": HALF, "options": {HALF: HALF}}]}),
        ({"id": "a", "stamps": {HALF: HALF}, "stamped_headers": [HALF]}, {"errbacks": [HALF]}),
    ],
)
def test_text_that_is_no_utf_8(valkey: Valkey, headers: dict[str, Any], embed: dict[str, Any]) -> None:
    """It becomes a dead letter; its neighbours are answered by the same lane."""

    async def test() -> None:
        async with (
            fake_triton("one") as triton,
            AsyncClient(valkey.url, validate=False) as sdk,
            lane_worker(valkey.url, triton) as worker,
        ):
            for correlation_id in ("c", HALF):
                valkey.client.lpush("inference.one", message(headers, embed, correlation_id))
            assert (await (await sdk.submit("one", x(1))).result(20)).outputs["y"].tolist() == [[2.0]]
            await until(lambda: valkey.client.zcard(KEYS.dead), "a letter")
            await until(lambda: not valkey.client.hlen(f"samphire:worker:{worker.info.id}:inflight"), "the end of both")
            assert not any(task.done() for task in worker.tasks)

    run(test)


def test_who_gives_up_while_a_suspect_is_alone_holds_up_no_other_suspect(valkey: Valkey) -> None:
    """A member of a micro-batch that waits at the lock ends there; the next suspect does not wait for it."""

    async def test() -> None:
        async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as sdk:
            answer, claiming = asyncio.Event(), asyncio.Event()

            async def hold(_context: Any) -> None:
                await answer.wait()

            async def suspect(number: int) -> Any:
                claiming.clear()
                task = await sdk.submit("one", x(number))
                remember(valkey.client, task.id, attempts=2, crashes=2)
                claiming.set()
                return task

            triton.behave["one"] = hold
            worker = LaneWorker(valkey.url, triton)
            claim = worker.store.claim

            async def claim_when_told(*args: Any) -> Any:
                await claiming.wait()
                return await claim(*args)

            worker.store.claim = claim_when_told  # type: ignore[method-assign]
            await worker.up()
            first = await suspect(1)
            await until(lambda: triton.asked, "the suspect at Triton")
            claiming.clear()
            await asyncio.sleep(0.5)  # a claim that is under way is done
            impatient = await sdk.submit("one", x(2), deadline_s=5)
            patient = await sdk.submit("one", x(3))
            claiming.set()
            with pytest.raises(EndpointTimeoutError):
                await impatient.result(20)
            answer.set()
            assert (await first.result(20)).outputs["y"].tolist() == [[2.0]]
            assert (await patient.result(20)).outputs["y"].tolist() == [[4.0]]
            assert triton.values == [1.0, 2.0, 3.0], "the two were in one micro-batch"
            second = await suspect(4)
            assert (await second.result(20)).outputs["y"].tolist() == [[5.0]]
            await worker.down()

    run(test)


def test_a_cancel_that_cannot_be_looked_for(valkey: Valkey) -> None:
    """Somebody's key lies where the names of queues belong: the wish waits, and the lane goes on."""

    async def test() -> None:
        async with (
            fake_triton("one") as triton,
            AsyncClient(valkey.url, validate=False) as sdk,
            lane_worker(valkey.url, triton) as worker,
        ):
            assert (await (await sdk.submit("one", x(1))).result(20)).outputs
            valkey.client.delete(KEYS.queues)
            valkey.client.set(KEYS.queues, "somebody's")
            with pytest.raises(ResultTimeoutError):
                await sdk.task("nobody's").cancel(timeout_s=3)
            assert not any(task.done() for task in worker.tasks)
            valkey.client.delete(KEYS.queues)
            assert (await (await sdk.submit("one", x(1))).result(20)).outputs

    run(test)
