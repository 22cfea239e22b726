"""What is remembered of tasks that were cancelled or have ended, in orders of events that are not the usual one."""

from __future__ import annotations

import asyncio
import time

import pytest

from samphire import AsyncClient
from samphire.client.ended import ended_states
from samphire.wire import keys
from samphire_broker.store import (
    Scheduled,
    Settled,
    Started,
)
from samphire_broker.store.records import OtherEnd
from tests.stacks import Valkey, eventually
from tests.support.names import KEYS
from tests.test_store import META, QUEUE, failed, push, run, status, worker
from tests.test_store_orders import claimed, end, told


def remembered(valkey: Valkey, *task_ids: str) -> dict[str, str]:
    """What the SDK's helper says of tasks."""

    async def ask() -> dict[str, str]:
        async with AsyncClient(valkey.url) as client:
            return dict(await ended_states(client._session.publisher.connection, KEYS, task_ids))

    return asyncio.run(ask())


def test_a_late_success_of_a_cancelled_task_pushes_nothing(valkey: Valkey) -> None:
    """Its message was there twice and one worker is lost: it is settled as cancelled, with what that owes (c06)."""

    async def test() -> None:
        push(valkey, "ta then tb", "ta then tb")
        async with worker(valkey) as a, worker(valkey, "w2") as b:
            one, two = await claimed(a), await claimed(b)
            await a.store.start([(one.field, "ta")], a.info)
            await b.store.start([(two.field, "ta")], b.info)
            valkey.client.delete("samphire:worker:w2")
            await a.store.reap("w2", None, "{}")
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            assert (await a.store.cancel(META))["ta"] in ("cancelled", "running")
            assert status(valkey, "ta") == "REVOKED"
            step = end(one, "ta", "succeeded", pushes=(("inference.n", "tb"),))
            assert await a.store.settle([step]) == [Settled.WAS_CANCELLED]
            assert valkey.client.llen("inference.n") == 0
            owed = (("inference.n", "the chord's part"),)
            other = OtherEnd("tb", "cancelled", '{"status":"REVOKED","task_id":"tb"}', "")
            assert await a.store.settle([end(one, "ta", "cancelled", pushes=owed, others=(other,))]) == [1]
            assert status(valkey, "tb") == "REVOKED"
            copy = await claimed(a)
            assert await a.store.start([(copy.field, "ta")], a.info) == [Started.CANCELLED]
            assert await a.store.settle([end(copy, "ta", "cancelled", pushes=owed)]) == [1]
        assert valkey.client.lrange("inference.n", 0, -1) == [b"the chord's part"]

    run(test)


def test_what_an_end_owes_is_paid_once_however_many_messages_there_are(valkey: Valkey) -> None:
    """One copy of it has expired, another was claimed before (c08)."""

    async def test() -> None:
        push(valkey, "ta", "ta")
        async with worker(valkey) as w:
            one, two = await w.claim(2)
            owed = ((keys.INTAKE, "the chord's part"),)
            assert await w.store.settle([end(one, "ta", "expired", pushes=owed)]) == [1]
            assert await w.store.start([(two.field, "ta")], w.info) == [Started.CANCELLED]
            assert await w.store.settle([end(two, "ta", "cancelled", pushes=owed)]) == [1]
        assert valkey.client.llen(keys.INTAKE) == 1

    run(test)


def test_a_foreign_workers_revocation_still_leaves_what_it_owes(valkey: Valkey) -> None:
    """Celery's own workers write REVOKED too: whoever drops the message pays, and once."""

    async def test() -> None:
        push(valkey, "ta", "ta")
        async with worker(valkey) as w:
            valkey.client.set((KEYS.meta_prefix + "ta"), '{"status": "REVOKED", "task_id": "ta"}')
            owed = ((keys.INTAKE, "the chord's part"),)
            for claim in await w.claim(2):
                assert await w.store.start([(claim.field, "ta")], w.info) == [Started.CANCELLED]
                assert await w.store.settle([end(claim, "ta", "cancelled", pushes=owed)]) == [1]
        assert valkey.client.llen(keys.INTAKE) == 1

    run(test)


