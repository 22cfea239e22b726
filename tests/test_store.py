"""The scripts, on a real server: every transition, every fence."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import redis

from samphire.errors import BrokerMemoryFullError, BrokerUnavailableError, ClientClosedError, QueueFullError
from samphire.transport.address import Address, broker_of
from samphire.transport.direct import DirectConnection
from samphire.transport.publisher import Publisher
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import (
    Claimed,
    Later,
    LeaseLostError,
    Letter,
    OtherEnd,
    Scheduled,
    Settlement,
    Started,
    Store,
    Tried,
    Turn,
    WorkerInfo,
)
from tests.proxy import cutting_proxy
from tests.stacks import Valkey, eventually, standing_still
from tests.support.names import KEYS

QUEUE = "inference.m"
LISTS = [keys.queue_list(QUEUE, step) for step in keys.PRIORITY_STEPS]
ATTEMPT = '{"error": "lost"}'
TURNS = [Turn(key, share, 0) for key, share in zip(LISTS, [8, 4, 2, 1], strict=True)]


class Worker:
    """A store with a lease and a named connection."""

    def __init__(self, url: str, name: str, **settings: object) -> None:
        # Nobody beats for it: a test that lets the lease lapse deletes it, and on a busy machine no other does.
        self.settings = Settings(broker_url=url, **{"lease_s": 600.0, **settings})  # type: ignore[arg-type]
        self.store = Store(self.settings, name)
        self.info = WorkerInfo(name, f"{name}@host", 1)
        self.named = DirectConnection(Address.parse(url), name=KEYS.connection_prefix + name)

    async def beat(self) -> int:
        return await self.store.beat(self.info, self.named)

    async def claim(self, most: int = 200, max_bytes: int = 10**9, room: int = 200) -> list[Claimed]:
        return await self.store.claim(TURNS, [room], most, max_bytes)

    async def start(self, claims: list[Claimed]) -> list[int | Tried]:
        return await self.store.start([(claim.field, claim.message.decode()) for claim in claims], self.info)

    async def settle(self, claim: Claimed, meta: str = '{"status":"SUCCESS"}') -> int:
        task_id = claim.message.decode()
        settlement = Settlement(claim.field, task_id, "succeeded", meta, "events:c")
        return (await self.store.settle([settlement]))[0]


def failed(claim: Claimed, task_id: str, letter: Letter | None = None, stream: str = "") -> Settlement:
    """The settlement of a failure."""
    letter = letter or Letter(task_id, "m", "r", "e", 0)
    return Settlement(claim.field, task_id, "failed", '{"status":"FAILURE"}', stream, letter=letter)


@asynccontextmanager
async def worker(valkey: Valkey, name: str = "w1", **settings: object) -> AsyncIterator[Worker]:
    made = Worker(valkey.url, name, **settings)
    await made.beat()
    try:
        yield made
    finally:
        await made.named.close()
        await made.store.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def push(valkey: Valkey, *names: str, priority: int = 0) -> None:
    valkey.client.sadd(KEYS.queues, QUEUE)
    for name in names:
        valkey.client.lpush(keys.queue_list(QUEUE, priority), name)


def status(valkey: Valkey, task_id: str) -> str | None:
    raw = valkey.client.get(KEYS.meta_prefix + task_id)
    return json.loads(raw)["status"] if raw else None


def everywhere(valkey: Valkey) -> list[str]:
    """Every message, wherever it is: queued, in flight, dead."""
    client = valkey.client
    found = [message for key in LISTS for message in client.lrange(key, 0, -1)]
    for key in client.scan_iter("samphire:worker:*:inflight"):
        found += client.hvals(key)
    found += [value.partition(b" ")[2] for value in client.hvals(KEYS.scheduled_messages)]
    found += [client.hget(KEYS.dead_prefix + letter.decode(), "message") for letter in client.zrange(KEYS.dead, 0, -1)]
    return sorted(message.decode() for message in found)


def test_claims_move_the_oldest_first(valkey: Valkey) -> None:
    """What is claimed has left its list and lies in the in-flight hash."""

    async def test() -> None:
        push(valkey, "a", "b", "c")
        async with worker(valkey) as w:
            claimed = await w.claim(2)
        assert [claim.message for claim in claimed] == [b"a", b"b"]
        assert valkey.client.lrange(QUEUE, 0, -1) == [b"c"]
        inflight = valkey.client.hgetall("samphire:worker:w1:inflight")
        assert inflight == {claim.field.encode(): claim.message for claim in claimed}
        assert {claim.list_key for claim in claimed} == {QUEUE}

    run(test)


def test_priorities_share_a_claim_and_none_starves(valkey: Valkey) -> None:
    """Each priority gets its share first; what one leaves, the others take."""

    async def test() -> None:
        for priority in keys.PRIORITY_STEPS:
            push(valkey, *(f"{priority}-{i}" for i in range(50)), priority=priority)
        async with worker(valkey) as w:
            first = [claim.message.decode()[0] for claim in await w.claim(15)]
            assert {name: first.count(name) for name in "0369"} == {"0": 8, "3": 4, "6": 2, "9": 1}
            rest = [claim.message.decode()[0] for claim in await w.claim(185)]
        assert {name: rest.count(name) for name in "0369"} == {"0": 42, "3": 46, "6": 48, "9": 49}

    run(test)


def test_a_claim_is_bounded_in_bytes(valkey: Valkey) -> None:
    """A claim stops once it holds enough, but always takes one message."""

    async def test() -> None:
        push(valkey, *(str(i) * 1000 for i in range(10)))
        async with worker(valkey) as w:
            assert len(await w.claim(10, max_bytes=2500)) == 3
            assert len(await w.claim(10, max_bytes=1)) == 1

    run(test)


def test_a_claim_is_bounded_by_group(valkey: Valkey) -> None:
    """The lists of one group give no more together than its room; others may fill the claim."""

    async def test() -> None:
        push(valkey, *"abcdef")
        push(valkey, *"ghi", priority=6)
        valkey.client.lpush("inference.n", *"xyz")
        async with worker(valkey) as w:
            turns = [*TURNS, Turn("inference.n", 1, 1)]
            claimed = [c.message.decode() for c in await w.store.claim(turns, [4, 9], 100, 10**9)]
        assert sorted(claimed) == ["a", "b", "c", "d", "x", "y", "z"]

    run(test)


def test_of_an_oversize_message_only_the_end_is_returned(valkey: Valkey) -> None:
    """The whole of it stays on the broker."""

    async def test() -> None:
        push(valkey, "x" * 200_000 + "end")
        async with worker(valkey, max_message_bytes=100_000) as w:
            (claim,) = await w.claim()
            assert claim.size == 200_003
            assert len(claim.message) == 16384
            assert claim.message.endswith(b"end")
            (adopted,) = await w.store.adopt(set())
            assert adopted.size == claim.size
        assert valkey.client.hstrlen("samphire:worker:w1:inflight", claim.field) == 200_003

    run(test)


def test_a_key_that_is_no_list_gives_nothing_and_harms_nothing(valkey: Valkey) -> None:
    """A hostile key in a queue's place does not stop the claim of the others."""

    async def test() -> None:
        push(valkey, "a", priority=3)
        valkey.client.set(QUEUE, "not a list")
        async with worker(valkey) as w:
            assert [claim.message for claim in await w.claim()] == [b"a"]

    run(test)


