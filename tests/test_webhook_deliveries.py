"""Deliveries over time and over workers: limits, order, breakers, lost workers, and faults of this side's own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from samphire import AsyncClient, AsyncTask
from samphire.wire.keys import delivery_queue
from samphire_broker.webhooks.endpoint import encode
from samphire_workers.webhooks.health import FAILURES_TO_OPEN, Health
from tests.stacks import Valkey, running_valkey
from tests.support.lane import broken, fake_triton, in_a_loop, until, x
from tests.support.names import KEYS
from tests.support.receiver import Received, Receiver, after, never, ok, receiver, status
from tests.support.webhooks import Hooks
from tests.test_clocks import faketime as faketime
from tests.test_outages import held


@pytest.fixture
def hooks(valkey: Valkey, tmp_path: Path) -> Hooks:
    return Hooks(valkey, tmp_path)


async def arrive(to: Receiver, count: int, timeout_s: float = 20.0) -> None:
    await until(lambda: len(to.got) >= count, f"{count} webhooks, not {len(to.got)},", timeout_s)


async def submit(client: AsyncClient, webhook: str, count: int) -> list[AsyncTask]:
    return [await client.submit("one", x(), webhook=webhook) for _ in range(count)]


async def ended(tasks: list[AsyncTask]) -> None:
    for task in tasks:
        await task.result(timeout_s=20)


def waiting(hooks: Hooks, name: str) -> int:
    return int(hooks.valkey.client.zcard(KEYS.waiting_deliveries(name)))


def attempts_of(hooks: Hooks, name: str) -> list[int]:
    """Attempts of each delivery that has ended."""
    found = []
    for raw in hooks.valkey.client.zrange(KEYS.ended_deliveries(name), 0, -1):
        found.append(len(json.loads(hooks.valkey.client.hget(KEYS.delivery(raw.decode()), "attempts") or b"[]")))
    return found


@in_a_loop
async def test_a_receiver_has_its_whole_time_however_many_wait(hooks: Hooks) -> None:
    """One at a time, each a little under the limit: all arrive at their first attempt."""

    async def slow(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.2)
        await ok(to, received, writer)

    async with receiver(slow) as to, fake_triton("one") as triton:
        hooks.add("orders", to, concurrency=1)
        async with hooks.worker(triton, webhook_timeout_s=2.0), AsyncClient(hooks.valkey.url) as client:
            await submit(client, "orders", 4)
            await until(lambda: len(attempts_of(hooks, "orders")) == 4, "their ends")
            assert attempts_of(hooks, "orders") == [1] * 4 and to.most_at_once == 1


@in_a_loop
async def test_an_endpoint_that_hangs_delays_no_other_and_no_task(hooks: Hooks) -> None:
    """It holds as many as it may, and the rest lies in its queue."""
    async with receiver(never) as dead, receiver() as alive, fake_triton("one") as triton:
        hooks.add("dead", dead, concurrency=3)
        hooks.add("alive", alive)
        async with hooks.worker(triton, inflight_max=4, webhook_timeout_s=30), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "dead", 40))
            await arrive(dead, 3)
            await ended(await submit(client, "alive", 100))
            await arrive(alive, 100)
            assert len(dead.got) == 3 and waiting(hooks, "dead") == 40
            assert hooks.valkey.client.llen(KEYS.of_celery(delivery_queue("dead"))) == 37


@in_a_loop
async def test_what_has_ended_is_told_while_no_triton_is_there(hooks: Hooks) -> None:
    """Deliveries and tests need none; the tasks that wait for it stay in their queue."""
    gate = asyncio.Event()
    async with receiver(after(gate)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, concurrency=1)
        async with hooks.worker(triton, webhook_timeout_s=60) as worker, AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "orders", 20))
            triton.is_up = False
            await until(lambda: not worker.endpoints.some_ready.is_set(), "the outage")
            late = await submit(client, "orders", 3)
            gate.set()
            await arrive(to, 20)
            with hooks.deliveries() as book:
                assert (await asyncio.to_thread(book.test, "orders"))["status"] == 200
            assert {await task.status() for task in late} == {"queued"} and len(to.got) == 21
            triton.is_up = True
            await arrive(to, 24)


@in_a_loop
async def test_more_deliveries_than_there_is_room_for_all_arrive(hooks: Hooks) -> None:
    """Over several endpoints and two workers, each once."""
    async with receiver() as one, receiver() as two, fake_triton("one") as triton:
        hooks.add("one", one)
        hooks.add("two", two)
        async with (
            hooks.worker(triton, webhook_inflight_max=5),
            hooks.worker(triton, webhook_inflight_max=5),
            AsyncClient(hooks.valkey.url) as client,
        ):
            tasks = [await client.submit("one", x(), webhook=("one", "two")[n % 2]) for n in range(300)]
            await ended(tasks)
            await until(lambda: not waiting(hooks, "one") and not waiting(hooks, "two"), "all ends")
            assert len(one.got) == len(two.got) == 150
            assert len(set(one.ids()) | set(two.ids())) == 300


@in_a_loop
async def test_an_endpoint_with_nothing_waiting_takes_no_place(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the few that there are: no delivery waits until the worker looks again by the clock."""
    monkeypatch.setattr("samphire_workers.lane.claim_loop.IDLE_CHECK_S", 1000.0)
    async with receiver() as one, receiver() as two, fake_triton("one") as triton:
        hooks.add("one", one)
        hooks.add("two", two)
        async with hooks.worker(triton, webhook_inflight_max=5), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "one", 5))
            await arrive(one, 5)
            await ended(await submit(client, "two", 100))
            await until(lambda: not waiting(hooks, "two"), "all ends")
            assert len(two.got) == 100