def test_a_copy_of_a_cancelled_task_does_not_wait_for_its_eta(valkey: Valkey) -> None:
    """The first copy has taken the mark along, and the result has expired (c11)."""

    async def test() -> None:
        push(valkey, "ta", "ta")
        async with worker(valkey) as w:
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            await w.store.cancel(META)
            one, two = await w.claim(2)
            eta = time.time() + 60
            assert await w.store.schedule([(one.field, "ta", eta)]) == [Scheduled.CANCELLED]
            assert await w.store.settle([end(one, "ta", "cancelled")]) == [1]
            valkey.client.delete(KEYS.meta_prefix + "ta")
            assert await w.store.schedule([(two.field, "ta", eta)]) == [Scheduled.CANCELLED]
            assert await w.store.start([(two.field, "ta")], w.info) == [Started.CANCELLED]
            assert await w.store.settle([end(two, "ta", "cancelled")]) == [1]
        assert told(valkey) == [{b"cancelled": b"ta"}]

    run(test)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_cancelled_task_ends_once_although_its_result_has_expired(valkey: Valkey, forgotten: bool) -> None:
    """Its message has waited for longer; the mark remembers when all else is forgotten (c16)."""

    async def test() -> None:
        push(valkey, "ta")
        async with worker(valkey) as w:
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            await w.store.cancel(META)
            valkey.client.delete((KEYS.meta_prefix + "ta"), *([KEYS.ended] if forgotten else []))
            claim = await claimed(w)
            assert await w.store.start([(claim.field, "ta")], w.info) == [Started.CANCELLED]
            owed = ((keys.INTAKE, "the chord's part"),)
            assert await w.store.settle([end(claim, "ta", "cancelled", pushes=owed)]) == [1]
        assert told(valkey) == [{b"cancelled": b"ta"}]
        assert status(valkey, "ta") is None
        assert valkey.client.llen(keys.INTAKE) == 1

    run(test)


@pytest.mark.parametrize("state", ["succeeded", "cancelled", "expired"])
@pytest.mark.parametrize("kept", [True, False])
def test_that_a_task_has_ended_is_remembered_longer_than_its_result(valkey: Valkey, state: str, kept: bool) -> None:
    """Also of one whose result is not kept: a copy that comes later does not run."""

    async def test() -> None:
        push(valkey, "ta", "ta", "tb")
        async with worker(valkey, result_ttl_s=1) as w:
            one, copy, other = await w.claim()
            ended = end(one, "ta", state)
            await w.store.settle([ended if kept else ended._replace(meta="")])
            eventually(lambda: not valkey.client.exists(KEYS.meta_prefix + "ta"), 5, "the result's end")
            verdicts = await w.store.start([(copy.field, "ta"), (other.field, "tb")], w.info)
            assert verdicts == [-2 if state == "succeeded" else Started.CANCELLED, 0]

    run(test)
    assert remembered(valkey, "ta", "tb", "tc") == {"ta": state}


def test_memory_is_kept_for_one_to_two_lifetimes(valkey: Valkey) -> None:
    """In two hashes: the older goes when the newer is old enough; all of it goes when nothing ends any more."""

    async def test() -> None:
        async with worker(valkey, result_ttl_s=1, remember_s=1) as w:
            for task_id in ("ta", "tb", "tc"):
                push(valkey, task_id)
                await w.store.settle([end(await claimed(w), task_id, "succeeded")])
                assert valkey.client.hget(KEYS.ended, task_id) == b"S"
                eventually(lambda: not valkey.client.exists(KEYS.ended_turn), 5, "the next turn")
        assert valkey.client.hkeys(KEYS.ended) == [b"tc"]
        assert valkey.client.hkeys(KEYS.ended_before) in ([b"tb"], [])
        assert 0 < valkey.client.pttl(KEYS.ended) <= 2000
        eventually(lambda: not valkey.client.exists(KEYS.ended, KEYS.ended_before), 5, "the end of memory")

    run(test)