def test_without_a_lease_nothing_is_claimed(valkey: Valkey) -> None:
    """A worker that was away too long must beat first."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            valkey.client.delete("samphire:worker:w1")
            with pytest.raises(LeaseLostError):
                await w.claim()
            assert valkey.client.llen(QUEUE) == 1
            assert await w.beat() == 1
            assert len(await w.claim()) == 1

    run(test)


def test_start_and_settle(valkey: Valkey) -> None:
    """A task is running, then done: acknowledged, stored, published, in the stream; all at once."""

    async def test() -> None:
        push(valkey, "a")
        pubsub = valkey.client.pubsub()
        pubsub.subscribe(KEYS.meta_prefix + "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            assert status(valkey, "a") is None
            assert await w.start([claim]) == [0]
            assert status(valkey, "a") == "STARTED"
            assert await w.settle(claim) == 1
        assert status(valkey, "a") == "SUCCESS"
        assert 0 < valkey.client.ttl(KEYS.meta_prefix + "a") <= 3600
        assert everywhere(valkey) == []
        assert not valkey.client.exists("samphire:worker:w1:inflight", "samphire:worker:w1:started")
        ((_, fields),) = valkey.client.xrange("samphire:events:c")
        assert fields == {b"succeeded": b"a", b"result": b'{"status":"SUCCESS"}'}
        messages = [pubsub.get_message(timeout=1) for _ in range(2)]
        assert messages[1] is not None and messages[1]["data"] == b'{"status":"SUCCESS"}'
        pubsub.close()

    run(test)


def test_a_settlement_counts_once(valkey: Valkey) -> None:
    """Repeated after a lost reply it changes nothing and says so."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            await w.start([claim])
            assert await w.settle(claim) == 1
            assert await w.settle(claim, '{"status":"FAILURE"}') == 0
        assert status(valkey, "a") == "SUCCESS"
        assert valkey.client.xlen("samphire:events:c") == 1

    run(test)


