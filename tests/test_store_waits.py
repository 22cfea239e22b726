"""The schedule, cancellations, and what goes back to its queue."""

from __future__ import annotations

import json
import time

import pytest

from samphire_broker.store import (
    Scheduled,
    Settlement,
    Started,
)
from tests.stacks import Valkey
from tests.support.names import KEYS
from tests.test_store import META, QUEUE, everywhere, push, run, status, worker


def test_scheduled_tasks_wait_for_their_time(valkey: Valkey) -> None:
    """Out of the worker's hands; the earliest stands first when they return; a lost claim schedules nothing."""

    async def test() -> None:
        push(valkey, "a", "b", "c")
        async with worker(valkey) as w, worker(valkey, "w2") as other:
            claims = await w.claim()
            now = time.time()
            due = [now + 600, now + 500, now + 700]
            tasks = [(claim.field, claim.message.decode(), at) for claim, at in zip(claims, due, strict=True)]
            assert await other.store.schedule(tasks) == [0, 0, 0]
            assert await w.store.schedule(tasks) == [1, 1, 1]
            assert await w.store.schedule(tasks) == [0, 0, 0]
            assert valkey.client.hlen("samphire:worker:w1:inflight") == 0
            assert everywhere(valkey) == ["a", "b", "c"]
            assert await w.store.return_due() == 0
            valkey.client.zadd(KEYS.scheduled, {"a": 2, "b": 1}, xx=True)  # their time has come
            assert await w.store.return_due() == 2
            assert [claim.message for claim in await other.claim()] == [b"b", b"a"]
            assert await w.store.return_due() == 0
        assert valkey.client.zrange(KEYS.scheduled, 0, -1) == [b"c"]

    run(test)


def test_tasks_can_be_cancelled(valkey: Valkey) -> None:
    """Queued and scheduled end at once, the message is dropped later; running ones where they run; ended ones stay."""

    async def test() -> None:
        push(valkey, "queued", "running", "done", "later")
        async with worker(valkey) as w:
            claims = {claim.message.decode(): claim for claim in await w.claim()}
            await w.start([claims["running"], claims["done"]])
            await w.settle(claims["done"])
            await w.store.schedule([(claims["later"].field, "later", time.time() + 60)])
            await w.store.release([claims["queued"].field])
            valkey.client.rpush(KEYS.cancels, "events:c queued", " running", "no-space", "events:c done")
            assert await w.store.cancel(META, ["later", "queued"]) == {
                "queued": "REVOKED",  # asked for twice
                "running": "running",
                "done": "SUCCESS",
                "later": "cancelled",
            }
            assert valkey.client.exists(KEYS.cancels, KEYS.scheduled, KEYS.scheduled_messages) == 0
            assert [status(valkey, name) for name in ("queued", "later")] == ["REVOKED", "REVOKED"]
            assert json.loads(valkey.client.get(KEYS.meta_prefix + "later"))["task_id"] == "later"
            assert [fields for _, fields in valkey.client.xrange("samphire:events:c")][-1] == {b"cancelled": b"queued"}
            assert everywhere(valkey) == ["later", "queued", "running"]
            valkey.client.delete(KEYS.meta_prefix + "later")  # its result has expired, the mark has not
            dropped = await w.claim()
            assert w.store.some_cancelled and not w.store.some_tried
            assert await w.start(dropped) == [Started.CANCELLED, Started.CANCELLED]
            again = [(claim.field, claim.message.decode(), time.time() + 60) for claim in dropped]
            assert await w.store.schedule(again) == [Scheduled.CANCELLED, Scheduled.CANCELLED]
            assert await w.store.is_cancelled("queued") and not await w.store.is_cancelled("done")
            ends = [Settlement(claim.field, claim.message.decode(), "cancelled", META, "") for claim in dropped]
            assert await w.store.settle(ends) == [1, 1]
            assert everywhere(valkey) == ["running"]
            assert valkey.client.zrange(KEYS.cancelled, 0, -1) == [b"running"]  # whoever runs it is told, and again
            assert await w.store.cancel(META) == {"running": "running"}
            ends = [Settlement(claims["running"].field, "running", "cancelled", META, "")]
            assert await w.store.settle(ends) == [1]
            assert not valkey.client.exists(KEYS.cancelled)
            assert await w.store.cancel(META) == {}
            valkey.client.delete(KEYS.cancelled_lately)  # a minute later
            assert await w.claim() == []
            assert not w.store.some_cancelled

    run(test)


