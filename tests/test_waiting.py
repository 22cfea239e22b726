"""Whoever waits is told: also where the stream of events cannot tell, because it is short, or was not read."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import redis

from samphire import AsyncClient, Client, InferResult, ResultExpiredError
from samphire.transport.address import Address
from samphire.transport.direct import DirectConnection
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import Settlement, Store, Turn, WorkerInfo
from samphire_broker.store.records import STREAM_MAX_LENGTH
from tests.stacks import Valkey, eventually
from tests.support.names import KEYS

MANY = 2 * STREAM_MAX_LENGTH + 500
TIMEOUT_S = 30
TURN = Turn(keys.queue_list(keys.queue_name("m"), keys.PRIORITIES["normal"]), 1000, 0)
_ID = re.compile(rb'"correlation_id":"([^"]+)"')
_STREAM = re.compile(rb'"samphire_stream":"([^"]+)"')


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow sweep over all that is awaited is a net below: nothing here may need it."""
    monkeypatch.setattr("samphire.client.waiter.SWEEP_S", 3600.0)


class LoneSettler:
    """Ends every task alone, with an event of its own: what a worker does whose tasks come one by one."""

    def __init__(self, url: str) -> None:
        self.store = Store(Settings(broker_url=url), "w1")
        self._named = DirectConnection(Address.parse(url), name=KEYS.connection_prefix + "w1")

    async def settle(self, most: int) -> int:
        """End up to so many tasks; each answers `y`, FP32 [1], 1.0."""
        await self.store.beat(WorkerInfo("w1", "w1@host", 1), self._named)
        claims = []
        while len(claims) < most and (
            found := await self.store.claim([TURN], [1000], min(most - len(claims), 1000), 10**9)
        ):
            claims += found
        for claim in claims:
            task_id, stream = _found(_ID, claim.message), _found(_STREAM, claim.message)
            output = '{"name":"y","datatype":"FP32","shape":[1],"raw":"AACAPw=="}'
            answer = f'{{"model_name":"m","model_version":"1","outputs":[{output}]}}'
            meta = f'{{"status":"SUCCESS","task_id":"{task_id}","result":{answer},"traceback":null,"children":[]}}'
            await self.store.settle([Settlement(claim.field, task_id, "succeeded", meta, stream)])
        return len(claims)

    async def close(self) -> None:
        await self.store.close()
        await self._named.close()


def _found(pattern: re.Pattern[bytes], message: bytes) -> str:
    found = pattern.search(message)
    assert found is not None
    return found[1].decode()


@asynccontextmanager
async def settler(url: str) -> AsyncIterator[LoneSettler]:
    made = LoneSettler(url)
    try:
        yield made
    finally:
        await made.close()


def settle(url: str, most: int) -> None:
    async def run() -> None:
        async with settler(url) as made:
            assert await made.settle(most) == most

    asyncio.run(run())


def reads(client: redis.Redis) -> int:
    """Round trips that were made to look at results."""
    stats = client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("mget", "get"))


def right(result: InferResult) -> bool:
    return result.outputs["y"].tolist() == [1.0]


def inputs() -> dict[str, np.ndarray]:
    return {"x": np.ones(1, np.float32)}


def cut_all(client: redis.Redis) -> None:
    assert client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") > 0


def test_many_are_submitted_and_then_read_one_by_one(valkey: Valkey) -> None:
    """The plainest loop there is: all are there already, most of their events are trimmed; each costs one look."""
    with Client(valkey.url, validate=False) as client:
        tasks = [client.submit("m", inputs()) for _ in range(MANY)]
        settle(valkey.url, MANY)
        kept = valkey.client.xlen(KEYS.own(keys.STREAM_PREFIX) + _stream_of(client))
        assert kept < MANY / 2, "most events are trimmed"
        before = reads(valkey.client)
        assert all(right(task.result(TIMEOUT_S)) for task in tasks)
        assert reads(valkey.client) - before <= MANY


def _stream_of(client: Client) -> str:
    return client._client._session.stream.removeprefix(keys.STREAM_PREFIX)


