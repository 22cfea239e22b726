"""Canvases with thousands of next steps: bounded, and nobody's steps wait behind them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signature

from samphire.errors import InvalidInputError
from samphire.transport.address import broker_of
from samphire_workers.celery_settings import celery_settings
from samphire_workers.settlement.canvas import CapturingBackend, CapturingTransport
from samphire_workers.settlement.celery_threads import make_app
from samphire_workers.settlement.next_steps import NESTED_MAX, NEXT_STEPS_MAX, check_nesting, check_steps, count_steps
from tests.stacks import Valkey
from tests.support.lane import body, broken, fake_triton, lane_worker, state, until
from tests.support.names import KEYS
from tests.support.plain import plain_celery

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

FROM_PARENT = [{"name": "x", "from": "y"}]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def note(app: Celery, number: int) -> Any:
    return signature("n", args=(number,), app=app, immutable=True).set(queue="notes")


def infer(app: Celery, model: str, *, then: bool = False) -> Any:
    kwargs = body(model) | ({"inputs": FROM_PARENT} if then else {})
    return signature("samphire.infer", kwargs=kwargs, app=app).set(queue="inference")


def numbers(valkey: Valkey) -> list[int]:
    """The arguments of all messages in the other application's queue."""
    import base64

    messages = [json.loads(message) for message in valkey.client.lrange("notes", 0, -1)]
    return sorted(json.loads(base64.b64decode(message["body"]))[0][0] for message in messages)


def error_of(valkey: Valkey, task_id: str) -> str:
    raw = valkey.client.get(KEYS.meta_prefix + task_id)
    assert raw is not None
    return str(json.loads(raw)["result"]["exc_message"])


def test_a_short_chain_does_not_wait_for_a_task_with_thousands_of_callbacks(valkey: Valkey) -> None:
    """It ends first, and every callback is sent, once."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                large = infer(app, "one").set(link=[note(app, n) for n in range(4000)])
                sent = await asyncio.to_thread(large.apply_async)
                await until(lambda: len(triton.asked) == 1, "the large one's answer")
                short = chain(infer(app, "one"), infer(app, "one", then=True))
                last = await asyncio.to_thread(short.apply_async)
                await until(lambda: state(valkey.client, last.id) == "SUCCESS", "the short chain's end")
                assert state(valkey.client, sent.id) != "SUCCESS", "the large one was first"
                await until(lambda: state(valkey.client, sent.id) == "SUCCESS", "the large one's end", 60)
            assert await asyncio.to_thread(numbers, valkey) == list(range(4000))

    run(test)


def test_more_next_steps_than_may_be_sent_are_refused(valkey: Valkey) -> None:
    """With their number; the task is a dead letter, and its errback is sent."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                links = [note(app, 0) for _ in range(NEXT_STEPS_MAX + 1)]
                large = infer(app, "one").set(link=links, link_error=note(app, 7))
                sent = await asyncio.to_thread(large.apply_async)
                await until(lambda: state(valkey.client, sent.id) == "FAILURE", "the refusal", 60)
            assert f"at most {NEXT_STEPS_MAX} next steps" in error_of(valkey, sent.id)
            assert f"given {NEXT_STEPS_MAX + 1}" in error_of(valkey, sent.id)
            assert valkey.client.exists(KEYS.dead_prefix + sent.id)
            assert numbers(valkey) == [7]

    run(test)


