"""Sequences when things go wrong: what has gone back, failed or was refused, with a stand-in for Triton."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from samphire import AsyncClient, AsyncTask, InvalidInputError, ModelFaultError, UnknownModelError
from samphire.wire import keys
from tests.stacks import Valkey
from tests.support.lane import (
    FakeTriton,
    LaneWorker,
    away,
    body,
    broken,
    fake_triton,
    lane_worker,
    sleeping,
    state,
    until,
    x,
)
from tests.support.names import KEYS
from tests.support.plain import plain_celery

MODEL = "counter"


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def stateful_triton() -> AsyncIterator[FakeTriton]:
    async with fake_triton(MODEL, "another") as triton:
        triton.stateful.add(MODEL)
        yield triton


async def ask(sdk: AsyncClient, value: float, *, start: bool = False, **more: Any) -> AsyncTask:
    return await sdk.submit(MODEL, x(value), parameters={"sequence_id": "one", "sequence_start": start}, **more)


async def answer(task: AsyncTask) -> float:
    return float((await task.result(20)).outputs["y"][0, 0])


def leader(valkey: Valkey) -> str:
    return (valkey.client.hget(KEYS.leaders, MODEL) or b"").decode()


def test_a_sequence_that_another_worker_has_led_meanwhile_is_asked_again(valkey: Valkey) -> None:
    """What has gone back was answered there: nobody waits for it here."""

    async def test() -> None:
        async with stateful_triton() as ours, stateful_triton() as theirs, AsyncClient(valkey.url) as sdk:

            async def dies(context: Any) -> None:
                ours.is_up = False
                await away(context)

            async with lane_worker(valkey.url, ours) as a:
                ours.behave[MODEL] = dies
                await until(lambda: leader(valkey) == a.info.id, "the first leader")
                first = await ask(sdk, 1, start=True)
                await until(lambda: not leader(valkey), "its lead given back")
                async with lane_worker(valkey.url, theirs) as b:
                    assert [await answer(first), await answer(await ask(sdk, 2))] == [2, 3]
                    theirs.is_up = False
                    await until(lambda: leader(valkey) != b.info.id, "the second's lead given back")
                    del ours.behave[MODEL]
                    ours.is_up = True
                    assert await answer(await ask(sdk, 3, start=True)) == 4
                    assert (theirs.values, ours.values) == ([1, 2], [1, 3])

    run(test)


def test_a_request_that_fails_when_it_comes_again_is_waited_for_no_more(valkey: Valkey) -> None:
    """Its model is unknown by then; loaded again, it begins the sequence anew, under the same leader."""

    async def test() -> None:
        async with (
            stateful_triton() as triton,
            lane_worker(valkey.url, triton) as worker,
            AsyncClient(valkey.url) as sdk,
        ):

            async def is_unloaded(context: Any) -> None:
                triton.models.discard(MODEL)
                await away(context)

            async def keep(*_args: Any, **_options: Any) -> int:
                return 1

            triton.behave[MODEL] = is_unloaded
            await until(lambda: leader(valkey) == worker.info.id, "the leader")
            worker.store.lead = keep  # type: ignore[method-assign]
            first = await ask(sdk, 1, start=True)
            with pytest.raises(UnknownModelError):
                await first.result(20)
            del triton.behave[MODEL]
            triton.models.add(MODEL)
            async with AsyncClient(valkey.url, validate=False) as careless:
                assert await answer(await ask(careless, 2, start=True)) == 3

    run(test)


def test_a_first_request_that_fails_is_not_tried_again(valkey: Valkey) -> None:
    """Those after it have failed meanwhile: what came later would be asked on a state without them."""

    async def test() -> None:
        async with stateful_triton() as triton, AsyncClient(valkey.url, validate=False) as sdk:
            triton.behave[MODEL] = broken
            tasks = [await ask(sdk, n, start=n == 1) for n in (1, 2, 3)]
            async with lane_worker(valkey.url, triton, backoff_base_s=0.01):
                with pytest.raises(ModelFaultError):
                    await tasks[0].result(20)
                del triton.behave[MODEL]
                for task in (*tasks[1:], await ask(sdk, 4)):
                    with pytest.raises(InvalidInputError, match="is broken: its request"):
                        await task.result(20)
                assert await answer(await ask(sdk, 5, start=True)) == 6
                assert triton.values == [1, 5]

    run(test)


@pytest.mark.parametrize("wrong", ["max_attempts", "expired"])
def test_what_follows_a_request_that_is_refused_before_it_is_checked(valkey: Valkey, wrong: str) -> None:
    """All are claimed together: those before it are answered, those after it fail."""

    async def test() -> None:
        async with stateful_triton() as triton, AsyncClient(valkey.url, validate=False) as sdk:
            before = [await ask(sdk, 1, start=True), await ask(sdk, 2)]
            if wrong == "expired":
                bad = (await ask(sdk, 3, deadline_s=0.01)).id
                await asyncio.sleep(0.1)
            else:
                kwargs = body(MODEL, 3) | {"parameters": {"sequence_id": "one"}, "max_attempts": 10**6}
                options = {"queue": keys.queue_name(MODEL), "kwargs": kwargs, "priority": 3}  # as the SDK sends it
                with plain_celery(valkey.url) as app:
                    bad = (await asyncio.to_thread(lambda: app.send_task("samphire.infer", **options))).id
            after = await ask(sdk, 4)
            async with lane_worker(valkey.url, triton):
                with pytest.raises(InvalidInputError, match=f"is broken: its request {bad}"):
                    await after.result(20)
                assert [await answer(task) for task in before] == [2, 3]
                ended = "REVOKED" if wrong == "expired" else "FAILURE"
                await until(lambda: state(valkey.client, bad) == ended, "its own end")
                assert triton.values == [1, 2]

    run(test)


def test_what_goes_back_together_goes_back_in_its_order(valkey: Valkey) -> None:
    """Also where the newest is the one that had to go."""

    async def test() -> None:
        async with stateful_triton() as triton, AsyncClient(valkey.url, validate=False) as sdk:
            go = asyncio.Event()

            async def wait(_context: Any) -> None:
                await go.wait()

            triton.behave[MODEL] = wait
            tasks = [await ask(sdk, n, start=n == 1) for n in (1, 2, 3, 4)]
            worker = LaneWorker(valkey.url, triton)
            released: list[list[str]] = []
            release = worker.store.release

            async def noted(fields: Any, **options: Any) -> Any:
                released.append(list(fields))
                return await release(fields, **options)

            worker.store.release = noted  # type: ignore[method-assign]
            await worker.up()
            await until(lambda: triton.values == [1], "the first at Triton")
            held = {request.task_id: request for request in worker.lane.requests()}
            await worker.lane._ledger.release([held[tasks[3].id]])
            assert released == [[held[task.id].claim.field for task in tasks[1:]]]
            go.set()
            assert [await answer(task) for task in tasks] == [2, 3, 4, 5]
            assert triton.values == [1, 2, 3, 4]
            await worker.down()

    run(test)


def test_a_request_that_goes_back_for_want_of_memory_keeps_its_place(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was short of something for a moment; those behind it wait for it."""
    from samphire_workers.inference import dispatcher

    load, short = dispatcher.load, ["once"]

    def load_or_not(request: Any, fetched: Any) -> None:
        if short and request.request.parameters.get("second"):
            short.clear()
            raise MemoryError
        load(request, fetched)

    monkeypatch.setattr(dispatcher, "load", load_or_not)

    async def test() -> None:
        async with stateful_triton() as triton, AsyncClient(valkey.url) as sdk:
            first = await ask(sdk, 1, start=True)
            parameters = {"sequence_id": "one", "sequence_start": False, "second": True}
            second = await sdk.submit(MODEL, x(2), parameters=parameters)
            third = await ask(sdk, 3)
            async with lane_worker(valkey.url, triton):
                assert [await answer(task) for task in (first, second, third)] == [2, 3, 4]
                assert triton.values == [1, 2, 3] and not short

    run(test)


