"""The event log: positions, gaps, fences, restarts of the broker."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from samphire import AsyncClient, InvalidInputError, ModelFaultError, TaskEvent, UnknownTaskError
from samphire.wire.positions import ATTEMPTS, Place, parse_position
from samphire_broker.settings import Settings
from samphire_broker.store import Appended, LogEntry, Settlement, Store, Turn, WorkerInfo
from tests.proxy import cutting_proxy
from tests.stacks import Valkey, running_valkey
from tests.support.lane import broken, counting, held, in_a_loop, until, x
from tests.support.names import KEYS
from tests.test_streams import ENDS, all_of, check_whole, streaming, values

BAD_POSITIONS = ["", "-1", "0", "0-0", "$", "a.b.c.d", "1.1.1.1", "٣.1.1.1", "9" * 400, "a" * 20 + ".1.1." + "9" * 30]


@in_a_loop
async def test_a_malformed_position_is_an_error_that_names_it(valkey: Valkey) -> None:
    """Never a replay of everything: also another task's, one that is cut short, and an overflow."""
    async with streaming(valkey, counting(12)) as (_, _, client):
        one, other = await client.submit("m", x()), await client.submit("m", x())
        events = await all_of(one)
        await all_of(other)
        position = events[-2].position
        damaged = [position[:-1], position[1:], position.replace(".1.", ".2.", 1), position.upper() + " "]
        for bad in [*BAD_POSITIONS, *damaged]:
            for read in (one.events, one.stream):
                with pytest.raises(InvalidInputError, match="expected a position"):
                    await anext(read(bad))
        with pytest.raises(InvalidInputError, match="expected a position"):
            await anext(other.events(position))


@in_a_loop
async def test_two_readers_whenever_they_come_get_the_whole_truth(valkey: Valkey) -> None:
    """Before the start, after the end, after the lifetime of log and result."""
    async with streaming(valkey, counting(3), result_ttl_s=2) as (_, _, client), AsyncClient(valkey.url) as other:
        task = await client.submit("m", x(), delay_s=0.5)
        early, late = await asyncio.gather(all_of(task), all_of(other.task(task.id)))
        for events in (early, late):
            check_whole(events)
            assert values(events) == [0, 1, 2]
            assert events[0].kind == "snapshot"
        after = await all_of(other.task(task.id))
        check_whole(after)
        assert values(after) == [0, 1, 2]
        await until(lambda: not valkey.client.exists(KEYS.log_prefix + task.id, KEYS.meta_prefix + task.id), "its end")
        gone = await all_of(other.task(task.id))
        assert [(event.kind, event.status) for event in gone] == [("snapshot", "succeeded"), ("succeeded", "succeeded")]
        resumed = await all_of(other.task(task.id), after[1].position)
        assert [event.kind for event in resumed] == ["gap", "succeeded"]
        assert resumed[0].requested == after[1].position
        assert resumed[0].earliest is None


@in_a_loop
async def test_a_task_without_a_log_gives_a_snapshot_and_its_end(valkey: Valkey) -> None:
    """Nothing is invented, and nothing is kept of a task that does not stream and that nobody follows."""
    async with streaming(valkey, counting(1)) as (triton, _, client):
        triton.models.add("plain")
        task = await client.submit("plain", x())
        await task.result(timeout_s=20)
        assert not valkey.client.exists(KEYS.logs, KEYS.log_prefix + task.id)
        events = await all_of(task)
        assert [event.kind for event in events] == ["snapshot", "succeeded"]
        assert await all_of(task, events[-1].position) == []
        assert [event.kind for event in await all_of(task, events[0].position)] == ["succeeded"]


