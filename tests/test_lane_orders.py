"""Orders of events that a model of the protocol has found, with the real lane and SDK and a stand-in for Triton."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from samphire import AsyncClient, Step, UnknownTaskError
from samphire.errors import BrokerUnavailableError, ModelFaultError, SamphireError, TaskCancelledError
from samphire.wire import keys
from tests.stacks import Valkey
from tests.support.lane import (
    LaneWorker,
    away,
    body,
    broken,
    fake_triton,
    lane_worker,
    places,
    remember,
    sleeping,
    state,
    until,
    x,
)
from tests.support.names import KEYS
from tests.support.plain import plain_celery


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def catalogue_of(valkey: Valkey, *models: str) -> None:
    for model in models:
        await until(lambda model=model: valkey.client.hexists(KEYS.catalogue, model), "the catalogue")  # type: ignore[misc]


def test_a_redriven_first_step_of_a_chain_runs_its_next_steps_to_the_end(valkey: Valkey) -> None:
    """The last step had failed with it (c01)."""

    async def test() -> None:
        async with (
            fake_triton("one", "two") as triton,
            lane_worker(valkey.url, triton, max_attempts=1),
            AsyncClient(valkey.url) as sdk,
        ):
            triton.behave["one"] = broken
            await catalogue_of(valkey, "one", "two")
            first = Step("one", x())
            chain = await sdk.chain(first, Step("two", {"x": first["y"]}))
            with pytest.raises(ModelFaultError):
                await chain.result(20)
            (letter,) = await sdk.dead_letters.list()
            assert letter.task_id != chain.id and state(valkey.client, chain.id) == "FAILURE"
            del triton.behave["one"]
            assert await sdk.dead_letters.redrive([letter.id]) == 1
            await until(lambda: state(valkey.client, chain.id) == "SUCCESS", "the chain's end")
            assert (await sdk.task(chain.id).result(10)).outputs["y"].tolist() == [[3.0]]
            assert await sdk.dead_letters.list() == []

    run(test)


def test_a_worker_without_an_endpoint_gives_back_what_it_has_claimed_unknowingly(valkey: Valkey) -> None:
    """Its claim's reply was lost just as its Triton died for good: it lives, so nobody reaps it (c02)."""

    async def test() -> None:
        async with (
            fake_triton("one") as dying,
            fake_triton("one") as living,
            AsyncClient(valkey.url) as sdk,
            lane_worker(valkey.url, dying) as a,
        ):
            await catalogue_of(valkey, "one")
            claim, lost = a.store.claim, asyncio.Event()

            async def claim_and_lose(*args: Any) -> Any:
                claimed = await claim(*args)
                if not claimed or lost.is_set():
                    return claimed
                lost.set()
                await dying.stop()
                while a.endpoints.some_ready.is_set():
                    await asyncio.sleep(0.02)
                raise BrokerUnavailableError("the reply is lost")

            a.store.claim = claim_and_lose  # type: ignore[method-assign]
            task = await sdk.submit("one", x())
            await lost.wait()
            async with lane_worker(valkey.url, living):
                assert (await task.result(20)).outputs["y"].tolist() == [[2.0]]
            assert not valkey.client.hlen(f"{KEYS.worker_prefix}{a.info.id}:inflight")

    run(test)


def test_a_task_in_a_queue_that_nobody_knows_yet_can_be_cancelled(valkey: Valkey) -> None:
    """A plain producer's, before any lane has found its queue; what is nowhere is still said to be unknown (c03)."""

    async def test() -> None:
        async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as sdk:
            triton.behave["one"] = away
            for n in range(3000):
                valkey.client.set(f"other-{n}", "x")
            async with lane_worker(valkey.url, triton) as worker:
                known = worker.store.known_queues

                async def none() -> set[str]:
                    await known()
                    return set()

                worker.store.known_queues = none  # type: ignore[method-assign]
                valkey.client.delete(KEYS.queues)
                options = {"queue": "inference.one@tenant", "kwargs": body("one") | {"tenant": "tenant"}}
                with plain_celery(valkey.url) as app:
                    sent = await asyncio.to_thread(lambda: app.send_task("samphire.infer", **options))
                assert await sdk.task(sent.id).cancel() is True
                assert state(valkey.client, sent.id) == "REVOKED"
                del triton.behave["one"]
                await until(lambda: not places(valkey.client, sent.id), "its message's end")
                with pytest.raises(UnknownTaskError):
                    await sdk.task("nobody's").cancel()

    run(test)