def test_a_running_task_is_told_of_its_cancellation_however_late_its_worker_asks(valkey: Valkey) -> None:
    """A broker that was away for a minute, a worker that stood still: the mark of what runs does not lapse (c12)."""

    async def test() -> None:
        push(valkey, "ta")
        async with worker(valkey) as a, worker(valkey, "w2") as b:
            claim = await claimed(a)
            await a.store.start([(claim.field, "ta")], a.info)
            valkey.client.rpush(KEYS.cancels, "events:c ta")
            assert await b.store.cancel(META) == {"ta": "STARTED"}
            valkey.client.delete(KEYS.cancelled_lately)
            assert await a.store.cancel(META) == {"ta": "running"}
            assert await a.store.settle([end(claim, "ta", "cancelled")]) == [1]
            assert await a.store.cancel(META) == {}
        assert not valkey.client.exists(KEYS.cancelled, KEYS.cancelled_running)

    run(test)


def test_what_was_claimed_before_anything_was_tried_is_waited_for(valkey: Valkey) -> None:
    """It starts without being asked, so who has to be alone counts it as under way from its claim on (c19)."""

    async def test() -> None:
        push(valkey, "calm", "calm too")
        async with worker(valkey) as a, worker(valkey, "w2") as b:
            calm, too = await b.claim(2)
            assert calm.is_first and not b.store.some_tried
            push(valkey, "suspect", "later")
            valkey.client.sadd(KEYS.tried, "suspect")
            suspect, later = await claimed(a), await claimed(b)
            assert not later.is_first
            assert await a.store.alone("m", 20) == 2
            assert await b.store.start([(calm.field, "calm")], b.info) == [0]
            assert await b.store.start([(later.field, "later")], b.info) == [Started.NOT_YET]
            assert await a.store.alone("m", 20) == 2
            await b.store.settle([end(calm, "calm", "succeeded")])
            await b.store.release([too.field])
            assert await a.store.alone("m", 20) == 0
            assert await a.store.start([(suspect.field, "suspect")], a.info) == [0]
            assert not (await claimed(b)).is_first

    run(test)


def test_a_worker_that_leaves_cannot_claim_into_a_hash_that_nobody_reaps(valkey: Valkey) -> None:
    """Lease and membership go in one step; a claim before it keeps it a member, one after it has no lease (c09)."""

    async def test() -> None:
        push(valkey, "ta", "tb")
        async with worker(valkey, "w1") as w, worker(valkey, "w2") as other:
            await claimed(w)
            await w.store.leave()
            assert await other.store.others() == {"w1": None}
            assert (await other.store.reap("w1", None, "{}")).moved == 1
            assert await other.store.others() == {}
        async with worker(valkey, "w3") as w, worker(valkey, "w2") as other:
            await w.store.leave()
            assert await other.store.others() == {}
            assert valkey.client.llen(QUEUE) == 2

    run(test)


def test_next_steps_that_cannot_be_pushed_are_told_of_before_anything_is_written(valkey: Valkey) -> None:
    """Keys of other types lie where they belong, and beside it."""

    async def test() -> None:
        push(valkey, "ta", "tb")
        valkey.client.set("other", "x")
        valkey.client.set("other:returned", "x")
        async with worker(valkey) as w:
            ta, tb = await w.claim()
            ends = [end(ta, "ta", "succeeded", pushes=(("other", "next"),)), end(tb, "tb", "succeeded")]
            assert await w.store.settle(ends) == [Settled.NOT_PUSHED, 1]
            assert (status(valkey, "ta"), status(valkey, "tb")) == (None, "SUCCESS")
            assert await w.store.settle([failed(ta, "ta")]) == [1]

    run(test)


def test_a_late_call_of_an_earlier_hold_changes_no_later_one(valkey: Valkey) -> None:
    """It was timed out, and is carried out while the same worker is alone again."""

    async def test() -> None:
        async with worker(valkey) as one, worker(valkey, "w2") as other:
            assert await one.store.alone("m", 60, 1) == 0
            assert await one.store.alone("m", 0, 1) == 0
            assert await one.store.alone("n", 60, 2) == 0
            assert await one.store.alone("m", 0, 1) == -1, "its giving back, once more"
            assert await one.store.alone("m", 60, 1) == -1, "its asking, once more"
            assert await other.store.is_another_alone("n")
            assert await one.store.alone("n", 0, 2) == 0
            assert not await other.store.is_another_alone("n")

    run(test)