@in_a_loop
async def test_a_followed_task_tells_each_step(valkey: Valkey) -> None:
    """A task that fails, is tried again, and after its redrive fails once more: two runs, one end each."""
    async with streaming(valkey, counting(1)) as (triton, _, client):
        triton.models.add("plain")
        triton.behave["plain"] = broken
        task = await client.submit("plain", x(), max_attempts=2, delay_s=3.0)
        first = [event for event in await all_of(task) if event.kind not in ("snapshot", "scheduled")]
        kinds = [event.kind for event in first]
        assert kinds == ["queued", "started", "retrying", "queued", "started", "failed"]
        assert "the model raised" in first[2].message
        with pytest.raises(ModelFaultError):
            await task.result(timeout_s=20)
        await client.dead_letters.redrive([task.id])
        second = await all_of(client.task(task.id), first[-1].position)
        with pytest.raises(ModelFaultError):  # from the beginning on: the end of the last run counts
            await anext(client.task(task.id).stream())
        assert second[0].kind == "redriven"
        assert {event.run for event in second} == {2}
        assert [event.kind for event in second if event.kind in ENDS] == ["failed"]
        whole = [event.position for event in await all_of(client.task(task.id))]
        assert whole[-len(first) - len(second) :] == [event.position for event in [*first, *second]]


@in_a_loop
async def test_what_is_trimmed_is_said(valkey: Valkey) -> None:
    """Before the first event that is left, and in the middle of a reading; never a replay that looks whole."""
    async with streaming(valkey, counting(8)) as (_, _, client):
        task = await client.submit("m", x())
        whole = await all_of(task)
        key = KEYS.log_prefix + task.id
        valkey.client.delete(key)
        entries = [(f"{ATTEMPTS + 1}-{number}", number) for number in range(1, 10)]
        for entry_id, number in entries:  # one output an entry, as of a slow model
            fields: dict[Any, Any] = {"e": "progress", "t": "1.0", "p": f"{ATTEMPTS + 1}-{number - 1}", "d": "{}"}
            if number == 1:
                fields |= {"p": "0-0"}
            valkey.client.xadd(key, fields, id=entry_id)
        valkey.client.xadd(
            key, {"e": "succeeded", "t": "1", "p": f"{ATTEMPTS + 1}-9", "o": 8, "b": 32}, id=f"{ATTEMPTS + 1}-10"
        )
        valkey.client.xtrim(key, minid=f"{ATTEMPTS + 1}-5", approximate=False)
        fresh = await all_of(client.task(task.id))
        assert [event.kind for event in fresh] == ["gap", *["progress"] * 5, "succeeded"]
        assert fresh[0].requested is None
        assert fresh[0].earliest == fresh[1].position
        assert fresh[0].latest == fresh[-1].position
        assert not fresh[0].begins_anew
        resumed = await all_of(client.task(task.id), whole[1].position)
        assert [event.kind for event in resumed] == [event.kind for event in fresh]
        assert resumed[0].requested == whole[1].position
        reading = client.task(task.id).events(fresh[2].position)
        assert (await anext(reading)).position == fresh[3].position
        assert [event.position for event in await all_of(client.task(task.id), fresh[3].position)] == [
            event.position for event in fresh[4:]
        ]


