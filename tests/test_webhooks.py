"""Webhooks, from the submit to the receiver: real broker, lane, SDK and receivers on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from samphire import AsyncClient, AsyncTask, InvalidInputError, Step
from samphire.wire.keys import INTAKE, delivery_queue, queue_lists
from samphire_broker.webhooks.registry import ChangedMeanwhileError, NoSuchEndpointError, Registry
from samphire_workers.settlement.next_steps import NESTED_MAX
from tests.stacks import Valkey
from tests.support.lane import (
    LaneWorker,
    body,
    broken,
    counting,
    fake_triton,
    in_a_loop,
    lane_worker,
    sleeping,
    state,
    until,
    x,
)
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.support.receiver import Receiver, never, receiver, status
from tests.support.webhooks import Hooks
from tests.test_rights import PASSWORD, rules, user_of


@pytest.fixture
def hooks(valkey: Valkey, tmp_path: Path) -> Hooks:
    return Hooks(valkey, tmp_path)


async def arrive(to: Receiver, count: int) -> None:
    await until(lambda: len(to.got) >= count, f"{count} webhooks")


@in_a_loop
async def test_the_end_of_a_task_arrives_signed_and_once(hooks: Hooks) -> None:
    """However it ends: with its state, its times, and the command that reads it; a small result goes along."""
    async with receiver() as to, fake_triton("one", "bad") as triton:
        triton.behave["bad"] = broken
        secret = hooks.add("orders", to, result_bytes=4096)
        async with hooks.worker(triton, max_attempts=1), AsyncClient(hooks.valkey.url) as client:
            good = await client.submit("one", x(), webhook="orders")
            await arrive(to, 1)
            event = to.got[0].verified(secret)
            assert (event.type, event.watermark) == ("task.succeeded", 1)
            assert event.data["task_id"] == good.id and event.data["state"] == "succeeded"
            assert event.data["command"] == f"samphire result {good.id}"
            assert event.data["submitted_at"] <= event.data["started_at"] <= event.data["finished_at"]
            assert event.data["result"]["outputs"][0]["shape"] == [1, 1]
            await client.submit("bad", x(), webhook="orders")
            await arrive(to, 2)
            failed = to.got[1].verified(secret)
            assert failed.type == "task.failed" and failed.data["error"]["type"] == "ModelFaultError"
            later = await client.submit("one", x(), webhook="orders", delay_s=3600)
            await later.cancel()
            await client.submit("one", x(), webhook="orders", delay_s=3600, deadline_s=3601)
            await arrive(to, 3)
            assert to.got[2].verified(secret).type == "task.cancelled"
            late = {"expires": datetime.now(UTC) - timedelta(seconds=1)}
            with plain_celery(hooks.valkey.url) as app:
                app.send_task("samphire.infer", kwargs={**body("one"), "webhook": "orders"}, queue="inference", **late)
            await arrive(to, 4)
            assert to.got[3].verified(secret).type == "task.expired"
            assert len(set(to.ids())) == 4
            marks = [received.verified(secret).watermark for received in to.got]
            assert marks == [1, 2, 3, 4]
            await until(lambda: not hooks.valkey.client.zcard(KEYS.waiting_deliveries("orders")), "their ends")
            assert hooks.valkey.client.llen(KEYS.of_celery(delivery_queue("orders"))) == 0


@in_a_loop
async def test_map_chains_streams_and_plain_producers(hooks: Hooks) -> None:
    """Each names it in its own way; a chain tells of its last step, also where that never runs."""
    async with receiver() as to, fake_triton("one", "bad", "talk") as triton:
        triton.behave["bad"] = broken
        triton.streams["talk"] = counting(3)
        secret = hooks.add("orders", to)
        async with hooks.worker(triton, max_attempts=1), AsyncClient(hooks.valkey.url) as client:
            results = [result async for result in client.map("one", [x(n) for n in range(5)], webhook="orders")]
            await arrive(to, 5)
            told = {received.verified(secret).data["task_id"] for received in to.got}
            assert told == {result.task_id for result in results}
            first = Step("one", x())
            whole = await client.chain(first, Step("one", {"x": first["y"]}), webhook="orders")
            await arrive(to, 6)
            assert to.got[5].verified(secret).data["task_id"] == whole.id
            first = Step("bad", x())
            never_run = await client.chain(first, Step("one", {"x": first["y"]}), webhook="orders")
            await arrive(to, 7)
            event = to.got[6].verified(secret)
            assert (event.data["task_id"], event.type) == (never_run.id, "task.failed")
            streamed = await client.submit("talk", x(), webhook="orders")
            await arrive(to, 8)
            assert to.got[7].verified(secret).data["task_id"] == streamed.id
            with plain_celery(hooks.valkey.url) as app:
                sent = app.send_task("samphire.infer", kwargs={**body("one"), "webhook": "orders"}, queue="inference")
                await arrive(to, 9)
                assert to.got[8].verified(secret).data["task_id"] == sent.id
            assert len(set(to.ids())) == len(to.got) == 9


@in_a_loop
async def test_a_chain_that_never_begins_is_told_of(hooks: Hooks) -> None:
    """It is cancelled or expires before a worker sees it, or is nested deeper than it may be."""
    async with receiver() as to, fake_triton("one") as triton:
        secret = hooks.add("orders", to)
        async with AsyncClient(hooks.valkey.url) as client:

            async def chain(**options: Any) -> AsyncTask:
                first = Step("one", x())
                return await client.chain(first, Step("one", {"x": first["y"]}), webhook="orders", **options)

            def change(what: Callable[[dict[str, Any]], None]) -> None:
                """The message that was sent last."""
                (queue,) = [
                    key for name in queue_lists(INTAKE) if hooks.valkey.client.exists(key := KEYS.of_celery(name))
                ]
                message = json.loads(hooks.valkey.client.lindex(queue, 0))
                what(message)
                hooks.valkey.client.lset(queue, 0, json.dumps(message))

            def nest(message: dict[str, Any]) -> None:
                args, kwargs, more = json.loads(message["body"])
                steps = kwargs["signature"]["kwargs"]["tasks"]
                group = {"task": "celery.group", "args": [], "options": {}, "subtask_type": "group", "immutable": False}
                for _ in range(NESTED_MAX + 1):
                    steps[0] = {**group, "kwargs": {"tasks": [steps[0]]}}
                message["body"] = json.dumps([args, kwargs, more])

            expired = await chain()
            change(lambda message: message["headers"].update(expires="2020-01-01T00:00:00+00:00"))
            refused = await chain()
            change(nest)
            async with hooks.worker(triton):
                cancelled = await chain(delay_s=3600)
                assert await cancelled.cancel()
                await arrive(to, 3)
            events = [received.verified(secret) for received in to.got]
            assert {event.data["task_id"]: event.type for event in events} == {
                cancelled.id: "task.cancelled",
                expired.id: "task.expired",
                refused.id: "task.failed",
            }
            assert all(event.data["model"] == "one" for event in events)
            (error,) = [event.data["error"] for event in events if event.type == "task.failed"]
            assert error["type"] == "InvalidInputError" and "nested" in error["message"]


@in_a_loop
async def test_steps_that_cannot_be_sent_take_no_webhook_with_them(hooks: Hooks) -> None:
    """The worker's user has no right to push them: whoever waits for the task's end is told of it all the same."""
    async with receiver() as to, fake_triton("one", "bad") as triton:
        triton.behave["bad"] = broken
        secret = hooks.add("orders", to)
        few = user_of(hooks.valkey, "few", "on", f">{PASSWORD}", *rules()["worker"].split(), "%R~elsewhere*")
        async with lane_worker(few, triton, **hooks.settings(max_attempts=1)):
            with plain_celery(hooks.valkey.url) as app:
                step = app.signature("n", queue="elsewhere", immutable=True)
                sent = [
                    app.send_task("samphire.infer", kwargs=kwargs, queue="inference", link=step, link_error=step)
                    for kwargs in ({**body(model), "webhook": "orders"} for model in ("one", "bad"))
                ]
                await arrive(to, 2)
            told = {(event := received.verified(secret)).data["task_id"]: event.type for received in to.got}
            assert told == {task.id: "task.failed" for task in sent}


@in_a_loop
async def test_what_cannot_be_told_is_refused(hooks: Hooks) -> None:
    """At submit, with what to do; a plain producer's task ends as invalid input."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        hooks.add("theirs", to, tenant="acme")
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await until(lambda: hooks.valkey.client.hexists(KEYS.webhook_names, "*"), "the policy")
            for webhook, expected in (
                ("nobody", "no webhook endpoint 'nobody'"),
                ("theirs", "no webhook endpoint 'theirs'"),
                ("", "no webhook endpoint"),
                ("https://10.0.0.1:22/", "port"),
                (f"http://169.254.169.254:{to.port}/", "not one that webhooks are sent to"),
                (to.url, "rotate --default"),
            ):
                with pytest.raises(InvalidInputError, match=expected):
                    await client.submit("one", x(), webhook=webhook)
            with plain_celery(hooks.valkey.url) as app:
                for webhook in ("nobody", "theirs", "@", "*", "ftp://x/"):
                    sent = app.send_task(
                        "samphire.infer", kwargs={**body("one"), "webhook": webhook}, queue="inference.one"
                    )
                    await until(lambda sent=sent: state(hooks.valkey.client, sent.id) == "FAILURE", "its end")
                    assert hooks.valkey.client.hget(KEYS.dead_prefix + sent.id, "reason") == b"invalid_input"
                wrong = app.send_task("samphire.infer", kwargs={**body("one"), "webhook": 7}, queue="inference.one")
                await until(lambda: state(hooks.valkey.client, wrong.id) == "FAILURE", "its end")
            assert not triton.asked and not to.got