def test_a_stream_key_of_another_type_does_not_stop_a_settlement(valkey: Valkey) -> None:
    """Types are checked before the first write."""

    async def test() -> None:
        push(valkey, "a")
        valkey.client.set("samphire:events:c", "not a stream")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            await w.start([claim])
            assert await w.settle(claim) == 1
        assert status(valkey, "a") == "SUCCESS"

    run(test)


def test_a_duplicate_of_an_ended_task_is_dropped(valkey: Valkey) -> None:
    """A terminal state is written once."""

    async def test() -> None:
        push(valkey, "a", "a", "b")
        async with worker(valkey) as w:
            first, second, other = await w.claim()
            await w.start([first])
            await w.settle(first)
            assert await w.start([second, other]) == [-2, 0]
        assert status(valkey, "a") == "SUCCESS"
        assert everywhere(valkey) == ["b"]

    run(test)


def test_two_duplicates_under_way_end_once(valkey: Valkey) -> None:
    """Whoever is second, whatever it says, writes nothing; nor does a release take the result away."""

    async def test() -> None:
        push(valkey, "a", "a", "a", "a")
        async with worker(valkey) as w:
            one, two, three, four = await w.claim()
            assert await w.start([one, two, three, four]) == [0, 0, 0, 0]
            both = [
                Settlement(c.field, "a", "succeeded", f'{{"status":"SUCCESS","n":{n}}}', "events:c")
                for n, c in enumerate((one, two))
            ]
            assert await w.store.settle(both) == [1, 1]
            letter = failed(three, "a", stream="events:c")
            assert await w.store.settle([letter]) == [1]
            assert await w.store.release([four.field]) == 1
        assert json.loads(valkey.client.get(KEYS.meta_prefix + "a"))["n"] == 0
        assert valkey.client.xlen("samphire:events:c") == 1
        assert valkey.client.hlen("samphire:worker:w1:inflight") == 0

    run(test)


def test_a_duplicate_that_was_started_leaves_nothing_when_it_is_dropped(valkey: Valkey) -> None:
    """Its start is repeated after a lost reply; meanwhile the other has ended the task."""

    async def test() -> None:
        push(valkey, "a", "a")
        async with worker(valkey) as w:
            one, two = await w.claim()
            assert await w.start([one, two]) == [0, 0]
            assert await w.settle(one) == 1
            assert await w.start([two]) == [-2]
            assert not valkey.client.exists("samphire:worker:w1:inflight", "samphire:worker:w1:started")

    run(test)


def test_a_task_that_ends_in_the_batch_of_its_retry_is_not_remembered_as_tried(valkey: Valkey) -> None:
    """Two messages of it were under way; the lanes are not to look out for it until its lifetime is over."""

    async def test() -> None:
        push(valkey, "a", "a")
        async with worker(valkey) as w:
            one, two = await w.claim()
            await w.start([one, two])
            again = Settlement(one.field, "a", "retrying", "", "", retry=Later(60, "{}"))
            done = Settlement(two.field, "a", "succeeded", '{"status":"SUCCESS"}', "")
            assert await w.store.settle([again, done]) == [1, 1]
        assert not valkey.client.exists(KEYS.tried, "samphire:task:a")

    run(test)


