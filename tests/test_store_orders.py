"""Orders of calls that a model of the protocol has found: each broke a promise once. Real scripts, real Valkey."""

from __future__ import annotations

import asyncio
import json

import pytest

from samphire import AsyncClient, LetterRefusedError
from samphire_broker.store import (
    Claimed,
    Later,
    Letter,
    Settled,
    Settlement,
    Started,
    Turn,
)
from samphire_broker.store.records import OtherEnd
from tests.stacks import Valkey
from tests.support.names import KEYS
from tests.test_store import META, QUEUE, Worker, push, run, status, worker

ATTEMPT = '{"at":"2026-11-22T10:00:00+00:00","worker":"w","error":"Error"}'


STATES = {
    "succeeded": "SUCCESS",
    "failed": "FAILURE",
    "cancelled": "REVOKED",
    "expired": "REVOKED",
    "retrying": "RETRY",
}


def end(claim: Claimed, task_id: str, state: str, **extra: object) -> Settlement:
    """A settlement with a result like a worker's."""
    meta = json.dumps({"status": STATES[state], "task_id": task_id, "result": {}}, separators=(",", ":"))
    return Settlement(claim.field, task_id, state, meta, "events:c", **extra)  # type: ignore[arg-type]


def letter(task_id: str, attempts: int = 1) -> Letter:
    return Letter(task_id, "m", "model_fault", "Error", attempts, ATTEMPT)


def fail(claim: Claimed, task_id: str, **extra: object) -> Settlement:
    return end(claim, task_id, "failed", letter=letter(task_id), **extra)


async def claimed(w: Worker, queue: str = QUEUE) -> Claimed:
    (claim,) = await w.store.claim([Turn(queue, 1, 0)], [1], 1, 10**9)
    return claim


def told(valkey: Valkey, stream: str = "events:c") -> list[dict[bytes, bytes]]:
    """The events of a stream, without results."""
    return [
        {name: value for name, value in fields.items() if name != b"result"}
        for _, fields in valkey.client.xrange(KEYS.own(stream))
    ]


def test_a_redrive_opens_a_run_for_all_that_ended_because_of_the_letter(valkey: Valkey) -> None:
    """A chain's later steps had failed with its first one; run again, it goes on to its end (c01)."""

    async def test() -> None:
        push(valkey, "ta then tb")
        async with worker(valkey) as w:
            claim = await claimed(w)
            await w.store.start([(claim.field, "ta")], w.info)
            other = OtherEnd("tb", "failed", '{"status":"FAILURE","task_id":"tb"}', "events:c")
            assert await w.store.settle([fail(claim, "ta", others=(other,))]) == [1]
            assert (status(valkey, "ta"), status(valkey, "tb")) == ("FAILURE", "FAILURE")
            valkey.client.rpush(KEYS.letters, "redrive:1 ta")
            await w.store.serve_letters()
            assert (status(valkey, "ta"), status(valkey, "tb")) == (None, None)
            again = await claimed(w)
            assert await w.store.start([(again.field, "ta")], w.info) == [0]
            await w.store.settle([end(again, "ta", "succeeded", pushes=((QUEUE, "tb"),))])
            following = await claimed(w)
            assert await w.store.start([(following.field, "tb")], w.info) == [0]
            await w.store.settle([end(following, "tb", "succeeded")])
            assert status(valkey, "tb") == "SUCCESS"
        assert told(valkey)[-2:] == [{b"succeeded": b"ta", b"run": b"2"}, {b"succeeded": b"tb", b"run": b"2"}]
        assert not valkey.client.exists(KEYS.tried, "samphire:task:ta", "samphire:task:tb")

    run(test)


def test_a_cancel_of_a_dead_letter_is_answered_and_changes_nothing(valkey: Valkey) -> None:
    """Its result has expired, and even the memory of its end: the letter tells; a redrive then runs it (c04)."""

    async def test() -> None:
        push(valkey, "ta")
        async with worker(valkey) as w:
            claim = await claimed(w)
            await w.store.settle([fail(claim, "ta")])
            valkey.client.delete(KEYS.meta_prefix + "ta")
            for forgotten in (False, True):
                if forgotten:
                    valkey.client.delete(KEYS.ended, KEYS.ended_before)
                valkey.client.rpush(KEYS.cancels, "events:c ta")
                assert await w.store.cancel(META, ["ta"]) == {"ta": "FAILURE"}
                assert valkey.client.get(f"{KEYS.answer_prefix}ta") == b"failed"
                assert status(valkey, "ta") is None and not valkey.client.exists(KEYS.cancelled)
            valkey.client.rpush(KEYS.letters, "redrive:1 ta")
            await w.store.serve_letters()
            again = await claimed(w)
            assert await w.store.start([(again.field, "ta")], w.info) == [0]

    run(test)