def test_a_chain_can_be_cancelled_while_an_earlier_step_waits_for_its_time(valkey: Valkey) -> None:
    """Its handle is the last step, of which nothing is there but its name in the message of the first (c17)."""

    async def test() -> None:
        async with (
            fake_triton("one", "two") as triton,
            lane_worker(valkey.url, triton, backoff_base_s=60, backoff_jitter=0),
            AsyncClient(valkey.url) as sdk,
        ):
            triton.behave["one"] = broken
            await catalogue_of(valkey, "one", "two")
            first = Step("one", x())
            chain = await sdk.chain(first, Step("two", {"x": first["y"]}))
            await until(lambda: valkey.client.zcard(KEYS.scheduled), "the retry")
            assert await chain.cancel() is True
            with pytest.raises(TaskCancelledError):
                await chain.result(5)

    run(test)


def test_a_part_that_fails_later_does_not_write_over_a_cancelled_chain(valkey: Valkey) -> None:
    """Celery's backend ends a chord's body by itself; that goes through the store (c07)."""

    async def test() -> None:
        async with (
            fake_triton("one", "bad", "two") as triton,
            lane_worker(valkey.url, triton, max_attempts=1),
            AsyncClient(valkey.url) as sdk,
        ):
            go = asyncio.Event()

            async def bad(context: Any) -> None:
                await go.wait()
                await broken(context)

            async def wait(_context: Any) -> None:
                await go.wait()

            triton.behave |= {"one": wait, "bad": bad}
            await catalogue_of(valkey, "one", "bad", "two")
            left, right = Step("one", x()), Step("bad", x())
            chain = await sdk.chain([left, right], Step("two", {"x": [left["y"], right["y"]]}))
            pubsub = valkey.client.pubsub(ignore_subscribe_messages=True)
            pubsub.subscribe(KEYS.meta_prefix + chain.id)
            await until(lambda: len(triton.asked) == 2, "both parts")
            assert await chain.cancel() is True
            go.set()
            await until(lambda: valkey.client.zcard(KEYS.dead), "the part's failure")
            await until(lambda: not valkey.client.llen(keys.INTAKE), "the part's return")
            await until(lambda: not any(":inflight" in key.decode() for key in valkey.client.keys("*")), "its end")
            assert state(valkey.client, chain.id) == "REVOKED"
            heard = [message["data"] for _ in range(5) if (message := pubsub.get_message(timeout=0.1))]
            assert [json.loads(data)["status"] for data in heard] == ["REVOKED"]
            pubsub.close()

    run(test)


def test_a_chord_that_fails_is_ended_and_its_client_told(valkey: Valkey) -> None:
    """The body's failure is published, stored, and in the client's stream."""

    async def test() -> None:
        async with (
            fake_triton("one", "bad", "two") as triton,
            lane_worker(valkey.url, triton, max_attempts=1),
            AsyncClient(valkey.url) as sdk,
        ):
            triton.behave["bad"] = broken
            await catalogue_of(valkey, "one", "bad", "two")
            left, right = Step("one", x()), Step("bad", x())
            chain = await sdk.chain([left, right], Step("two", {"x": [left["y"], right["y"]]}))
            with pytest.raises(SamphireError):
                await chain.result(20)
            assert state(valkey.client, chain.id) == "FAILURE"
            told = [fields for _, fields in valkey.client.xrange(KEYS.own(sdk._session.stream))]
            assert {b"failed": chain.id.encode()} in told

    run(test)


def test_a_task_that_has_had_all_its_attempts_is_failed_without_another_start(valkey: Valkey) -> None:
    """Should the worker go down now, no attempt over the budget is counted (c10)."""

    async def test() -> None:
        async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as sdk:
            task = await sdk.submit("one", x())
            remember(valkey.client, task.id, attempts=3, crashes=3)
            worker = LaneWorker(valkey.url, triton)
            started: list[Any] = []
            start = worker.store.start

            async def noted(tasks: Any, info: Any) -> Any:
                started.extend(tasks)
                return await start(tasks, info)

            worker.store.start = noted  # type: ignore[method-assign]
            await worker.up()
            with pytest.raises(SamphireError, match="3 of 3 attempts took a worker"):
                await task.result(20)
            assert started == [] and triton.asked == []
            assert valkey.client.hget(KEYS.dead_prefix + task.id, "attempts") == b"3"
            await worker.down()

    run(test)