def test_a_revocation_may_name_anybodys_task(valkey: Valkey) -> None:
    """It is marked, and its state is not touched: only if it is ever claimed it ends."""

    async def test() -> None:
        push(valkey, "ours")
        async with worker(valkey) as w:
            assert await w.store.cancel(META, ["ours", "somebody's"]) == {"ours": "marked", "somebody's": "marked"}
            assert (status(valkey, "ours"), status(valkey, "somebody's")) == (None, None)
            (claim,) = await w.claim()
            assert await w.start([claim]) == [Started.CANCELLED]
            step = (("inference.n", "owed"),)
            assert await w.store.settle([Settlement(claim.field, "ours", "cancelled", META, "", pushes=step)]) == [1]
        assert status(valkey, "ours") == "REVOKED"
        assert valkey.client.lrange("inference.n", 0, -1) == [b"owed"]
        assert valkey.client.zrange(KEYS.cancelled, 0, -1) == [b"somebody's"]

    run(test)


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_a_cancelled_task_pays_what_it_owes_however_it_ends(valkey: Valkey, ending: str) -> None:
    """A chord waits for it; and once, although its message was there twice. What it pays is found by a cancel."""

    async def test() -> None:
        push(valkey, "a", "a")
        async with worker(valkey) as w:
            valkey.client.rpush(KEYS.cancels, " a")
            await w.store.cancel(META)
            one, two = await w.claim()
            step = (("inference.n", "owed"),)
            assert await w.store.settle([Settlement(one.field, "a", ending, "{}", "", pushes=step)]) == [1]
            assert await w.store.settle([Settlement(two.field, "a", "cancelled", "{}", "", pushes=step)]) == [1]
        assert status(valkey, "a") == "REVOKED"
        assert valkey.client.llen("inference.n") == 1
        assert valkey.client.sismember(KEYS.queues, "inference.n")

    run(test)


def test_the_time_that_counts_is_the_brokers(valkey: Valkey) -> None:
    """What is due by its clock stays with the worker, whose own clock may be behind."""

    async def test() -> None:
        push(valkey, "a", "b")
        async with worker(valkey) as w:
            a, b = await w.claim()
            tasks = [(a.field, "a", time.time() - 1), (b.field, "b", time.time() + 60)]
            assert await w.store.schedule(tasks) == [Scheduled.DUE, 1]
            push(valkey, "b")
            (again,) = await w.claim()
            assert await w.store.schedule([(again.field, "b", time.time() + 60)]) == [Scheduled.REPLACED]
            assert await w.store.release([a.field]) == 1

    run(test)


@pytest.mark.parametrize("key", [KEYS.cancelled, KEYS.cancels, KEYS.deletes, KEYS.alone, (KEYS.meta_prefix + "a")])
def test_keys_of_other_types_stop_nothing(valkey: Valkey, key: str) -> None:
    """Whoever made them."""

    async def test() -> None:
        push(valkey, "a")
        valkey.client.rpush(key, "junk") if key != (KEYS.meta_prefix + "a") else valkey.client.sadd(key, "junk")
        valkey.client.rpush(KEYS.deletes, "a") if key == (KEYS.meta_prefix + "a") else None
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            assert await w.store.schedule([(claim.field, "a", 0)]) == [Scheduled.DUE]
            await w.store.cancel(META, ["a"])
            await w.store.delete_results()
            if key != (KEYS.meta_prefix + "a"):
                assert await w.start([claim]) in ([0], [Started.CANCELLED])
                assert await w.settle(claim) == 1
                assert await w.store.alone("m", 60) == 0

    run(test)