def test_a_settlement_whose_start_was_lost_still_counts(valkey: Valkey) -> None:
    """The claim decides: a result is never thrown away with its message."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            assert await w.settle(claim) == 1
        assert status(valkey, "a") == "SUCCESS"

    run(test)


def test_names_that_are_no_queues_are_not_served(valkey: Valkey) -> None:
    """Whoever can write to the broker can write any name."""

    async def test() -> None:
        valkey.client.sadd(KEYS.queues, b"\xff\xfe", "celery", "inference.a@b@c", "inference.", "inference.good@t")
        for key in (b"inference.m\x06\x16x", b"inference.\xff", "inference.plain\x06\x163"):
            valkey.client.lpush(key, "x")
        async with worker(valkey) as w:
            assert await w.store.known_queues() == {"inference.good@t"}
            assert (await w.store.find_queues(0))[1] == {"inference.m", "inference.plain"}

    run(test)


def test_a_failed_task_becomes_a_dead_letter(valkey: Valkey) -> None:
    """With the original bytes, the reason and where it came from."""

    async def test() -> None:
        push(valkey, "a", priority=6)
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            letter = failed(claim, "a", Letter("a", "m", "invalid_input", "Error: bad", 2), stream="events:c")
            assert await w.store.settle([letter]) == [1]
            assert await w.store.settle([letter]) == [0]
        assert status(valkey, "a") == "FAILURE"
        kept = valkey.client.hgetall("samphire:dead:a")
        assert kept.pop(b"died_at")
        assert kept == {
            b"message": b"a",
            b"queue": QUEUE.encode(),
            b"list": keys.queue_list(QUEUE, 6).encode(),
            b"task_id": b"a",
            b"model": b"m",
            b"reason": b"invalid_input",
            b"error": b"Error: bad",
            b"attempts": b"2",
            b"worker": b"w1",
            b"history": b"[{}]",
            b"run": b"1",
            b"stream": b"events:c",
        }
        assert valkey.client.ttl("samphire:dead:a") > 0
        event = {b"failed": b"a", b"result": b'{"status":"FAILURE"}'}  # settled alone, and small
        assert [fields for _, fields in valkey.client.xrange("samphire:events:c")] == [event]

    run(test)


def test_next_steps_and_the_ends_of_others_are_committed_with_the_end(valkey: Valkey) -> None:
    """A lost claim commits none of them; a key of another type loses no message; an end stands once."""

    async def test() -> None:
        push(valkey, "a", "b")
        valkey.client.set("inference.text", "no list")
        valkey.client.set(KEYS.meta_prefix + "ended", '{"status":"SUCCESS"}')
        async with worker(valkey) as w, worker(valkey, "w2") as other:
            one, two = await w.claim()
            step = Settlement(
                one.field,
                "a",
                "succeeded",
                '{"status":"SUCCESS"}',
                "events:c",
                pushes=(("inference.n", "first"), ("inference.n", "second"), ("inference.text", "third")),
                others=(
                    OtherEnd("later", "failed", '{"status":"FAILURE"}', "events:d"),
                    OtherEnd("ended", "failed", '{"status":"FAILURE"}', "events:d"),
                ),
            )
            assert await other.store.settle([step]) == [0]
            assert not valkey.client.exists("inference.n")
            assert await w.store.settle([step]) == [1]
            assert await w.store.settle([step._replace(field=two.field)]) == [1]  # a duplicate owes nothing more
        assert valkey.client.lrange("inference.n", 0, -1) == [b"second", b"first"]
        assert valkey.client.lrange("inference.text:returned", 0, -1) == [b"third"]
        assert (status(valkey, "later"), status(valkey, "ended")) == ("FAILURE", "SUCCESS")
        assert [fields for _, fields in valkey.client.xrange("samphire:events:d")] == [{b"failed": b"later"}]

    run(test)


def test_a_result_to_be_ignored_leaves_nothing(valkey: Valkey) -> None:
    """Not even the running state."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as w:
            (claim,) = await w.claim()
            await w.start([claim])
            assert status(valkey, "a") == "STARTED"
            assert await w.settle(claim, "") == 1
        assert status(valkey, "a") is None

    run(test)


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