def test_a_suspect_waits_until_what_was_answered_before_it_is_written(valkey: Valkey) -> None:
    """Should it take the worker down, the innocent one before it would have had its last attempt (c13)."""

    async def test() -> None:
        async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as sdk:
            tasks = [await sdk.submit("one", x(n)) for n in (1, 2)]
            for task in tasks:
                remember(valkey.client, task.id, attempts=2, crashes=2)
            a = LaneWorker(valkey.url, triton, lease_s=1)
            settle, refused = a.store.settle, asyncio.Event()

            async def broken_settle(batch: Any) -> Any:
                refused.set()
                raise BrokerUnavailableError("the connection broke")

            a.store.settle = broken_settle  # type: ignore[method-assign]
            await a.up()
            await refused.wait()
            await asyncio.sleep(1.0)
            assert len(triton.asked) == 1, "the second would take the worker down now, and with it the first"
            a.store.settle = settle  # type: ignore[method-assign]
            for n, task in enumerate(tasks, 1):
                assert (await task.result(20)).outputs["y"].tolist() == [[n + 1.0]]
            await a.down()
            assert not valkey.client.zcard(KEYS.dead)

    run(test)


def test_what_need_not_wait_is_not_started_with_what_must(valkey: Valkey) -> None:
    """It would be started and wait, and who is alone among all workers would wait for it (c19)."""

    async def test() -> None:
        async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as sdk:
            worker = LaneWorker(valkey.url, triton, claim_max=1)
            claim, start = worker.store.claim, worker.store.start
            batches: list[list[str]] = []

            async def claim_twice(*args: Any) -> Any:
                first = await claim(*args)
                if first:
                    valkey.client.sadd(KEYS.tried, "suspect")
                return [*first, *await claim(*args)] if first else first

            async def noted(tasks: Any, info: Any) -> Any:
                batches.append([field for field, _ in tasks])
                return await start(tasks, info)

            worker.store.claim, worker.store.start = claim_twice, noted  # type: ignore[method-assign]
            one, two = await sdk.submit("one", x()), await sdk.submit("one", x(2))
            await worker.up()
            for task in (one, two):
                await task.result(20)
            assert sorted(len({keys.is_first_claim(field) for field in batch}) for batch in batches) == [1, 1]
            await worker.down()

    run(test)


def test_suspects_do_not_stop_what_another_worker_waits_for(valkey: Valkey) -> None:
    """Many of them at one worker, and one at another that has to be alone among all workers (c18)."""

    async def test() -> None:
        async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as sdk:
            triton.behave["one"] = sleeping(0.02)
            settings = {"triton_timeout_s": 15.0}
            a, b = LaneWorker(valkey.url, triton, **settings), LaneWorker(valkey.url, triton, **settings)
            for worker in (a, b):  # a broker that is not on this machine

                def far(real: Any) -> Any:
                    async def execute(*command: Any, **options: Any) -> Any:
                        await asyncio.sleep(0.01)
                        return await real(*command, **options)

                    return execute

                worker.store._starts.execute = far(worker.store._starts.execute)  # type: ignore[method-assign]
            tasks = [await sdk.submit("one", x()) for _ in range(16)]
            for task in tasks[:13]:
                remember(valkey.client, task.id, attempts=2, crashes=2)
            await a.up()
            await until(lambda: valkey.client.hlen(f"{KEYS.worker_prefix}{a.info.id}:started"), "a start")
            one = await sdk.submit("one", x(), priority="high")
            remember(valkey.client, one.id, attempts=2, crashes=2, shared=2)
            await b.up()
            async with asyncio.timeout(12):  # less than the time after which the others are not waited for any more
                for task in (*tasks, one):
                    await task.result()
            await a.down()
            await b.down()
            assert places(valkey.client, one.id) == []

    run(test)
