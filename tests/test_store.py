"""The scripts, on a real server: every transition, every fence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import redis

from samphire.errors import BrokerUnavailableError
from samphire.transport.address import Address
from samphire.transport.direct import DirectConnection
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import (
    Claimed,
    LeaseLostError,
    Letter,
    Settlement,
    Started,
    Store,
    Tried,
    Turn,
    WorkerInfo,
)
from tests.proxy import cutting_proxy
from tests.stacks import Valkey, eventually
from tests.support.names import KEYS

QUEUE = "inference.m"
META = '{"status":"REVOKED","task_id":"","result":{}}'


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