@in_a_loop
async def test_a_log_that_is_deleted_under_its_reader(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a running task: a gap, and on; of an ended one: a gap and the end; of one that nobody knows: an error."""
    monkeypatch.setattr("samphire.client.following.LOOK_S", 0.3)
    go_on = asyncio.Event()
    async with streaming(valkey, held(3, go_on)) as (_, _, client):
        task = await client.submit("m", x())
        events = []
        async for event in task.events():
            events.append(event)
            if event.kind == "output" and event.index == 2:
                valkey.client.delete(KEYS.log_prefix + task.id)
            if event.kind == "gap":
                go_on.set()
        assert [event.kind for event in events if event.kind != "snapshot"][-3:] == ["gap", "output", "succeeded"]
        position = events[-2].position
        valkey.client.delete(KEYS.log_prefix + task.id)
        ended = await all_of(client.task(task.id), position)
        assert [(event.kind, event.status) for event in ended] == [("gap", "succeeded"), ("succeeded", "succeeded")]
        valkey.client.delete(KEYS.meta_prefix + task.id, KEYS.ended)
        with pytest.raises(UnknownTaskError):
            await all_of(client.task(task.id), position)


class Hands:
    """Two workers' hands on a store, and a task that the first has claimed and started."""

    def __init__(self, valkey: Valkey) -> None:
        self.settings = Settings(broker_url=valkey.url, lease_s=1)
        self.valkey = valkey
        self.stores: list[Store] = []

    async def worker(self) -> Store:
        """Another worker."""
        store = Store(self.settings, f"w{len(self.stores)}")
        self.stores.append(store)
        await store.beat(WorkerInfo(store.worker_id, "host", 1), store._rest)
        return store

    async def claimed(self, store: Store) -> str:
        """The claim of the one message that is queued, by this worker; started."""
        (claim,) = await store.claim([Turn("inference.m", 10, 0)], [10], 10, 10**6)
        await store.start([(claim.field, "t")], WorkerInfo(store.worker_id, "host", 1))
        return claim.field

    async def close(self) -> None:
        """Close all connections."""
        for store in self.stores:
            await store.close()

    def log(self) -> list[tuple[str, str]]:
        """Ids and events of the log."""
        return [
            (entry.decode(), fields[b"e"].decode())
            for entry, fields in self.valkey.client.xrange(KEYS.log_prefix + "t")
        ]


def entry(field: str, first: int, count: int = 1, data: bytes = b"\x90") -> LogEntry:
    """An entry of a log whose outputs have a byte each."""
    return LogEntry(field, "t", 1.0, first, count, "output", 2.0, first - 2 + count, first - 2 + count, data)


@in_a_loop
async def test_an_append_after_the_end_is_refused(valkey: Valkey) -> None:
    """A worker paused between its look and its append: the end stays the last entry, and the lifetime stays."""
    hands = Hands(valkey)
    store = await hands.worker()
    valkey.client.lpush("inference.m", "x")
    field = await hands.claimed(store)
    assert await store.append([entry(field, 2)]) == [Appended.WRITTEN]
    end = Settlement(field, "t", "cancelled", '{"status":"REVOKED"}', "")
    await store.settle([end])
    ttl = valkey.client.ttl(KEYS.log_prefix + "t")
    assert await store.append([entry(field, 3)]) == [Appended.LOST]
    assert hands.log() == [
        (f"{ATTEMPTS + 1}-1", "started"),
        (f"{ATTEMPTS + 1}-2", "output"),
        (f"{ATTEMPTS + 1}-3", "cancelled"),
    ]
    assert 0 < valkey.client.ttl(KEYS.log_prefix + "t") <= ttl
    assert not valkey.client.exists(KEYS.logs)
    await hands.close()


@in_a_loop
async def test_a_superseded_attempt_writes_nothing_more(valkey: Valkey) -> None:
    """A worker that was taken for lost comes back: neither its outputs nor its end are written."""
    hands = Hands(valkey)
    old, new = await hands.worker(), await hands.worker()
    valkey.client.lpush("inference.m", "x")
    stale = await hands.claimed(old)
    await old.append([entry(stale, 2)])
    valkey.client.delete(f"{KEYS.worker_prefix}{old.worker_id}")
    await new.reap(old.worker_id, None, '{"error":"lost"}')
    fresh = await hands.claimed(new)
    assert await new.append([entry(fresh, 2)]) == [Appended.WRITTEN]
    assert await old.append([entry(stale, 3)]) == [Appended.LOST]
    assert (await old.settle([Settlement(stale, "t", "succeeded", "{}", "")]))[0] == 0
    assert await old.release([stale]) == 0
    assert hands.log() == [
        (f"{ATTEMPTS + 1}-1", "started"),
        (f"{ATTEMPTS + 1}-2", "output"),
        (f"{ATTEMPTS + 1}-3", "queued"),
        (f"{ATTEMPTS + 2}-1", "started"),
        (f"{ATTEMPTS + 2}-2", "output"),
    ]
    await hands.close()


@in_a_loop
async def test_a_repeated_append_stands_once(valkey: Valkey) -> None:
    """The reply was lost: the entry is found. Something else in its place, a part of it, or a hole is refused."""
    hands = Hands(valkey)
    store = await hands.worker()
    valkey.client.lpush("inference.m", "x")
    field = await hands.claimed(store)
    for _ in range(2):
        assert await store.append([entry(field, 2, 3, b"abc")]) == [Appended.WRITTEN]
    stands = [(f"{ATTEMPTS + 1}-1", "started"), (f"{ATTEMPTS + 1}-4", "output")]
    assert hands.log() == stands
    assert await store.append([entry(field, 2, 3, b"xyz")]) == [Appended.OUTPUTS_LOST]
    assert await store.append([entry(field, 4, 3, b"bcd")]) == [Appended.OUTPUTS_LOST]
    assert await store.append([entry(field, 7, 1, b"d")]) == [Appended.OUTPUTS_LOST]
    assert hands.log() == stands
    assert await store.append([entry(field, 5, 1, b"d"), entry(field, 6, 1, b"e")]) == [Appended.WRITTEN] * 2
    assert hands.log() == [*stands, (f"{ATTEMPTS + 1}-5", "output"), (f"{ATTEMPTS + 1}-6", "output")]
    await hands.close()


@in_a_loop
async def test_lost_replies_neither_repeat_nor_drop_outputs(valkey: Valkey) -> None:
    """Every reply in its turn is cut between worker and broker: what the reader gets is whole."""
    async with cutting_proxy(valkey.url) as proxy:
        through = Valkey(proxy.url, valkey.client, valkey.process)
        async with streaming(through, counting(30)) as (_, _, client):
            task = await client.submit("m", x())
            check_whole(await all_of(task))
            for after in range(0, 24, 2):
                task = await client.submit("m", x())
                proxy.cut("reply", after)
                events = await all_of(task)
                proxy.disarm()
                check_whole(events)
                assert events[-1].kind == "succeeded"
                last_attempt = [event for event in events if event.attempt == events[-1].attempt]
                assert values(last_attempt) == list(range(30))
        assert proxy.cuts > 6


@in_a_loop
async def test_a_position_of_another_epoch_is_a_gap(valkey: Valkey) -> None:
    """Below, at and above the newest event: the log is read anew, and the reader knows."""
    async with streaming(valkey, counting(4)) as (_, _, client):
        task = await client.submit("m", x())
        await all_of(task)
        events = await all_of(client.task(task.id))
        epoch, place = parse_position(task.id, events[-1].position)
        for seq in (2, place.seq, 100):
            foreign = Place(place.major, seq).position(task.id, "0123456789ab")
            resumed = await all_of(client.task(task.id), foreign)
            assert resumed[0].kind == "gap"
            assert resumed[0].begins_anew
            assert resumed[0].requested == foreign
            assert [event.position for event in resumed[1:]] == [event.position for event in events]
        above = Place(place.major, 100).position(task.id, epoch)
        resumed = await all_of(client.task(task.id), above)
        assert [event.position for event in resumed[1:]] == [event.position for event in events]


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_positions_over_a_restart_of_the_broker(tmp_path: Path, fsync: str) -> None:
    """`always` makes no gap; in `everysec`, cut back as by a power failure, no position has two meanings.

    The worker and the reader survive, with more outputs than the broker has kept.
    """
    folder, options = tmp_path / "valkey", ("--appendfsync", fsync)

    async def scene() -> None:
        more, end = asyncio.Event(), asyncio.Event()
        with running_valkey(folder, *options) as valkey:
            port = int(valkey.url.rsplit(":", 1)[1].split("/")[0])
            async with streaming(valkey, held(3, more, 2, end), lease_s=30.0) as (_, _, client):
                task = await client.submit("m", x())
                (log,) = (folder / "appendonlydir").glob("*.incr.aof")
                kept, events = 0, list[TaskEvent]()
                async for event in task.events():
                    events.append(event)
                    if event.kind == "output" and event.index == 2:
                        kept = log.stat().st_size
                        more.set()
                    if event.kind == "output" and event.index == 4:
                        break
                delivered = {event.position: values([event]) for event in events}
                valkey.process.kill()
                valkey.process.wait()
                if fsync == "everysec":
                    assert kept < log.stat().st_size
                    os.truncate(log, kept)
                with running_valkey(folder, *options, port=port):
                    reading = asyncio.ensure_future(all_of(client.task(task.id), events[-1].position))
                    await asyncio.sleep(0.2)  # whether it comes before the first worker or after it
                    end.set()
                    resumed = await reading
                    for event in resumed:
                        assert delivered.get(event.position, values([event])) == values([event])
                    whole = await all_of(client.task(task.id))
                    check_whole(whole)
                    assert values([event for event in whole if event.attempt == whole[-1].attempt]) == list(range(6))
                    gaps = [event for event in resumed if event.kind == "gap"]
                    assert bool(gaps) == (fsync == "everysec")
                    if fsync == "always":
                        assert values(resumed) == [5]
                    else:
                        assert not {event.position for event in whole} & set(delivered)

    asyncio.run(scene())