@in_a_loop
async def test_events_of_a_task_go_in_order_where_that_is_asked_for(hooks: Hooks) -> None:
    """Only the same task's later events wait; once the earlier is a dead letter, they go."""
    failing = asyncio.Event()

    async def respond(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        started = json.loads(received.body)["type"] == "task.started"
        await (status(500) if started and failing.is_set() else ok)(to, received, writer)

    async with receiver(respond) as to, fake_triton("one") as triton:
        hooks.add("orders", to, events=("started", "terminal"), ordered=True, schedule_s=(0, 1.0))
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            failing.set()
            stuck = (await submit(client, "orders", 1))[0]
            await arrive(to, 1)
            failing.clear()
            others = {task.id for task in await submit(client, "orders", 5)}
            await until(lambda: len(of(to, others)) == 10, "the events of the others")
            assert [event["type"] for event in of(to, {stuck.id})] == ["task.started"]
            failing.set()
            await until(lambda: len(of(to, {stuck.id})) == 3, "the end of the first")
            assert [event["type"] for event in of(to, {stuck.id})] == ["task.started"] * 2 + ["task.succeeded"]
            for task_id in others:
                assert [event["type"] for event in of(to, {task_id})] == ["task.started", "task.succeeded"]
            await until(lambda: not waiting(hooks, "orders"), "all ends")
            assert not list(hooks.valkey.client.scan_iter("*webhook:order:*"))


@in_a_loop
async def test_a_redriven_delivery_takes_no_turn_of_another(hooks: Hooks) -> None:
    """It has had its turn: the end of the task waits for the second start, which is under way."""
    gate, seen = asyncio.Event(), list[str]()

    async def respond(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        is_new = received.id not in seen
        seen.extend([received.id] * is_new)
        number = seen.index(received.id)
        if number == 1:
            await gate.wait()
        await (status(500) if number == 0 and is_new else ok)(to, received, writer)

    failures = [broken]

    async def fails_once(context: Any) -> None:
        if failures:
            await failures.pop()(context)

    async with receiver(respond) as to, fake_triton("one") as triton:
        triton.behave["one"] = fails_once
        hooks.add("orders", to, events=("started", "terminal"), ordered=True, schedule_s=(0,))
        quick = {"backoff_base_s": 0.01, "backoff_cap_s": 0.02}
        async with hooks.worker(triton, max_attempts=2, **quick), AsyncClient(hooks.valkey.url) as client:
            (task,) = await submit(client, "orders", 1)
            await ended([task])
            await arrive(to, 2)
            turns = KEYS.order_of_deliveries("orders", task.id)
            await until(lambda: hooks.valkey.client.llen(turns) == 2, "the second start, and the end behind it")
            (letter,) = await client.dead_letters.list()
            seen_before = len(to.got)
            await client.dead_letters.redrive([letter.id])
            await until(lambda: hooks.valkey.client.hget(KEYS.delivery(letter.id), "state") == b"delivered", "its end")
            assert len(to.got) == seen_before + 1 and hooks.valkey.client.llen(turns) == 2
            gate.set()
            await until(lambda: not waiting(hooks, "orders"), "all ends")
            types = [event["type"] for event in of(to, {task.id})]
            assert types == ["task.started", "task.started", "task.started", "task.succeeded"]


@in_a_loop
async def test_nothing_waits_for_what_nobody_can_send(hooks: Hooks) -> None:
    """Where keys of other types lie in the place of an endpoint's queue, its tasks end without a webhook."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to, events=("started", "terminal"), ordered=True)
        queue = KEYS.of_celery(delivery_queue("orders"))
        for key in (queue, f"{queue}:returned"):
            hooks.valkey.client.set(key, "somebody's")
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "orders", 3))
            await until(lambda: not held(hooks.valkey.client), "their settlement")
            assert not waiting(hooks, "orders") and not list(hooks.valkey.client.scan_iter("*webhook:order:*"))


def of(to: Receiver, tasks: set[str]) -> list[dict[str, Any]]:
    """Events of tasks, in the order in which they came."""
    events = [json.loads(received.body) for received in to.got]
    return [event for event in events if event["data"]["task_id"] in tasks]


@in_a_loop
async def test_a_rate_holds_over_all_workers(hooks: Hooks) -> None:
    """Since one of them leads the endpoint."""
    rate_per_s = 20
    times: list[float] = []

    async def respond(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        times.append(time.monotonic())
        await ok(to, received, writer)

    async with receiver(respond) as to, fake_triton("one") as triton:
        hooks.add("orders", to, rate_per_s=rate_per_s)
        async with hooks.worker(triton), hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            began = time.monotonic()
            await ended(await submit(client, "orders", 60))
            await arrive(to, 60)
            # A second's burst, and then the rate: a slow machine makes each of them later, and none sooner.
            assert all(at - began >= (number - rate_per_s) / rate_per_s for number, at in enumerate(times, 1))


@in_a_loop
async def test_a_half_open_breaker_lets_one_through_over_all_workers(hooks: Hooks) -> None:
    """Fifty are due; where the worker dies that holds the one, another tries within a lease."""
    gate = asyncio.Event()
    async with receiver(status(500)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=(0, 0, 0, 0, 0, 0, 0, 0, 3600))
        async with AsyncClient(hooks.valkey.url) as client:
            now = float(hooks.valkey.client.time()[0])
            health = Health(failures=FAILURES_TO_OPEN, failing_since=now, last_failure_at=now, open_until=now + 1)
            hooks.valkey.client.hset(KEYS.webhook_health, "orders", encode(health))
            to.respond = after(gate)
            async with hooks.worker(triton, webhook_timeout_s=60) as first:
                await ended(await submit(client, "orders", 50))
                await arrive(to, 1)
                async with hooks.worker(triton, webhook_timeout_s=60):
                    await asyncio.sleep(0.5)  # no other begins, so there is nothing to wait for
                    assert len(to.got) == 1
                    await first.down()
                    await arrive(to, 2)
                    assert to.got[1].id == to.got[0].id  # the very same goes back to the head of its queue
                    await asyncio.sleep(0.5)
                    assert len(to.got) == 2
                    gate.set()
                    await until(lambda: not waiting(hooks, "orders"), "all ends")
                    assert attempts_of(hooks, "orders") == [1] * 50
                    health = KEYS.webhook_health
                    await until(lambda: not hooks.valkey.client.hexists(health, "orders"), "its health")


@in_a_loop
async def test_while_a_breaker_is_open_nothing_grows_with_the_backlog(hooks: Hooks) -> None:
    """Neither commands nor attempts: what waits for the endpoint stays in its queue."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        now = float(hooks.valkey.client.time()[0])
        health = Health(failures=9, failing_since=now, last_failure_at=now, open_until=now + 3600)
        hooks.valkey.client.hset(KEYS.webhook_health, "orders", encode(health))
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "orders", 20))
            few = await commands_in(hooks, 1.5)
            tasks = [result async for result in client.map("one", [x()] * 3000, webhook="orders")]
            assert len(tasks) == 3000 and waiting(hooks, "orders") == 3020
            many = await commands_in(hooks, 1.5)
            assert many < 2 * few + 50 and not to.got
            with hooks.registry() as registry:
                assert registry.enable("orders") == 3020  # an operator knows that it is back
            await arrive(to, 3020, 60.0)


