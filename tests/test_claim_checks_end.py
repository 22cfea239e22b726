"""Claim checks of inputs go with their task, however it ends."""

from __future__ import annotations

import asyncio

import pytest

from samphire import AsyncClient
from samphire.errors import ModelFaultError, TaskCancelledError, TaskExpiredError
from samphire.wire import keys
from samphire_broker.store import Started
from tests.stacks import Valkey
from tests.support.lane import broken, fake_triton, lane_worker, sleeping, state, until, x
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.test_store import META, push, run, worker
from tests.test_store_orders import claimed, end, fail


def blobs(valkey: Valkey) -> list[bytes]:
    return list(valkey.client.scan_iter(KEYS.own(keys.BLOB_PREFIX) + "*"))


def test_a_task_that_was_cancelled_before_it_was_claimed_takes_them_along(valkey: Valkey) -> None:
    """Its end is written before anybody reads its message; those of a failed one stay for a redrive."""

    async def test() -> None:
        async with worker(valkey) as w:
            push(valkey, "a")
            own = keys.BLOB_PREFIX + "a:0"
            valkey.client.set(KEYS.own(own), "data")
            valkey.client.rpush(KEYS.cancels, "events:c a")
            assert await w.store.cancel(META) == {"a": "cancelled"}
            claim = await claimed(w)
            assert await w.store.start([(claim.field, "a")], w.info) == [Started.CANCELLED]
            assert await w.store.settle([end(claim, "a", "cancelled", blobs=(own,))]) == [1]
            assert blobs(valkey) == []
            push(valkey, "b", "b")
            own = keys.BLOB_PREFIX + "b:0"
            valkey.client.set(KEYS.own(own), "data")
            first, copy = await w.claim()
            assert await w.store.settle([fail(first, "b")]) == [1]
            assert await w.store.settle([end(copy, "b", "cancelled", blobs=(own,))]) == [1]
            assert len(blobs(valkey)) == 1

    run(test)


@pytest.mark.parametrize("is_sent_again", [False, True])
def test_a_purge_takes_those_of_its_task_along(valkey: Valkey, is_sent_again: bool) -> None:
    """Not those of others, and not where the task runs again."""

    async def test() -> None:
        names = ["a:0", "a:11", "a:", "ab:0", "b:0"]
        message = " ".join(f'{{\\"key\\": \\"{keys.BLOB_PREFIX}{name}\\"}}' for name in names)
        for name in (*names, "a:1"):
            valkey.client.set(KEYS.own(keys.BLOB_PREFIX + name), "data")
        push(valkey, message)
        async with worker(valkey) as w:
            assert await w.store.settle([fail(await claimed(w), "a")]) == [1]
            if is_sent_again:
                valkey.client.set(KEYS.meta_prefix + "a", '{"status":"STARTED"}')
            valkey.client.rpush(KEYS.letters, "purge a")
            await w.store.serve_letters()
        assert not valkey.client.exists(KEYS.dead_prefix + "a")
        left = {key.decode().removeprefix(KEYS.own(keys.BLOB_PREFIX)) for key in blobs(valkey)}
        assert left == {*names, "a:1"} - (set() if is_sent_again else {"a:0", "a:11"})

    run(test)


def test_letters_are_served_in_bounded_steps(valkey: Valkey) -> None:
    """Many large ones at once would hold up everybody; of those that no lane reads nothing is read."""

    async def test() -> None:
        async with worker(valkey) as w:
            for number, size in enumerate([3, 3, 3, 3, 3, 3, 3, 20, 20]):
                letter = KEYS.dead_prefix + str(number)
                message = "x" * size * 2**20 if size < 20 else keys.BLOB_PREFIX + f"{number}:0" + "x" * size * 2**20
                valkey.client.hset(letter, mapping={"message": message, "task_id": str(number), "list": "inference.m"})
                valkey.client.zadd(KEYS.dead, {str(number): number})
                valkey.client.set(KEYS.own(f"{keys.BLOB_PREFIX}{number}:0"), "data")
                valkey.client.rpush(KEYS.letters, f"purge {number}")
            assert [await w.store.serve_letters() for _ in range(3)] == [5, 4, 0]
            assert not valkey.client.zcard(KEYS.dead) and not valkey.client.exists(KEYS.letters)
            assert len(blobs(valkey)) == 9  # these messages name none, or are not read

    run(test)


def test_a_message_ends_no_claim_checks_of_others(valkey: Valkey) -> None:
    """Also not one that was never checked, since it had expired."""

    async def test() -> None:
        name = keys.BLOB_PREFIX + "a:1:0"  # of the task "a:1"
        valkey.client.set(KEYS.own(name), "data")
        ref = {"key": name, "size": 4, "sha256": "0" * 64}
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "ref": ref}
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                kwargs = {"model_name": "m", "inputs": [tensor]}
                app.send_task("samphire.infer", task_id="a", kwargs=kwargs, queue="inference", expires=-1)
                await until(lambda: state(valkey.client, "a") == "REVOKED", "its end")
        assert blobs(valkey) == [KEYS.own(name).encode()]

    run(test)


def test_no_end_but_a_failure_leaves_any(valkey: Valkey) -> None:
    """With a real lane: cancelled while it waits and while it runs, expired, succeeded; failed, and purged."""

    async def test() -> None:
        async with (
            fake_triton("m") as triton,
            lane_worker(valkey.url, triton, max_attempts=1),
            AsyncClient(valkey.url, inline_limit_bytes=1) as sdk,
        ):
            await until(lambda: valkey.client.hexists(KEYS.catalogue, "m"), "the catalogue")
            triton.behave["m"] = sleeping(2)
            running = await sdk.submit("m", x())
            await until(lambda: triton.asked, "a request")
            assert len(blobs(valkey)) == 1
            await running.cancel()
            with pytest.raises(TaskCancelledError):
                await running.result(10)
            later = await sdk.submit("m", x(), delay_s=60)
            await until(lambda: valkey.client.zcard(KEYS.scheduled) == 1, "the schedule")
            await later.cancel()
            with pytest.raises(TaskCancelledError):
                await later.result(10)
            await until(lambda: not blobs(valkey), "the end of those of the cancelled ones")
            expired = await sdk.submit("m", x(), deadline_s=0.001)
            with pytest.raises(TaskExpiredError):
                await expired.result(10)
            del triton.behave["m"]
            await (await sdk.submit("m", x())).result(10)
            await until(lambda: not blobs(valkey), "the end of the others'")
            triton.behave["m"] = broken
            with pytest.raises(ModelFaultError):
                await (await sdk.submit("m", x())).result(10)
            await asyncio.sleep(0.2)
            assert len(blobs(valkey)) == 1
            (letter,) = await sdk.dead_letters.list()
            await sdk.dead_letters.purge([letter.id])
            await until(lambda: not blobs(valkey), "the end of the letter's")

    run(test)