META = '{"status":"REVOKED","task_id":"","result":{}}'


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


def test_a_lost_workers_claims_return_and_only_started_ones_count(valkey: Valkey) -> None:
    """The late settlement of the lost worker is fenced off."""

    async def test() -> None:
        push(valkey, "a", "b", "c")
        async with worker(valkey) as lost, worker(valkey, "w2") as other:
            claims = await lost.claim()
            await lost.start(claims[:1])
            beat = (await other.store.others())["w1"]
            assert (await other.store.reap("w1", None, ATTEMPT)).moved == -1  # its lease still holds
            assert await other.store.reap("w1", beat, ATTEMPT) == (3, 1, 0)
            assert await lost.settle(claims[0]) == 0
            assert await lost.store.settle([failed(claims[1], "b")]) == [0]
            again = await other.claim()
            assert [claim.message for claim in again] == [b"a", b"b", b"c"]
            assert other.store.some_tried and not other.store.some_cancelled
            assert await other.start(again) == [Tried(1, 1, 0), 0, 0]
            assert await other.store.others() == {}
        assert everywhere(valkey) == ["a", "b", "c"]

    run(test)


def test_one_worker_is_alone_with_a_model(valkey: Valkey) -> None:
    """What others have under way is counted; they start nothing more of it until that is given back, or lapses."""

    async def test() -> None:
        valkey.client.sadd(KEYS.tried, "suspect")  # what was claimed before is tried elsewhere
        push(valkey, "a", "b", "c")
        async with worker(valkey) as one, worker(valkey, "w2") as other:
            claims = await other.claim()
            assert not any(claim.is_first for claim in claims)
            assert await other.start(claims[:1]) == [0]
            model = keys.parse_queue(QUEUE)[0]
            assert await one.store.alone(model + "x", 60) == 0
            assert await other.start(claims[1:2]) == [0]
            assert [await one.store.alone(whom, 60) for whom in (model, "")] == [2, 2]
            assert await other.store.is_another_alone(model) and not await one.store.is_another_alone(model)
            assert await other.store.alone("", 60) == -1
            assert await other.store.alone("", 0) == -1, "it is not its to give back"
            assert await other.start(claims) == [0, 0, Started.NOT_YET], "who has begun may go on"
            assert status(valkey, "c") is None
            for claim in claims[:2]:
                assert await other.settle(claim) == 1
            assert await one.store.alone(model, 60) == 0
            assert await one.store.alone(model, 0) == 0
            assert await other.start(claims[2:]) == [0]
            assert await one.store.alone("", 0.05) == 1
            eventually(lambda: not valkey.client.exists(KEYS.alone), 5, "its end")
            assert await one.store.alone("", 60) == 1
            assert [claim.message for claim in await other.store.adopt(set())] == [b"c"], "an earlier lane's"
            assert await one.store.alone("", 60) == 0, "it does not run any more"
            beat = (await other.store.others())["w1"]
            assert await other.store.reap("w1", beat, ATTEMPT) == (0, 0, 0)
            assert await other.store.alone("", 60) == 0

    run(test)


def test_a_worker_that_beats_is_not_reaped(valkey: Valkey) -> None:
    """A heartbeat between the look and the reap saves it."""

    async def test() -> None:
        push(valkey, "a")
        async with worker(valkey) as living, worker(valkey, "w2") as other:
            await living.claim()
            seen = (await other.store.others())["w1"]
            await living.beat()
            assert (await other.store.reap("w1", seen, ATTEMPT)).moved == -1
        assert valkey.client.hlen("samphire:worker:w1:inflight") == 1

    run(test)


def test_the_others_see_who_is_connected(valkey: Valkey) -> None:
    """By the name of the heartbeat's connection."""

    async def test() -> None:
        async with worker(valkey) as one, worker(valkey, "w2") as other:
            assert await other.store.connected() == {"w1", "w2"}
            await one.named.close()
            while await other.store.connected() != {"w2"}:  # the broker notices
                await asyncio.sleep(0.01)

    run(test)