def test_the_client_is_told_that_a_dead_letter_cannot_be_cancelled(valkey: Valkey) -> None:
    """`cancel` says False, as of all that has ended before, though no result is left that would say so (c04)."""

    async def test() -> None:
        push(valkey, "ta")
        async with worker(valkey) as w, AsyncClient(valkey.url) as client:
            await w.store.settle([fail(await claimed(w), "ta")])
            valkey.client.delete(KEYS.meta_prefix + "ta")
            asked = asyncio.create_task(client.task("ta").cancel())
            while not valkey.client.llen(KEYS.cancels):
                await asyncio.sleep(0.01)
            await w.store.cancel(META)
            assert await asked is False

    run(test)


def test_a_purge_names_the_run_of_the_letter_that_was_read(valkey: Valkey) -> None:
    """The letter of a later run, which nobody has seen, stays (c05)."""

    async def test() -> None:
        push(valkey, "ta")
        async with worker(valkey) as w, AsyncClient(valkey.url) as client:
            await w.store.settle([fail(await claimed(w), "ta")])
            go = asyncio.Event()
            connection = client._session.publisher.connection
            execute = connection.execute

            async def slow(*command: object, **options: object) -> object:
                if command[0] == "RPUSH":
                    await go.wait()
                return await execute(*command, **options)  # type: ignore[arg-type]

            connection.execute = slow  # type: ignore[method-assign,assignment]
            purge = asyncio.create_task(client.dead_letters.purge(["ta"]))
            valkey.client.rpush(KEYS.letters, "redrive ta")
            await w.store.serve_letters()
            await w.store.settle([fail(await claimed(w), "ta")])
            assert valkey.client.hget("samphire:dead:ta", "run") == b"2"
            go.set()
            await purge
            assert await w.store.serve_letters() == 1
            assert valkey.client.hget("samphire:dead:ta", "run") == b"2"
            assert await client.dead_letters.get("ta")

    run(test)


def test_a_cancelled_task_leaves_no_letter_that_could_be_redriven_into_nothing(valkey: Valkey) -> None:
    """Its message fails its check when it is claimed: it ends as cancelled, as the client was told (c14)."""

    async def test() -> None:
        push(valkey, "ta")
        async with worker(valkey) as w:
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            assert await w.store.cancel(META) == {"ta": "cancelled"}
            claim = await claimed(w)
            assert await w.store.settle([fail(claim, "ta")]) == [Settled.WAS_CANCELLED]
            assert await w.store.settle([end(claim, "ta", "cancelled")]) == [1]
        assert status(valkey, "ta") == "REVOKED"
        assert not valkey.client.exists("samphire:dead:ta", KEYS.dead, KEYS.cancelled)
        assert told(valkey) == [{b"cancelled": b"ta"}]

    run(test)


def test_what_cannot_be_redriven_keeps_its_letter_and_says_why(valkey: Valkey) -> None:
    """Its task was sent again and has succeeded since; or its list is no list."""

    async def test() -> None:
        push(valkey, "ta", "tb")
        async with worker(valkey) as w, AsyncClient(valkey.url) as client:
            for task_id in ("ta", "tb"):
                await w.store.settle([fail(await claimed(w), task_id)])
            push(valkey, "ta, sent again")
            again = await claimed(w)
            assert await w.store.start([(again.field, "ta")], w.info) == [0]
            await w.store.settle([end(again, "ta", "succeeded")])
            valkey.client.set(QUEUE, "no list")

            async def serve() -> None:
                while await w.store.serve_letters() == 0:
                    await asyncio.sleep(0.01)

            for task_id, why in (("ta", "is SUCCESS now"), ("tb", "of type string")):
                serving = asyncio.create_task(serve())
                with pytest.raises(LetterRefusedError, match=why):
                    await client.dead_letters.redrive([task_id])
                await serving
                assert (await client.dead_letters.get(task_id)).refusals == 1
        assert status(valkey, "ta") == "SUCCESS" and status(valkey, "tb") == "FAILURE"

    run(test)