async def commands_in(hooks: Hooks, seconds: float) -> int:
    """Commands that the broker carries out meanwhile."""
    before = hooks.valkey.client.info("stats")["total_commands_processed"]
    await asyncio.sleep(seconds)
    return int(hooks.valkey.client.info("stats")["total_commands_processed"] - before)


@in_a_loop
async def test_a_lost_worker_loses_nothing_and_is_no_attempt(hooks: Hooks) -> None:
    """What it had under way is sent again, under the same id; so it is where a worker hands back."""
    async with receiver(never) as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        async with AsyncClient(hooks.valkey.url) as client:
            async with hooks.worker(triton, webhook_timeout_s=60) as lost:
                await ended(await submit(client, "orders", 10))
                await arrive(to, 10)
                await lost.down()
            async with hooks.worker(triton, webhook_timeout_s=60) as leaving:
                await arrive(to, 20)
                leaving.lane.hand_back()
                await until(lambda: not leaving.lane.requests(), "what it hands back")
            assert hooks.valkey.client.llen(KEYS.of_celery(delivery_queue("orders"))) == 10
            to.respond = ok
            async with hooks.worker(triton):
                await until(lambda: not waiting(hooks, "orders"), "all ends")
            assert attempts_of(hooks, "orders") == [1] * 10
            assert len(set(to.ids())) == 10 and len(to.got) == 30
            assert not hooks.valkey.client.exists(KEYS.webhook_health)


