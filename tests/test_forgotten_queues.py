"""Queues that are empty and that nobody uses: they cost nothing, and come back with their first message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from celery import Celery

from samphire import AsyncClient
from samphire.wire import keys
from samphire_broker.store import Looked
from samphire_workers.queues import discovery as discovery
from samphire_workers.queues.round_robin import QUEUES_A_PLAN, RoundRobin
from tests.stacks import Valkey
from tests.support.lane import LaneWorker, body, fake_triton, lane_worker, state, until, x
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.test_store import run, worker

TENANTS = [f"inference.m@t{number}" for number in range(QUEUES_A_PLAN + 6)]


@pytest.mark.parametrize("priority", keys.PRIORITY_STEPS)
def test_a_queue_that_holds_something_is_not_forgotten(valkey: Valkey, priority: int) -> None:
    """Whatever the priority of its messages; looking and forgetting are one step."""

    async def test() -> None:
        names = ["inference.m@empty", "inference.m@full", "inference.m@young"]
        valkey.client.sadd(KEYS.queues, *names)
        valkey.client.lpush(keys.queue_list(names[1], priority), "a")
        async with worker(valkey) as w:
            assert await w.store.look_at_queues(names[:2], names[2:]) == [Looked.FORGOTTEN, 1, 0]
            assert await w.store.known_queues() == set(names[1:])
            assert await w.store.look_at_queues([], names) == [0, 1, 0]

    run(test)


def test_a_set_of_queues_that_is_none_stops_nothing(valkey: Valkey) -> None:
    """Then nothing is forgotten."""

    async def test() -> None:
        valkey.client.set(KEYS.queues, "junk")
        async with worker(valkey) as w:
            assert await w.store.look_at_queues(["inference.m"], []) == [0]

    run(test)


def test_a_lost_workers_messages_name_their_queue(valkey: Valkey) -> None:
    """It may have been forgotten while they were held."""

    async def test() -> None:
        valkey.client.lpush("inference.m", "a")
        async with worker(valkey) as lost, worker(valkey, "w2") as other:
            await lost.claim()
            await other.store.reap("w1", (await other.store.others())["w1"], "{}")
            assert await other.store.known_queues() == {"inference.m"}

    run(test)


def test_claims_look_into_no_queue_that_was_set_aside() -> None:
    """Until it is taken up, or named."""
    round_robin = RoundRobin({})
    round_robin.add(TENANTS)
    assert round_robin.rounds == 2 and round_robin.are_many
    round_robin.set_aside(TENANTS[1:])
    assert round_robin.rounds == 1
    assert {keys.split_list(turn.list_key)[0] for turn in round_robin.plan(9, ()).turns} == {TENANTS[0]}
    named = round_robin.plan(9, (), [TENANTS[5]])
    assert {keys.split_list(turn.list_key)[0] for turn in named.turns} == {TENANTS[5]}
    assert round_robin.queues == sorted(TENANTS) and round_robin.add(TENANTS) == []
    round_robin.take_up(TENANTS[:2])
    assert round_robin.in_use == TENANTS[:2]
    round_robin.forget(TENANTS[1:])
    assert round_robin.queues == round_robin.in_use == TENANTS[:1]
    assert round_robin.add(TENANTS[1:2]) == TENANTS[1:2]


ALWAYS = {"inference", keys.WEBHOOKS}


def _known(w: LaneWorker) -> set[str]:
    return set(w.lane.queues())


def send(app: Celery, queue: str, priority: int = 0) -> str:
    return str(app.send_task("samphire.infer", kwargs=body("m"), queue=queue, priority=priority).id)


async def _done(valkey: Valkey, task_ids: list[str]) -> None:
    await until(lambda: {state(valkey.client, task_id) for task_id in task_ids} == {"SUCCESS"}, "all of them")


def test_queues_come_back_with_their_first_message(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the SDK, those of plain producers; the queues of models stay."""
    monkeypatch.setattr(discovery, "FORGET_S", 1.0)
    monkeypatch.setattr(discovery, "COLD_S", 0.3)

    async def test() -> None:
        valkey.client.sadd(KEYS.queues, *TENANTS)
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton) as w:
            await until(lambda: set(TENANTS) < _known(w), "the tenants' queues")
            await until(lambda: _known(w) == {*ALWAYS, "inference.m"}, "their end")
            await until(lambda: valkey.client.scard(KEYS.queues) <= 1, "the end of their names")
            async with AsyncClient(valkey.url, tenant="t3") as sdk:
                for _ in range(2):
                    answer = await (await sdk.submit("m", x())).result(10)
                    assert answer.outputs["y"].tolist() == [[2.0]]
                    assert TENANTS[3] in _known(w)
                    await until(lambda: _known(w) == {*ALWAYS, "inference.m"}, "the end of one")
            with plain_celery(valkey.url) as app:
                for priority in (0, 6):
                    await _done(valkey, [send(app, TENANTS[7], priority)])
                monkeypatch.setattr(discovery, "FORGET_S", 60.0)
                await _done(valkey, [send(app, TENANTS[7])])
                await until(lambda: TENANTS[7] in w.watch._peeks, "its peek")
                monkeypatch.setattr(discovery, "FORGET_S", 1.0)
            await until(lambda: _known(w) == {*ALWAYS, "inference.m"}, "the end of a plain one")
            await until(lambda: set(w.watch._peeks) == {"inference", "inference.m"}, "the end of its peek")

    run(test)