def test_the_same_asynchronously(valkey: Valkey) -> None:
    """One by one, and those that are awaited together are looked at together."""

    async def test() -> None:
        async with AsyncClient(valkey.url, validate=False) as client, settler(valkey.url) as worker:
            tasks = [await client.submit("m", inputs()) for _ in range(MANY)]
            assert await worker.settle(MANY) == MANY
            for task in tasks[: MANY // 2]:
                assert right(await task.result(TIMEOUT_S))
            before = reads(valkey.client)
            async with asyncio.timeout(TIMEOUT_S):
                rest = await asyncio.gather(*(task.result() for task in tasks[MANY // 2 :]))
            assert len(rest) == MANY - MANY // 2 and all(map(right, rest))
            assert reads(valkey.client) - before <= MANY // 20

    asyncio.run(test())


def test_more_have_ended_unread_than_are_noted(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is looked at all the same."""
    monkeypatch.setattr("samphire.client.waiter.PASSED_MAX", 10)
    with Client(valkey.url, validate=False) as client:
        first = client.submit("m", inputs())
        settle(valkey.url, 1)
        assert right(first.result(TIMEOUT_S)), "the stream is being followed"
        tasks = [client.submit("m", inputs()) for _ in range(35)]
        settle(valkey.url, len(tasks))
        passed = client._client._session.waiter._passed
        eventually(lambda: tasks[-1].id in passed, TIMEOUT_S, "the last event")
        assert len(passed) <= 10
        assert all(right(task.result(TIMEOUT_S)) for task in tasks)
        last = client.submit("m", inputs())
        settle(valkey.url, 1)
        assert right(last.result(TIMEOUT_S))


def test_after_a_reconnect(valkey: Valkey) -> None:
    """What ends while the client is cut off is found although its events are trimmed; so is what ends afterwards."""
    with Client(valkey.url, validate=False) as client:
        first = client.submit("m", inputs())
        settle(valkey.url, 1)
        assert right(first.result(TIMEOUT_S)), "the stream is being followed"
        tasks = [client.submit("m", inputs()) for _ in range(MANY)]
        cut_all(valkey.client)
        settle(valkey.url, MANY)
        assert all(right(task.result(TIMEOUT_S)) for task in tasks)
        last = client.submit("m", inputs())
        settle(valkey.url, 1)
        assert right(last.result(TIMEOUT_S))


def test_events_that_are_trimmed_before_they_are_read(valkey: Valkey) -> None:
    """A client that is awaited by nobody for a while, or is slow: those who wait are told as soon as it reads again."""

    async def test() -> None:
        async with AsyncClient(valkey.url, validate=False) as client, settler(valkey.url) as worker:
            tasks = [await client.submit("m", inputs()) for _ in range(MANY)]
            waiting = [asyncio.create_task(task.result()) for task in tasks]
            await asyncio.sleep(0)
            async with client._session.waiter._events._lock:  # its reader stands still
                assert await worker.settle(MANY) == MANY
            async with asyncio.timeout(TIMEOUT_S):
                assert all(map(right, await asyncio.gather(*waiting)))

    asyncio.run(test())


@pytest.mark.parametrize("late", ["the broker's clock", "nothing"])
def test_a_stream_that_begins_again(valkey: Valkey, late: str) -> None:
    """The stream is gone: it begins again with smaller ids where the broker's clock went back, and is heard."""
    with Client(valkey.url, validate=False) as client:
        stream = keys.STREAM_PREFIX + _stream_of(client)
        if late == "the broker's clock":
            valkey.client.xadd(stream, {"noise": "1"}, id="99999999999999-0")
        first = client.submit("m", inputs())
        with pytest.raises(TimeoutError):
            first.result(0.5)  # it has read the stream
        valkey.client.delete(stream)
        cut_all(valkey.client)
        settle(valkey.url, 1)
        assert right(first.result(TIMEOUT_S))
        second = client.submit("m", inputs())
        settle(valkey.url, 1)
        assert right(second.result(TIMEOUT_S))


@pytest.mark.parametrize("how", ["the client that has waited", "the client that has not", "another client"])
def test_a_result_that_has_expired_is_told(valkey: Valkey, how: str) -> None:
    """Whoever asks for it later: nobody waits for what cannot come; its state stays known."""
    with Client(valkey.url, validate=False) as client, Client(valkey.url) as other:
        followed = client.submit("m", inputs())
        if how == "the client that has waited":
            settle(valkey.url, 1)
            assert right(followed.result(TIMEOUT_S)), "the stream is being followed"
        task = client.submit("m", inputs())
        settle(valkey.url, 1 if how == "the client that has waited" else 2)
        valkey.client.delete(KEYS.meta_prefix + task.id)  # its lifetime is over
        if how == "the client that has waited":
            passed = client._client._session.waiter._passed
            eventually(lambda: task.id in passed, TIMEOUT_S, "its event, unheeded")
        asked = other.task(task.id) if how == "another client" else task
        if how == "the client that has not":
            assert right(asked.result(TIMEOUT_S)), "the event of a task that was settled alone has its result"
        else:
            with pytest.raises(ResultExpiredError, match="succeeded"):
                asked.result(TIMEOUT_S)
        assert asked.status() == "succeeded"
