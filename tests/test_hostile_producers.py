"""What a producer who may write to a queue cannot do to others: speak for them, read what is theirs, stop a lane."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from samphire import AsyncClient, InvalidInputError
from samphire.wire.envelope import encode_task
from samphire_workers.lane import sorting
from tests.stacks import Valkey
from tests.support.lane import body, fake_triton, lane_worker, state, until, x
from tests.support.names import KEYS
from tests.support.plain import plain_celery

SECRET = b"\x00\x00\x80?" * 3


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def push(valkey: Valkey, task_id: str, kwargs: dict[str, Any], **headers: Any) -> None:
    """Queue a message with any id and any headers, as anybody who may write to the queue can."""
    message = json.loads(encode_task("samphire.infer", "id", kwargs, "inference.m", 0))
    message["headers"] |= {"id": task_id, **headers}
    message["properties"]["correlation_id"] = task_id
    valkey.client.lpush("inference.m", json.dumps(message))


@pytest.mark.parametrize("between", [" ", "\n", "\t", "\x1b", "\u2028", "\x00"])
def test_an_id_cannot_speak_for_another(valkey: Valkey, between: str) -> None:
    """Events name ids with spaces between; whoever sent it is told what is wrong with it."""

    async def test() -> None:
        async with fake_triton("m") as triton, AsyncClient(valkey.url) as sdk:
            victim = await sdk.submit("m", x(), delay_s=600)
            forged = f"x{between}{victim.id}"
            async with lane_worker(valkey.url, triton):
                waits = asyncio.create_task(victim.result())
                push(valkey, forged, body("m", 5), samphire_stream=sdk._session.stream)
                await until(lambda: state(valkey.client, forged) == "FAILURE", "its end")
                good = await sdk.submit("m", x())
                await good.result(20)  # the events before it were read
                assert not waits.done() and await victim.status() == "scheduled"
                letter = await sdk.dead_letters.get(forged)
                assert "without spaces and control characters" in letter.error
                waits.cancel()
            assert triton.values == [1]
            with pytest.raises(InvalidInputError, match="without spaces"):
                sdk.task(forged)

    run(test)


@pytest.mark.parametrize(
    "stream", ["scheduled", "events:", "events:a:b", "other:events:c", "samphire:dead", "events:x y"]
)
@pytest.mark.parametrize("where", ["the task", "the next step"])
def test_a_stream_that_is_no_clients_is_not_written(valkey: Valkey, stream: str, where: str) -> None:
    """Nor any other key that a header names: only the task's own result is."""

    async def test() -> None:
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                first = app.signature("samphire.infer", kwargs=body("m"), queue="inference")
                headers = {"samphire_stream": stream}
                if where == "the task":
                    sent = first.apply_async(headers=headers)
                else:
                    wrong = {**body("m"), "inputs": [{"name": "x", "from": "nothing"}]}
                    second = app.signature("samphire.infer", kwargs=wrong, queue="inference").set(headers=headers)
                    sent = (first | second).apply_async()
                await until(lambda: state(valkey.client, sent.id) in ("SUCCESS", "FAILURE"), "the end")
            assert not list(valkey.client.scan_iter(_type="stream"))

    run(test)


def ref_to(key: str, data: bytes = SECRET) -> dict[str, Any]:
    ref = {"key": key, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"model_name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 1], "ref": ref}]}


@pytest.mark.parametrize(
    "theirs",
    [
        "sub:blob:other:0",
        "sub:blob:mine:0:0",
        "sub:blob:mine:x",
        "result:blob:acme:other:0:1234",
        "result:blob",
        "dead:x",
        "samphire:sub:blob:mine:0",
    ],
)
def test_a_ref_reads_nothing_of_others(valkey: Valkey, theirs: str) -> None:
    """Even of one who knows size and digest; and no error tells the digest."""

    async def test() -> None:
        for key in (theirs, KEYS.own(theirs)):
            valkey.client.set(key, SECRET)
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            push(valkey, "mine", ref_to(theirs))
            await until(lambda: state(valkey.client, "mine") == "FAILURE", "its end")
            assert not triton.values
            assert b"expected a ref to one of the task's own claim checks" in valkey.client.get(
                KEYS.meta_prefix + "mine"
            )

    run(test)


def test_a_wrong_digest_is_not_answered_with_the_right_one(valkey: Valkey) -> None:
    """Of the task's own claim check."""

    async def test() -> None:
        valkey.client.set(KEYS.own("sub:blob:mine:0"), SECRET)
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            request = ref_to("sub:blob:mine:0")
            request["inputs"][0]["ref"]["sha256"] = "0" * 64
            push(valkey, "mine", request)
            await until(lambda: state(valkey.client, "mine") == "FAILURE", "its end")
            told = valkey.client.get(KEYS.meta_prefix + "mine") + b"".join(
                valkey.client.hvals(KEYS.dead_prefix + "mine")
            )
            assert b"another sha256" in told and hashlib.sha256(SECRET).hexdigest().encode() not in told
            assert not triton.values

    run(test)


def test_a_tenants_outputs_are_read_by_its_next_steps_only(valkey: Valkey) -> None:
    """A step of another tenant is refused what it names."""

    async def test() -> None:
        valkey.client.set(KEYS.own("result:blob:acme:one:0:12"), SECRET)
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            for tenant in ("acme", "evil"):
                push(valkey, tenant, {**ref_to("result:blob:acme:one:0:12"), "tenant": tenant})
                await until(lambda: state(valkey.client, tenant) in ("SUCCESS", "FAILURE"), "its end")  # noqa: B023
            assert (state(valkey.client, "acme"), state(valkey.client, "evil")) == ("SUCCESS", "FAILURE")
            assert triton.values == [1, 1, 1]

    run(test)


def test_many_messages_that_take_long_to_read_hold_up_nothing_else(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few KB may be several MB once decompressed, and one claim has many: the worker has to beat meanwhile."""
    monkeypatch.setattr(sorting, "READ_S", -1)  # each of them counts as one that takes long
    turns = 0
    seen: list[int] = []
    read = sorting.read_or_error

    def noting(*arguments: Any) -> Any:
        seen.append(turns)
        return read(*arguments)

    monkeypatch.setattr(sorting, "read_or_error", noting)

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def test() -> None:
        for number in range(8):
            push(valkey, str(number), {"typed": {"__type__": "unknown", "__value__": 1}})
        counting = asyncio.create_task(count_turns())
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            await until(lambda: all(state(valkey.client, str(n)) == "FAILURE" for n in range(8)), "their ends")
        counting.cancel()
        assert len(seen) == len(set(seen)) == 8

    run(test)