def test_a_request_is_asked_only_once_its_start_is_written(valkey: Valkey) -> None:
    """A worker that dies in between would leave a request that counts no attempt, and it would be asked twice."""

    async def test() -> None:
        async with (
            stateful_triton() as triton,
            lane_worker(valkey.url, triton) as worker,
            AsyncClient(valkey.url) as sdk,
        ):
            assert await answer(await ask(sdk, 1, start=True)) == 2
            begun, may_go_on = asyncio.Event(), asyncio.Event()
            write_start = worker.store.start

            async def start(*args: Any) -> Any:
                begun.set()
                await may_go_on.wait()
                return await write_start(*args)

            worker.store.start = start  # type: ignore[method-assign]
            second = await ask(sdk, 2)
            await begun.wait()
            await asyncio.sleep(0.2)  # what is asked for nevertheless is there by then
            assert triton.values == [1]
            may_go_on.set()
            assert await answer(second) == 3
            assert triton.values == [1, 2]

    run(test)


@pytest.mark.parametrize("by", ["a worker that ends", "an endpoint that does not answer"])
def test_a_request_that_is_given_up_at_the_endpoint_is_not_asked_again(valkey: Valkey, by: str) -> None:
    """It may have been carried out there: what is right after it is not known, and that is told."""

    async def test() -> None:
        async with stateful_triton() as triton, AsyncClient(valkey.url) as sdk:
            async with lane_worker(valkey.url, triton) as worker:
                assert await answer(await ask(sdk, 1, start=True)) == 2
                triton.behave[MODEL] = sleeping(30)
                second = await ask(sdk, 2)
                await until(lambda: triton.values == [1, 2], "the request at the endpoint")
                del triton.behave[MODEL]
                if by == "a worker that ends":
                    worker.lane.hand_back()
                else:
                    worker.endpoints.mark_away(worker.endpoints.pick(MODEL))
                with pytest.raises(ModelFaultError, match="the state of its sequence is lost"):
                    await second.result(20)
            async with lane_worker(valkey.url, triton):
                assert await answer(await ask(sdk, 3, start=True)) == 4
                assert triton.values == [1, 2, 3]

    run(test)