def test_a_lost_reply_of_a_claim_loses_nothing(valkey: Valkey) -> None:
    """The reply is cut; nothing is claimed twice, and what was moved is adopted."""

    async def test() -> None:
        push(valkey, "a", "b", "c")
        async with cutting_proxy(valkey.url) as proxy:
            w = Worker(proxy.url, "w1")
            await w.beat()
            known = await w.claim(1)
            proxy.cut_next = True
            with pytest.raises(BrokerUnavailableError):
                await w.claim(1)
            assert proxy.cuts == 1
            assert valkey.client.hlen("samphire:worker:w1:inflight") == 2  # the script ran, and once only
            found = await w.store.adopt({claim.field for claim in known})
            assert [claim.message for claim in found] == [b"b"]
            assert everywhere(valkey) == ["a", "b", "c"]
            await w.store.close()
            await w.named.close()

    run(test)


def test_a_lost_reply_of_a_settlement_is_repeated_without_harm(valkey: Valkey) -> None:
    """The second time it is not ours any more; the result stands once."""

    async def test() -> None:
        push(valkey, "warm", "a")
        async with cutting_proxy(valkey.url) as proxy:
            w = Worker(proxy.url, "w1")
            await w.beat()
            warm, claim = await w.claim()
            await w.start([warm, claim])
            assert await w.settle(warm) == 1  # the server knows the script now
            proxy.cut_next = True
            with pytest.raises(BrokerUnavailableError):
                await w.settle(claim)
            assert proxy.cuts == 1
            assert await w.settle(claim) == 0
            assert status(valkey, "a") == "SUCCESS"
            assert valkey.client.xlen("samphire:events:c") == 2
            await w.store.close()
            await w.named.close()

    run(test)


def test_work_is_finished_when_memory_is_full(valkey: Valkey) -> None:
    """Claim, start, settle and fail go through at out-of-memory: they are what frees it."""

    async def test() -> None:
        push(valkey, "a", "b")
        valkey.client.config_set("maxmemory", "1mb")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            valkey.client.set("more", "x" * 100)
        async with Probe(valkey) as w:
            one, two = await w.claim()
            assert await w.start([one, two]) == [0, 0]
            assert await w.settle(one) == 1
            letter = failed(two, "b")
            assert await w.store.settle([letter]) == [1]
        assert (status(valkey, "a"), status(valkey, "b")) == ("SUCCESS", "FAILURE")

    run(test)


class Probe(Worker):
    """A worker that comes while the memory is full."""

    def __init__(self, valkey: Valkey) -> None:
        super().__init__(valkey.url, "w1")

    async def __aenter__(self) -> Worker:
        await self.store.enter()
        assert await self.beat() == 1
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.named.close()
        await self.store.close()


# -- submit ---------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_so(valkey: Valkey) -> None:
    """The limit counts all priorities; nothing of what is refused is written."""

    async def test() -> None:
        push(valkey, "a", "b", priority=9)
        publisher = Publisher(broker_of(valkey.url), queue_limit=3, blob_ttl_s=60)
        await publisher.publish(QUEUE, 0, [b"c"], [])
        with pytest.raises(QueueFullError, match=r"holds 3 messages; its limit is 3") as caught:
            await publisher.publish(QUEUE, 0, [b"d"], [("sub:blob:d:0", b"data")])
        assert caught.value.retryable and caught.value.retry_after_s
        assert everywhere(valkey) == ["a", "b", "c"]
        assert not valkey.client.exists("samphire:sub:blob:d:0")
        await publisher.close()

    run(test)


def test_submits_that_are_too_many_together_each_have_their_chance(valkey: Valkey) -> None:
    """Those that fit are queued although they travelled with those that do not."""

    async def test() -> None:
        publisher = Publisher(broker_of(valkey.url), queue_limit=3, blob_ttl_s=60)
        submits = [publisher.publish(QUEUE, 3, [str(i).encode()], []) for i in range(5)]
        results = await asyncio.gather(*submits, return_exceptions=True)
        assert [type(result) for result in results] == [str] * 3 + [QueueFullError] * 2
        assert everywhere(valkey) == ["0", "1", "2"]
        await publisher.close()

    run(test)