def test_what_is_sent_again_after_a_failure_runs_and_a_copy_does_not(valkey: Valkey) -> None:
    """As with a stock worker; the new run has all its attempts, and its events say which it is."""

    async def test() -> None:
        push(valkey, "ta 1", "ta 1", "ta 2", "ta 1", "ta 2")
        async with worker(valkey) as w:
            one, copy, new, late, again = await w.claim()
            await w.store.start([(one.field, "ta")], w.info)
            await w.store.settle([fail(one, "ta")])
            assert await w.store.start([(copy.field, "ta")], w.info) == [-2], "it is the message that has failed"
            assert await w.store.start([(new.field, "ta")], w.info) == [0]
            assert status(valkey, "ta") == "STARTED"
            assert await w.store.start([(late.field, "ta")], w.info) == [-2], "also while the next run is under way"
            await w.store.settle([end(new, "ta", "retrying", retry=Later(0, "{}"))])
            valkey.client.delete(KEYS.scheduled, KEYS.scheduled_messages)
            (tried,) = await w.store.start([(again.field, "ta")], w.info)
            assert not isinstance(tried, int) and tried.attempts == 1
            await w.store.settle([fail(again, "ta")])
            assert valkey.client.hget("samphire:dead:ta", "run") == b"2"
            assert status(valkey, "ta") == "FAILURE"
        assert told(valkey) == [{b"failed": b"ta"}, {b"retrying": b"ta"}, {b"failed": b"ta", b"run": b"2"}]

    run(test)


@pytest.mark.parametrize("kept", ["result", "memory", "letter", "nothing"])
def test_a_copy_of_what_has_failed_is_known_from_what_is_kept(valkey: Valkey, kept: str) -> None:
    """Its digest for some hours, its letter for two weeks; without either it is a new message."""

    async def test() -> None:
        push(valkey, "ta", "ta")
        async with worker(valkey) as w:
            one, copy = await w.claim()
            await w.store.settle([fail(one, "ta")])
            gone = {
                "result": [KEYS.ended, "samphire:dead:ta"],
                "memory": [(KEYS.meta_prefix + "ta"), "samphire:dead:ta"],
                "letter": [KEYS.ended],
                "nothing": [(KEYS.meta_prefix + "ta"), KEYS.ended, "samphire:dead:ta"],
            }[kept]
            valkey.client.delete(*gone)
            is_known = kept in ("memory", "letter")
            assert await w.store.start([(copy.field, "ta")], w.info) == [-2 if is_known else 0]

    run(test)


def test_a_copy_of_what_has_failed_that_waits_for_its_time_is_not_cancelled(valkey: Valkey) -> None:
    """Nothing is written over the failure; the copy is dropped when its time comes."""

    async def test() -> None:
        message = '{"properties":{"correlation_id":"ta"}}'
        push(valkey, message, message)
        async with worker(valkey) as w:
            one, two = await w.claim()
            await w.store.settle([end(one, "ta", "retrying", retry=Later(60, ATTEMPT)), fail(two, "ta")])
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            assert await w.store.cancel(META) == {"ta": "FAILURE"}
            valkey.client.zadd(KEYS.scheduled, {"ta": 1})
            await w.store.return_due()
            copy = await claimed(w)
            assert await w.store.start([(copy.field, "ta")], w.info) == [-2]
        assert status(valkey, "ta") == "FAILURE"

    run(test)


def test_what_was_sent_again_and_waits_can_be_cancelled(valkey: Valkey) -> None:
    """The failure that is stored is that of the run before."""

    async def test() -> None:
        message = '{"properties":{"correlation_id":"ta"},"tag":%d}'
        push(valkey, message % 1)
        async with worker(valkey) as w:
            await w.store.settle([fail(await claimed(w), "ta")])
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            assert await w.store.cancel(META) == {"ta": "FAILURE"}
            push(valkey, message % 2)
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            assert await w.store.cancel(META) == {"ta": "cancelled"}
            again = await claimed(w)
            assert await w.store.start([(again.field, "ta")], w.info) == [Started.CANCELLED]
            assert await w.store.settle([end(again, "ta", "cancelled")]) == [1]
        assert status(valkey, "ta") == "REVOKED"
        assert told(valkey) == [{b"failed": b"ta"}, {b"cancelled": b"ta", b"run": b"2"}]

    run(test)