def test_a_forgotten_queue_is_seen_before_a_scan_finds_it(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of a large database takes minutes; here it finds nothing."""
    monkeypatch.setattr(discovery, "FORGET_S", 1.0)

    async def test() -> None:
        valkey.client.sadd(KEYS.queues, "inference.m@acme")
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton) as w:
            monkeypatch.setattr(w.lane._store, "find_queues", nothing_found)
            await until(lambda: "inference.m@acme" in _known(w), "the tenant's queue")
            await until(lambda: _known(w) == {*ALWAYS, "inference.m"}, "its end")
            with plain_celery(valkey.url) as app:
                await _done(valkey, [send(app, "inference.m@acme")])

    run(test)


async def nothing_found(cursor: int) -> tuple[int, set[str]]:
    return 0, set()


def test_nobody_asks_for_the_models_of_queues_that_are_empty(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may submit can name as many as they like; the one that holds something is served."""
    monkeypatch.setattr(discovery, "FORGET_S", 1.0)

    async def test() -> None:
        valkey.client.sadd(KEYS.queues, *(f"inference.m{number}" for number in range(3000)))
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton) as w:
            asked: list[str] = []
            known = w.lane._served.checker

            async def noting(model: str, *arguments: Any) -> Any:
                asked.append(model)
                return await known(model, *arguments)

            monkeypatch.setattr(w.lane._served, "checker", noting)
            await until(lambda: len(_known(w)) > 3000, "the names")
            with plain_celery(valkey.url) as app:
                await _done(valkey, [send(app, "inference.m")])
            await until(lambda: _known(w) == {*ALWAYS, "inference.m"}, "the end of the others")
            assert len(set(asked)) <= QUEUES_A_PLAN, "those that were left when there were few"
            assert valkey.client.scard(KEYS.queues) <= 1

    run(test)


def test_names_that_are_no_queues_are_taken_out(valkey: Valkey) -> None:
    """Whoever may submit can write them; each would be looked at for ever."""

    async def test() -> None:
        junk = ["nonsense", "inference.", "inference.m\x06\x163", b"\xff", *(f"inference m{n}" for n in range(3000))]
        valkey.client.sadd(KEYS.queues, "inference.m", *junk)
        async with worker(valkey) as w:
            assert await w.store.known_queues() == {"inference.m"}
            assert valkey.client.smembers(KEYS.queues) == {b"inference.m"}

    run(test)


def test_what_waits_for_its_time_names_its_queue(valkey: Valkey) -> None:
    """It may have been forgotten meanwhile; and a call moves a bounded number of bytes."""

    async def test() -> None:
        large = "x" * (7 * 2**20)
        for number in range(4):
            valkey.client.zadd(KEYS.scheduled, {f"t{number}": number})
            valkey.client.hset(KEYS.scheduled_messages, f"t{number}", f"inference.m {number}{large}")
        async with worker(valkey) as w:
            assert await w.store.return_due() == 2
            assert await w.store.known_queues() == {"inference.m"}
            assert await w.store.return_due() == 2
        messages = [message[:1] for message in valkey.client.lrange("inference.m", 0, -1)]
        assert messages == [b"1", b"0", b"3", b"2"], "within a call what is due first stands at the head"

    run(test)


def test_many_tenants_with_messages_are_all_served(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """While their queues are set aside, and forgotten, and come back."""
    monkeypatch.setattr(discovery, "FORGET_S", 0.6)
    monkeypatch.setattr(discovery, "COLD_S", 0.1)

    async def test() -> None:
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                for _ in range(3):
                    for queues in (TENANTS, TENANTS[::7]):
                        await _done(valkey, [send(app, queue) for queue in queues])
                        await asyncio.sleep(0.3)

    run(test)