@in_a_loop
async def test_a_secret_that_cannot_be_read_is_no_attempt(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it count for the endpoint; the deliveries go once it can be read again."""
    monkeypatch.setattr("samphire_workers.webhooks.leading.PAUSE_S", 0.3)
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        key = hooks.folder / "secret-key"
        kept = key.read_text()
        key.unlink()
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "orders", 3))
            await until(lambda: waiting(hooks, "orders") == 3, "what waits")
            await asyncio.sleep(1)  # nothing happens, so there is nothing to wait for
            assert not to.got and not hooks.valkey.client.exists(KEYS.webhook_health)
            key.write_text(kept)
            await until(lambda: not waiting(hooks, "orders"), "all ends")
            assert attempts_of(hooks, "orders") == [1] * 3


@in_a_loop
async def test_what_is_sent_by_hand_touches_neither_health_nor_schedule(hooks: Hooks) -> None:
    """Twenty times, with a 410 and a 200 among them, and a test; a failure that is mended is no letter any more."""
    async with receiver(status(500)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=(0,))
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "orders", 1))
            await until(lambda: hooks.valkey.client.zcard(KEYS.dead) == 1, "its letter")
            before = hooks.valkey.client.hget(KEYS.webhook_health, "orders")
            delivery_id = to.got[0].id
            with hooks.deliveries() as book:
                for number in range(20):
                    to.respond = status(410 if number == 7 else 500)
                    attempt = await asyncio.to_thread(book.redeliver, delivery_id)
                    assert attempt["status"] in (410, 500)
                assert (await asyncio.to_thread(book.test, "orders"))["status"] == 500
                assert hooks.valkey.client.zcard(KEYS.dead) == 1
                assert hooks.valkey.client.hget(KEYS.webhook_health, "orders") == before
                to.respond = ok
                assert (await asyncio.to_thread(book.redeliver, delivery_id))["status"] == 200
                assert (await asyncio.to_thread(book.test, "orders"))["status"] == 200
                assert (await asyncio.to_thread(book.get, delivery_id)).state == "delivered"
            assert hooks.valkey.client.zcard(KEYS.dead) == 0
            assert hooks.valkey.client.hget(KEYS.webhook_health, "orders") == before
            with hooks.registry() as registry:
                assert not registry.state("orders").endpoint.disabled


@in_a_loop
async def test_operators_are_warned_once_and_then_it_is_disabled(hooks: Hooks) -> None:
    """Each level once, whichever worker leads; the change and its event are one step."""
    day_s = 86_400.0
    async with receiver(status(500)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=(0,))
        async with AsyncClient(hooks.valkey.url) as client:
            for part, worker in ((0.55, 1), (0.6, 2), (0.75, 3), (0.95, 4), (1.01, 5)):
                now = float(hooks.valkey.client.time()[0])
                health = Health(
                    failures=20, failing_since=now - part * 5 * day_s, last_failure_at=now - 3600, last_error="no"
                )
                hooks.valkey.client.hset(KEYS.webhook_health, "orders", encode(health))
                async with hooks.worker(triton):
                    await ended(await submit(client, "orders", 1))
                    await arrive(to, worker)
                    await until(lambda: not waiting(hooks, "orders"), "its end")
            events = [json.loads(fields[b"e"]) for _, fields in hooks.valkey.client.xrange(KEYS.operator_events)]
            assert [event.get("percent") for event in events] == [50, 70, 90, None]
            assert events[-1]["type"] == "webhook.endpoint.disabled" and events[-1]["reason"] == "failing"
            with hooks.registry() as registry:
                assert registry.state("orders").endpoint.disabled == "failing"
                registry.enable("orders")
                assert not registry.state("orders").health


@pytest.mark.parametrize("code", [429, 502, 504])
@in_a_loop
async def test_an_endpoint_that_asks_for_it_is_left_alone(hooks: Hooks, code: int) -> None:
    """For as long as it says, whatever else waits for it; then one at a time until it takes them."""
    async with receiver(status(code, "retry-after: 2")) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=(0, 0), concurrency=1)
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await submit(client, "orders", 1)
            await arrive(to, 1)
            began = time.monotonic()
            to.respond = ok
            await ended(await submit(client, "orders", 5))
            await until(lambda: not waiting(hooks, "orders"), "all ends")
            assert time.monotonic() - began > 1.5
            assert sorted(attempts_of(hooks, "orders")) == [1, 1, 1, 1, 1, 2]


@in_a_loop
async def test_a_queue_that_is_no_list_costs_the_webhook_and_not_the_task(hooks: Hooks) -> None:
    """Keys of other types lie where deliveries are queued: the task ends, and the log says what is lost."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        queue = KEYS.of_celery(delivery_queue("orders"))
        for key in (queue, f"{queue}:returned"):
            hooks.valkey.client.set(key, "x")
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await ended(await submit(client, "orders", 3))
            assert not to.got


@in_a_loop
async def test_a_fault_of_ours_ends_one_delivery_and_no_lane(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again as any task, and becomes a dead letter with the reason; others arrive."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        async with hooks.worker(triton, backoff_base_s=0) as worker, AsyncClient(hooks.valkey.url) as client:
            headers = worker.lane._deliveries._headers
            broken: set[str] = set()

            def sometimes(request: Any, *more: Any) -> dict[str, str]:
                if not broken or request.task_id in broken:
                    broken.add(request.task_id)
                    raise KeyError("a bug")
                return headers(request, *more)

            monkeypatch.setattr(worker.lane._deliveries, "_headers", sometimes)
            await ended(await submit(client, "orders", 5))
            await arrive(to, 4)
            await until(lambda: hooks.valkey.client.zcard(KEYS.dead) == 1, "its letter")
            (letter,) = await client.dead_letters.list()
            assert (letter.reason, {letter.id}) == ("internal", broken) and "a bug" in letter.error
            assert not waiting(hooks, "orders") and len(attempts_of(hooks, "orders")) == 5


@in_a_loop
async def test_a_delivery_that_is_revoked_waits_no_more(hooks: Hooks) -> None:
    """By Celery's own command; what is kept says so."""
    async with receiver(status(500)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=(0, 3600))
        async with hooks.worker(triton) as worker, AsyncClient(hooks.valkey.url) as client:
            await submit(client, "orders", 1)
            await until(lambda: to.got and due(hooks, to) is not None, "its next attempt")
            await worker.lane.cancel([to.got[0].id])
            await until(lambda: not waiting(hooks, "orders"), "its end")
            assert hooks.valkey.client.hget(KEYS.delivery(to.got[0].id), "state") == b"cancelled"
            assert len(to.got) == 1


@in_a_loop
async def test_cloud_events_in_the_binary_mode(hooks: Hooks) -> None:
    """Beside the signature, with the same body."""
    async with receiver() as to, fake_triton("one") as triton:
        secret = hooks.add("orders", to, cloud_events=True)
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            (task,) = await submit(client, "orders", 1)
            await arrive(to, 1)
            event, headers = to.got[0].verified(secret), to.got[0].headers
            assert headers["ce-specversion"] == "1.0" and headers["ce-id"] == event.id
            assert headers["ce-type"] == event.type and headers["ce-subject"] == task.id
            assert headers["ce-source"] == "/samphire/samphire"
            assert headers["ce-time"] == json.loads(to.got[0].body)["timestamp"]


@in_a_loop
async def test_the_schedule_goes_by_the_brokers_clock(hooks: Hooks) -> None:
    """Each attempt is scheduled as the schedule says, a little later by lot; after the last there is a letter."""
    waits_s = (0, 5, 300, 1800)
    async with receiver(status(500)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=waits_s)
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await submit(client, "orders", 1)
            for number, wait_s in enumerate(waits_s[1:], 1):
                await arrive(to, number)
                await until(lambda: due(hooks, to) is not None, "its next attempt")
                left_s = (due(hooks, to) or 0) - float(hooks.valkey.client.time()[0])
                assert wait_s - 2 <= left_s <= 1.2 * wait_s + 1
                hooks.valkey.client.zadd(KEYS.scheduled, {to.got[0].id: 0})  # now
                await until(lambda number=number: len(to.got) > number, "the next attempt")
            await until(lambda: hooks.valkey.client.zcard(KEYS.dead) == 1, "its letter")
            assert len(to.got) == len(waits_s)


FASTER = 10_000
"""How much faster the broker's time goes: a day is nine seconds."""


def test_the_schedule_of_28_hours(tmp_path: Path, faketime: Sequence[str]) -> None:
    """Eight attempts, each as long after the one before as the default says, and then a dead letter."""
    times: list[float] = []

    async def respond(to: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        times.append(time.monotonic())
        await status(500)(to, received, writer)

    @in_a_loop
    async def test() -> None:
        hooks = Hooks(server, tmp_path)
        async with receiver(respond) as to, fake_triton("one") as triton:
            hooks.add("orders", to)
            slow = {"lease_s": 10**8, "remember_s": 10**8, "dead_letter_ttl_s": 10**8, "webhook_keep_s": 10**8}
            async with hooks.worker(triton, **slow), AsyncClient(hooks.valkey.url) as client:
                await submit(client, "orders", 1)
                await until(lambda: server.client.zcard(KEYS.dead) == 1, "its letter", 60.0)
                letter = server.client.hgetall(KEYS.dead_prefix + to.got[0].id)
                assert letter[b"reason"] == b"undelivered" and len(json.loads(letter[b"history"])) == 8
                assert len(set(to.ids())) == 1

    with running_valkey(tmp_path / "fast", before=[*faketime, f"+0 x{FASTER}"]) as server:
        test()
    schedule_s = (0, 5, 300, 1800, 7200, 18000, 36000, 36000)
    assert len(times) == len(schedule_s)
    for wait_s, before, after_it in zip(schedule_s[1:], times, times[1:], strict=False):
        assert after_it - before >= wait_s / FASTER - 0.05  # and later by a fifth, by lot, or by a busy machine


def due(hooks: Hooks, to: Receiver) -> float | None:
    """When the next attempt of the first delivery is, in s since 1970."""
    found: float | None = hooks.valkey.client.zscore(KEYS.scheduled, to.got[0].id)
    return found