@in_a_loop
async def test_a_url_is_signed_with_the_tenants_default_secret(hooks: Hooks) -> None:
    """Its path and query stand in no log and no key's name."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.ports.add(to.port)
        with hooks.registry() as registry:
            secret, theirs = registry.rotate_default("").secrets[0], registry.rotate_default("acme").secrets[0]
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await until(lambda: hooks.valkey.client.hexists(KEYS.webhook_names, "*"), "the policy")
            await client.submit("one", x(), webhook=to.url)
            await arrive(to, 1)
            assert to.got[0].path == "/hook/token-in-path?key=token-in-query"
            to.got[0].verified(secret)
            async with AsyncClient(hooks.valkey.url, tenant="acme") as acme:
                await acme.submit("one", x(), webhook=to.url)
                await arrive(to, 2)
            assert to.got[1].verified(theirs).data["tenant"] == "acme"
        names = [key.decode() for key in hooks.valkey.client.scan_iter(count=10_000)]
        assert not [name for name in names if "token" in name]


@in_a_loop
async def test_started_and_progress_are_told_where_they_are_wanted(hooks: Hooks) -> None:
    """Sequence numbers grow with the events of a task, over its attempts too."""
    async with receiver() as to, fake_triton("one") as triton:
        failures = [broken, sleeping(0)]

        async def behave(context: Any) -> None:
            await failures.pop(0)(context)

        triton.behave["one"] = behave
        secret = hooks.add("all", to, events=("started", "terminal"))
        async with hooks.worker(triton, backoff_base_s=0), AsyncClient(hooks.valkey.url) as client:
            task = await client.submit("one", x(), webhook="all")
            await arrive(to, 3)
            events = sorted((r.verified(secret) for r in to.got), key=lambda event: event.data["sequence"])
            assert [event.type for event in events] == ["task.started", "task.started", "task.succeeded"]
            assert {event.data["task_id"] for event in events} == {task.id}


@in_a_loop
async def test_a_redriven_task_tells_of_its_next_run(hooks: Hooks) -> None:
    """Under another id, with a higher sequence number and the run."""
    async with receiver() as to, fake_triton("one") as triton:
        triton.behave["one"] = broken
        secret = hooks.add("orders", to)
        async with hooks.worker(triton, max_attempts=1), AsyncClient(hooks.valkey.url) as client:
            task = await client.submit("one", x(), webhook="orders")
            await arrive(to, 1)
            del triton.behave["one"]
            await client.dead_letters.redrive([task.id])
            await arrive(to, 2)
            first, second = (received.verified(secret) for received in to.got)
            assert (first.data["run"], second.data["run"], second.type) == (1, 2, "task.succeeded")
            assert second.data["sequence"] > first.data["sequence"] and first.id != second.id


@in_a_loop
async def test_a_task_that_is_sent_again_tells_of_its_next_run(hooks: Hooks) -> None:
    """Of its start too: a producer has sent the same id again after its failure."""
    async with receiver() as to, fake_triton("one") as triton:
        triton.behave["one"] = broken
        secret = hooks.add("orders", to, events=("started", "terminal"))
        async with hooks.worker(triton, max_attempts=1):
            with plain_celery(hooks.valkey.url) as app:
                for count in (2, 4):
                    kwargs = {**body("one"), "webhook": "orders"}
                    app.send_task("samphire.infer", kwargs=kwargs, queue="inference", task_id="order-7")
                    await arrive(to, count)
                    triton.behave.pop("one", None)
        events = [received.verified(secret) for received in to.got]
        runs = sorted((event.data["run"], event.type) for event in events)
        assert runs == [(1, "task.failed"), (1, "task.started"), (2, "task.started"), (2, "task.succeeded")]
        assert len({event.id for event in events}) == 4


@in_a_loop
async def test_attempts_are_equal_to_the_byte(hooks: Hooks) -> None:
    """Id and body; only the time and with it the signature is new. So are a redelivery and a recovery."""
    async with receiver(status(500)) as to, fake_triton("one") as triton:
        secret = hooks.add("orders", to, schedule_s=(0, 0.01, 0.01))
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            task = await client.submit("one", x(), webhook="orders")
            await arrive(to, 3)
            await until(lambda: hooks.valkey.client.zcard(KEYS.dead), "its dead letter")
            delivery_id = to.got[0].id
            letter = hooks.valkey.client.hgetall(KEYS.dead_prefix + delivery_id)
            assert letter[b"reason"] == b"undelivered" and len(json.loads(letter[b"history"])) == 3
            to.respond = status(200)
            with hooks.deliveries() as book:
                (told,) = await _in_thread(lambda: list(book.of("orders")))
                assert (told.state, told.task_id, len(told.attempts)) == ("failed", task.id, 3)
                assert [attempt["status"] for attempt in told.attempts] == [500, 500, 500]
                assert await _in_thread(lambda: book.recover("orders", 0)) == 1
                await arrive(to, 4)
                await until(lambda: not hooks.valkey.client.zcard(KEYS.dead), "the end of the letter")
                attempt = await _in_thread(lambda: book.redeliver(delivery_id))
                assert attempt["status"] == 200 and attempt["answer"] == "no"
                assert await _in_thread(lambda: book.replay_missing("orders", 0)) == 1
                assert await _in_thread(lambda: book.replay_missing("orders", 1)) == 0
            await arrive(to, 6)
            assert {(received.id, received.body) for received in to.got} == {(delivery_id, to.got[0].body)}
            assert {received.verified(secret).watermark for received in to.got} == {1}


async def _in_thread(work: Any) -> Any:
    return await asyncio.to_thread(work)


@in_a_loop
async def test_secrets_rotate_with_a_grace_of_their_own(hooks: Hooks) -> None:
    """Each old one signs for its own grace, whatever is rotated after it."""
    async with receiver() as to, fake_triton("one") as triton:
        first = hooks.add("orders", to, signature="both")
        with hooks.registry() as registry:
            second = registry.rotate("orders", grace_s=3600).secrets
            third = registry.rotate("orders", grace_s=0).secrets
            assert len(second) == len(third) == 2
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await client.submit("one", x(), webhook="orders")
            await arrive(to, 1)
            assert to.got[0].headers["webhook-signature"].count("v1a,") == 2
            for secret in (first, *third):
                to.got[0].verified(secret)
            for secret in second:
                with pytest.raises(Exception, match="no signature fits"):
                    to.got[0].verified(secret)


def test_two_rotations_at_once_are_one(hooks: Hooks) -> None:
    """The other says so."""
    to = Receiver(port=443, scheme="https")
    hooks.add("orders", to)
    with hooks.registry() as one, hooks.registry() as other:
        write = one._write

        def late(*args: Any, **kwargs: Any) -> bool:
            other.rotate("orders")
            return write(*args, **kwargs)

        one._write = late  # type: ignore[method-assign]
        with pytest.raises(ChangedMeanwhileError):
            one.rotate("orders")
        with pytest.raises(NoSuchEndpointError):
            one.rotate("nobody")
        with pytest.raises(InvalidInputError, match="already"):
            other.add(one.state("orders").endpoint, "v1")


async def disabled(worker: LaneWorker, registry: Registry) -> None:
    """Disable the endpoint, and wait until the worker has seen it."""
    registry.disable("orders")
    await until(lambda: (found := worker.lane._book.get("orders")) and found.disabled, "the worker to see it")


@in_a_loop
async def test_a_disabled_endpoints_deliveries_wait_and_a_removed_ones_are_dead_letters(hooks: Hooks) -> None:
    """No attempt meanwhile; a letter each, and the count is shown."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.add("orders", to)
        async with hooks.worker(triton) as worker, AsyncClient(hooks.valkey.url) as client:
            with hooks.registry() as registry:
                await disabled(worker, registry)
                tasks = [await client.submit("one", x(), webhook="orders") for _ in range(5)]
                for task in tasks:
                    await task.result(timeout_s=10)
                await until(lambda: registry.state("orders").waiting == 5, "what waits")
                assert registry.enable("orders") == 5
                await arrive(to, 5)
                await disabled(worker, registry)
                to.respond = never
                for _ in range(5):
                    await client.submit("one", x(), webhook="orders")
                await until(lambda: registry.state("orders").waiting == 5, "what waits")
                assert registry.remove("orders") == 5
            await until(lambda: hooks.valkey.client.zcard(KEYS.dead) == 5, "the letters")
            (letter,) = await client.dead_letters.list(limit=1)
            assert letter.reason == "endpoint_removed" and "was removed" in letter.error
            assert len(to.got) == 5


@in_a_loop
async def test_410_disables(hooks: Hooks) -> None:
    """And operators are told in the same step."""
    async with receiver(status(410)) as to, fake_triton("one") as triton:
        hooks.add("orders", to, schedule_s=(0, 0, 0, 0))
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url) as client:
            await client.submit("one", x(), webhook="orders")
            with hooks.registry() as registry:
                await until(lambda: registry.state("orders").endpoint.disabled == "gone", "its end")
            events = [json.loads(fields[b"e"]) for _, fields in hooks.valkey.client.xrange(KEYS.operator_events)]
            assert [event["type"] for event in events] == ["webhook.endpoint.disabled"]
            assert json.loads(hooks.valkey.client.hget(KEYS.webhook_names, "orders") or b"")["disabled"]
            await client.submit("one", x(), webhook="orders")
            await until(lambda: hooks.valkey.client.zcard(KEYS.waiting_deliveries("orders")) == 2, "what waits")
            assert len(to.got) == 1