def test_too_many_errbacks_take_nothing_from_who_waits_for_the_chain(valkey: Valkey) -> None:
    """None of them is sent; the later steps of the chain are told."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, max_attempts=1):
            triton.behave["one"] = broken
            with plain_celery(valkey.url) as app:
                first = infer(app, "one").set(link_error=[note(app, 0) for _ in range(NEXT_STEPS_MAX + 1)])
                last = await asyncio.to_thread(chain(first, infer(app, "one", then=True)).apply_async)
                await until(lambda: state(valkey.client, last.parent.id) == "FAILURE", "the end", 60)
            assert state(valkey.client, last.id) == "FAILURE"
            assert "the model raised" in error_of(valkey, last.id)
            assert numbers(valkey) == []

    run(test)


@pytest.mark.parametrize("how", ["link_error", "group"])
def test_a_chord_whose_body_has_too_many_steps_is_refused(valkey: Valkey, how: str) -> None:
    """None of them is sent, and who waits for the body is told."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, max_attempts=1):
            with plain_celery(valkey.url) as app:
                many = [note(app, 0) for _ in range(NEXT_STEPS_MAX + 1)]
                made = infer(app, "one", then=True) if how == "link_error" else group(many, app=app)
                made.set(task_id="body", **({"link_error": many} if how == "link_error" else {}))
                options = {"group_id": "g", "group_index": 0, "chord": json.loads(json.dumps(made))}
                await asyncio.to_thread(lambda: infer(app, "one").apply_async(task_id="part", **options))
                await until(lambda: state(valkey.client, "body") == "FAILURE", "the refusal", 60)
            assert state(valkey.client, "part") == "SUCCESS"
            assert f"given {NEXT_STEPS_MAX + 1}" in error_of(valkey, "body")
            await until(lambda: valkey.client.zcard(KEYS.dead) == 1, "the dead letter")
            assert numbers(valkey) == []

    run(test)