def test_a_cancel_request_writes_to_clients_streams_only(valkey: Valkey) -> None:
    """The name of any other key is not taken for one."""

    async def test() -> None:
        push(valkey, "one", "two", "three", "four")
        valkey.client.rpush(KEYS.cancels, "scheduled one", "dead two", "events:* three", "events:c four")
        async with worker(valkey) as w:
            assert set((await w.store.cancel(META)).values()) == {"cancelled"}
        assert valkey.client.exists("samphire:scheduled", "samphire:dead", "samphire:events:*") == 0
        assert valkey.client.xlen("samphire:events:c") == 1

    run(test)


def test_released_claims_return_in_order(valkey: Valkey) -> None:
    """To the head of their lists, and as if they had never been started."""

    async def test() -> None:
        push(valkey, "a", "b", "c")
        async with worker(valkey) as w:
            claims = await w.claim(2)
            await w.start(claims[:1])
            assert await w.store.release([claim.field for claim in claims]) == 2
            assert status(valkey, "a") is None
            assert [claim.message for claim in await w.claim()] == [b"a", b"b", b"c"]

    run(test)


def test_what_is_due_and_can_go_nowhere_stays_and_does_not_count(valkey: Valkey) -> None:
    """Somebody's keys lie where its queue belongs: the clock goes on instead of trying it without a pause."""

    async def test() -> None:
        valkey.client.mset({"inference.bad": "somebody's", "inference.bad:returned": "somebody's"})
        valkey.client.zadd(KEYS.scheduled, {"stuck": 1, "free": 2})
        stored = {"stuck": "inference.bad a", "free": "inference.n b"}
        valkey.client.hset(KEYS.scheduled_messages, mapping=dict(stored))
        async with worker(valkey) as w:
            assert [await w.store.return_due() for _ in range(2)] == [1, 0]
        assert valkey.client.lrange("inference.n", 0, -1) == [b"b"]
        assert valkey.client.zrange(KEYS.scheduled, 0, -1) == [b"stuck"]
        valkey.client.delete("inference.bad")
        async with worker(valkey) as w:
            assert await w.store.return_due() == 1
        assert valkey.client.lrange("inference.bad", 0, -1) == [b"a"]

    run(test)


def test_routed_claims_go_to_their_queue(valkey: Valkey) -> None:
    """Without an attempt, in order, and the lanes are woken."""

    async def test() -> None:
        push(valkey, "a", "b")
        pubsub = valkey.client.pubsub()
        pubsub.subscribe(KEYS.wake_channel)
        async with worker(valkey) as w:
            claims = await w.claim()
            moves = [(claim.field, "inference.n", "inference.n") for claim in claims]
            assert await w.store.route(moves) == 2
            assert await w.store.route(moves) == 0
            assert await w.store.known_queues() == {QUEUE, "inference.n"}
        assert valkey.client.lrange("inference.n", 0, -1) == [b"b", b"a"]
        assert [pubsub.get_message(timeout=1) for _ in range(2)][1]["data"] == b"inference.n"  # type: ignore[index]
        pubsub.close()

    run(test)


def test_a_queue_that_is_none_holds_up_no_other(valkey: Valkey) -> None:
    """A message for it lies beside it; the others of the same call arrive."""

    async def test() -> None:
        push(valkey, "a", "b")
        valkey.client.set("inference.bad", "somebody's")
        async with worker(valkey) as w:
            first, second = await w.claim()
            moves = [(first.field, "inference.bad", "inference.bad"), (second.field, "inference.n", "inference.n")]
            assert await w.store.route(moves) == 2
            assert not valkey.client.hlen("samphire:worker:w1:inflight")
        assert valkey.client.lrange("inference.bad:returned", 0, -1) == [b"a"]
        assert valkey.client.lrange("inference.n", 0, -1) == [b"b"]

    run(test)