def test_a_full_broker_refuses_before_it_is_full(valkey: Valkey) -> None:
    """At 80 % of the memory, with a clear error."""

    async def test() -> None:
        used = int(valkey.client.info("memory")["used_memory"])
        valkey.client.config_set("maxmemory", str(int(used * 1.1)))
        publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=60)
        with pytest.raises(BrokerMemoryFullError, match="refused above 80 %") as caught:
            await publisher.publish(QUEUE, 0, [b"a"], [])
        assert caught.value.retryable and caught.value.retry_after_s
        assert everywhere(valkey) == []
        await publisher.close()

    run(test)


def test_a_submit_whose_reply_was_lost_is_carried_out_once(valkey: Valkey) -> None:
    """The caller need not know: it is asked again, and nothing is queued twice."""

    async def test() -> None:
        async with cutting_proxy(valkey.url) as proxy:
            publisher = Publisher(broker_of(proxy.url), queue_limit=0, blob_ttl_s=60)
            await publisher.publish(QUEUE, 0, [b"warm"], [])  # the server knows the script now
            for number in range(5):
                proxy.cut_next = True
                await publisher.publish(QUEUE, 0, [f"{number}".encode()], [(f"sub:blob:{number}:0", b"data")])
                assert proxy.cuts == number + 1
            await publisher.close()
        assert valkey.client.lrange(QUEUE, 0, -1) == [b"4", b"3", b"2", b"1", b"0", b"warm"]
        marks = list(valkey.client.scan_iter(f"{KEYS.once_prefix}*"))
        assert len(marks) == 6 and all(valkey.client.ttl(mark) > 0 for mark in marks)

    run(test)


def test_a_submit_writes_messages_and_claim_checks_and_wakes(valkey: Valkey) -> None:
    """Order is kept, claim checks expire, only an empty queue wakes."""

    async def test() -> None:
        pubsub = valkey.client.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe(KEYS.wake_channel)
        publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=60)
        await publisher.publish(QUEUE, 3, [str(i).encode() for i in range(2500)], [("sub:blob:1:0", b"data")])
        await publisher.publish(QUEUE, 6, [b"again"], [])
        oldest_first = valkey.client.lrange(keys.queue_list(QUEUE, 3), 0, -1)[::-1]
        assert oldest_first == [str(i).encode() for i in range(2500)]
        assert 0 < valkey.client.ttl("samphire:sub:blob:1:0") <= 60
        assert valkey.client.smembers(KEYS.queues) == {QUEUE.encode()}
        woken = [message for _ in range(4) if (message := pubsub.get_message(timeout=0.2))]
        assert len(woken) == 1
        pubsub.close()
        await publisher.close()

    run(test)


def test_closing_tells_those_who_still_submit(valkey: Valkey) -> None:
    """No future is left unresolved."""

    async def test() -> None:
        publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=60)
        await publisher.publish(QUEUE, 0, [b"a"], [])
        with standing_still(valkey.process.pid):
            submits = [asyncio.create_task(publisher.publish(QUEUE, 0, [str(i).encode()], [])) for i in range(5)]
            await asyncio.sleep(0.1)
            submits[0].cancel()
            await asyncio.sleep(0.1)
            await publisher.close()
            results = await asyncio.gather(*submits, return_exceptions=True)
        assert [type(result) for result in results[1:]] == [ClientClosedError] * 4
        with pytest.raises(ClientClosedError):
            await publisher.publish(QUEUE, 0, [b"b"], [])

    run(test)


def test_a_broker_that_is_away_is_named(valkey: Valkey) -> None:
    """A refused connection is `BrokerUnavailableError`, not redis-py's error."""

    async def test() -> None:
        publisher = Publisher(broker_of("redis://127.0.0.1:1/0"), queue_limit=0, blob_ttl_s=60)
        with pytest.raises(BrokerUnavailableError, match="the broker is away"):
            await publisher.publish(QUEUE, 0, [b"a"], [])

    run(test)