def test_results_that_are_sent_too_often_are_refused(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each callback's message carries the result."""
    monkeypatch.setattr("samphire_workers.settlement.canvas.NEXT_STEPS_MAX_BYTES", 100_000)

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                large = infer(app, "one").set(link=[note(app, n) for n in range(500)])
                sent = await asyncio.to_thread(large.apply_async)
                await until(lambda: state(valkey.client, sent.id) == "FAILURE", "the refusal", 60)
            assert "MiB of next steps" in error_of(valkey, sent.id)
            assert numbers(valkey) == []

    run(test)


def test_steps_are_counted_through_groups_chains_and_chords() -> None:
    """As JSON has them, however deep; anything else counts as one."""
    app = Celery("plain", set_as_current=False)

    def many(count: int) -> list[Any]:
        return [note(app, n) for n in range(count)]

    def counted(made: Any) -> int:
        return count_steps(json.loads(json.dumps(made)))

    assert counted([]) == counted(None) == 0
    assert counted(many(3)) == 3
    assert counted([group(many(3)), note(app, 1)]) == 4
    assert counted(chord(many(5), note(app, 1), app=app)) == 6
    assert counted(chain(note(app, 1), group(many(4)), app=app)) == 5
    assert counted([group([group(many(2)), group(many(3))])]) == 5
    assert count_steps({"subtask_type": "chunks", "kwargs": {"it": [[1]] * 9, "n": 1}}) == 9
    assert count_steps({"task": "t", "kwargs": {"tasks": [1] * 9}}) == 1
    assert count_steps([{"subtask_type": [], "kwargs": 1}, 5, "x", {"subtask_type": "group", "kwargs": None}]) == 4
    deep: Any = {"task": "t"}
    for _ in range(NESTED_MAX):
        deep = {"subtask_type": "group", "kwargs": {"tasks": [deep]}}
    assert count_steps(deep) == 1
    check_nesting(deep)
    for _ in range(100_000):  # one chord after the other: each is in the body of the one before
        deep = {"subtask_type": "chord", "kwargs": {"header": [], "body": deep}}
    assert count_steps(deep) == 1
    check_nesting(deep)
    for _ in range(100_000):
        deep = {"subtask_type": "group", "kwargs": {"tasks": [deep]}}
    with pytest.raises(InvalidInputError, match="nested at most 8 deep"):
        check_nesting(deep)
    assert count_steps(deep) == 1
    while isinstance(deep, dict):  # let go piece by piece: Python frees what is nested by recursion
        inside = deep.get("kwargs", {})
        deep = inside["body"] if "body" in inside else inside.get("tasks", [None])[0]
    with pytest.raises(InvalidInputError, match="given 10001: send fewer"):
        check_steps(NEXT_STEPS_MAX + 1)
    check_steps(NEXT_STEPS_MAX)


def nested(app: Celery, levels: int) -> Any:
    """Chords whose header is one chord, and so on."""
    found: Any = dict(note(app, 1))
    for _ in range(levels):
        kwargs = {"header": [found], "body": dict(note(app, 2))}
        found = {"task": "celery.chord", "args": [], "kwargs": kwargs, "options": {}, "subtask_type": "chord"}
        found |= {"immutable": False}
    return found


@pytest.mark.parametrize("levels", [NESTED_MAX, NESTED_MAX + 1])
def test_nested_chords_hold_up_nobody(valkey: Valkey, levels: int) -> None:
    """Celery takes a connection for each level, and waits for ever where there is none left."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                deep = await asyncio.to_thread(infer(app, "one").set(link=[nested(app, levels)]).apply_async)
                expected = "SUCCESS" if levels <= NESTED_MAX else "FAILURE"
                await until(lambda: state(valkey.client, deep.id) == expected, "its end")
                if expected == "FAILURE":
                    assert f"at most {NESTED_MAX} deep" in error_of(valkey, deep.id)
                short = chain(infer(app, "one"), infer(app, "one", then=True))
                last = await asyncio.to_thread(short.apply_async)
                await until(lambda: state(valkey.client, last.id) == "SUCCESS", "the chain beside it")

    run(test)


def test_who_waits_for_a_body_that_is_nested_too_deep_is_told(valkey: Valkey) -> None:
    """It is refused once the last part has ended."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                made = nested(app, NESTED_MAX + 1) | {"options": {"task_id": "body"}}
                options = {"group_id": "g", "group_index": 0, "chord": json.loads(json.dumps(made))}
                await asyncio.to_thread(lambda: infer(app, "one").apply_async(task_id="part", **options))
                await until(lambda: state(valkey.client, "body") == "FAILURE", "the refusal", 20)
            assert f"at most {NESTED_MAX} deep" in error_of(valkey, "body")

    run(test)


@pytest.mark.parametrize("options", [{"compression": "nope"}, {"compression": "zstd"}, {"delivery_mode": "x"}])
def test_a_next_step_that_cannot_be_sent_fails_its_task_at_once(valkey: Valkey, options: dict[str, str]) -> None:
    """kombu calls it an operational error, as if the broker were away."""

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                wrong = note(app, 1).set(**options)
                sent = await asyncio.to_thread(infer(app, "one").set(link=[wrong]).apply_async)
                await until(lambda: state(valkey.client, sent.id) == "FAILURE", "its end")
                assert "is not understood" in error_of(valkey, sent.id)

    run(test)


def test_a_producers_retry_policy_holds_up_nobody(valkey: Valkey) -> None:
    """Celery would sleep by it, in the thread of all canvases."""

    async def test() -> None:
        policy = {"max_retries": 1_000_000, "interval_start": 100_000, "interval_max": 1_000_000}
        valkey.client.set("taken", "no list")
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton):
            with plain_celery(valkey.url) as app:
                wrong = note(app, 1).set(queue="taken", retry=True, retry_policy=policy, compression="nope")
                sent = await asyncio.to_thread(infer(app, "one").set(link=[wrong]).apply_async)
                await until(lambda: state(valkey.client, sent.id) == "FAILURE", "its end")
                short = chain(infer(app, "one"), infer(app, "one", then=True))
                last = await asyncio.to_thread(short.apply_async)
                await until(lambda: state(valkey.client, last.id) == "SUCCESS", "the chain beside it")

    run(test)


def test_the_applications_of_a_worker_have_one_limit_of_connections(valkey: Valkey) -> None:
    """kombu has one for the whole process: another application's, used later, must not cut it while canvases go on."""
    app = Celery("worker", set_as_current=False)
    app.conf.update(celery_settings(broker_of(valkey.url)))

    def use_both() -> int:
        canvases = make_app(app.conf, "canvases", CapturingTransport, CapturingBackend)
        with canvases.pool.acquire(block=True), app.pool.acquire(block=True):
            return int(canvases.pool.limit)

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(use_both).result(timeout=30) >= 2 * NESTED_MAX
    app.close()
