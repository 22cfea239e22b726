"""Other applications and deployments on the same database: nobody's keys are touched, nobody's tasks are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from samphire import AsyncClient, InvalidInputError, ModelFaultError, ProtocolError, Step
from samphire.wire.keys import Keys, may_be_queue
from samphire_broker.settings import Settings
from samphire_broker.store import OtherDeploymentError, Store
from tests.stacks import Valkey
from tests.support.lane import FakeTriton, body, broken, fake_triton, lane_worker, until, x
from tests.support.names import KEYS
from tests.support.plain import plain_celery

BARE = (
    *(
        "workers",
        "scheduled",
        "scheduled:messages",
        "cancelled",
        "cancelled:lately",
        "cancelled:running",
        "tried",
        "alone",
    ),
    *(
        "leaders",
        "catalogue",
        "dead",
        "ended",
        "ended:before",
        "ended:turn",
        "sub:queues",
        "sub:cancels",
        "sub:deletes",
    ),
    *("sub:letters", "schema"),
)
"""Names that other applications have too."""

OTHERS: dict[str, Callable[[redis.Redis, str], Any]] = {
    "text": lambda client, key: client.set(key, "3"),
    "list": lambda client, key: client.rpush(key, "events:c one", "two"),
    "set": lambda client, key: client.sadd(key, "web-1", "web-2"),
    "sorted set": lambda client, key: client.zadd(key, {"one": 1, "two": 2}),
    "hash": lambda client, key: client.hset(key, mapping={"one": "1", "two": "2"}),
    "stream": lambda client, key: client.xadd(key, {"one": "1"}),
}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def use_everything(sdk: AsyncClient, triton: FakeTriton) -> None:
    """Tasks that end in each way, wait, are cancelled, redriven and deleted."""
    tasks = [await sdk.submit("m", x(n)) for n in range(20)]
    assert [(await task.result(20)).outputs["y"][0, 0] for task in tasks] == [n + 1 for n in range(20)]
    await tasks[0].result(20, delete=True)
    later = await sdk.submit("m", x(), delay_s=0.2)
    never = await sdk.submit("m", x(), delay_s=600)
    await until(lambda: True, "a moment")
    assert await never.cancel()
    assert (await later.result(20)).outputs["y"][0, 0] == 2
    chained = await sdk.chain(first := Step("m", {"x": x()["x"]}), Step("m", {"x": first["y"]}))
    assert (await chained.result(20)).outputs["y"][0, 0] == 3
    triton.behave["m"] = broken
    failed = await sdk.submit("m", x(), max_attempts=1)
    with pytest.raises(ModelFaultError):
        await failed.result(20)
    del triton.behave["m"]
    await sdk.dead_letters.redrive([failed.id])
    assert (await failed.result(20)).outputs["y"][0, 0] == 2


@pytest.mark.parametrize("kind", OTHERS)
def test_the_keys_of_other_applications_are_left_alone(valkey: Valkey, kind: str) -> None:
    """Whatever lies under the names that our own keys have behind the namespace."""

    async def test() -> None:
        for name in BARE:
            OTHERS[kind](valkey.client, name)
        before = {name: valkey.client.dump(name) for name in BARE}
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton), AsyncClient(valkey.url) as sdk:
            await use_everything(sdk, triton)
        assert {name: valkey.client.dump(name) for name in BARE} == before
        assert not list(valkey.client.scan_iter("*:returned"))

    run(test)


def test_every_own_key_stands_under_the_namespace(valkey: Valkey) -> None:
    """And every key of Celery's under Celery's prefix: nothing else is written."""

    async def test() -> None:
        names: dict[str, Any] = {"namespace": "mine", "celery_key_prefix": "app:"}
        async with (
            fake_triton("m") as triton,
            lane_worker(valkey.url, triton, **names),
            AsyncClient(valkey.url, **names) as sdk,
        ):
            await use_everything(sdk, triton)
            written = {key.decode() for key in valkey.client.scan_iter(count=10_000)}
            assert {key for key in written if not key.startswith(("mine:", "app:"))} <= {"_kombu.binding.celeryev"}
            channels = {name.decode() for name in valkey.client.pubsub_channels()}
            assert "mine:0:wake" in channels
            names_of_connections = {found["name"] for found in valkey.client.client_list() if found["name"]}
            assert all(name.startswith("mine:0:") for name in names_of_connections) and names_of_connections

    run(test)


def test_two_deployments_on_one_database(valkey: Valkey) -> None:
    """Each has its tasks, its results and its letters, of its SDK and of plain Celery."""

    async def test() -> None:
        first: dict[str, Any] = {"namespace": "first:", "celery_key_prefix": "one_"}
        second: dict[str, Any] = {"namespace": "second", "celery_key_prefix": "two"}
        async with (
            fake_triton("m") as a,
            fake_triton("m") as b,
            lane_worker(valkey.url, a, **first),
            lane_worker(valkey.url, b, **second),
            AsyncClient(valkey.url, **first) as ours,
            AsyncClient(valkey.url, **second) as theirs,
        ):
            for sdk, mine, other in ((ours, a, b), (theirs, b, a)):
                before = list(other.values)
                tasks = [await sdk.submit("m", x(n)) for n in range(50)]
                assert [(await task.result(20)).outputs["y"][0, 0] for task in tasks] == [n + 1 for n in range(50)]
                assert sorted(mine.values) == list(range(50)) and other.values == before
            task = await ours.submit("m", x(7))
            assert (await task.result(20)).outputs["y"][0, 0] == 8
            assert await theirs.task(task.id).status() == "queued"
            for prefix, mine in (("one_", a), ("two", b)):
                before = list(mine.values)
                answer = await asyncio.to_thread(ask_plainly, valkey.url, prefix)
                assert answer["outputs"][0]["data"] == [8] and mine.values == [*before, 7]

    run(test)


def ask_plainly(url: str, prefix: str) -> Any:
    """The result of a task of a plain application that has a `global_keyprefix`."""
    with plain_celery(url) as app:
        app.conf.broker_transport_options = {"global_keyprefix": prefix}
        app.conf.result_backend_transport_options = {"global_keyprefix": prefix}
        return app.send_task("samphire.infer", kwargs=body("m", 7), queue="inference").get(timeout=20)


def test_workers_of_another_namespace_on_the_same_queues_are_refused(valkey: Valkey) -> None:
    """By name, and for as long as one of the others lives."""

    async def test() -> None:
        other_worker = Store(Settings(broker_url=valkey.url, namespace="other"), "w1")
        await other_worker.enter()
        store = Store(Settings(broker_url=valkey.url), "w2")
        with pytest.raises(
            OtherDeploymentError, match=r"workers of the namespace 'other:' .* SAMPHIRE_CELERY_KEY_PREFIX"
        ):
            await store.enter()
        prefixed = Store(Settings(broker_url=valkey.url, celery_key_prefix="x:"), "w3")
        await prefixed.enter()
        await other_worker.leave()  # it was the last
        await store.enter()
        for one in (store, prefixed, other_worker):
            await one.close()

    run(test)


def test_the_mark_comes_back_after_an_outage(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    """It expires with the leases; whoever came meanwhile is told of by name."""

    async def test() -> None:
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton):
            await until(lambda: valkey.client.exists(KEYS.namespace_mark), "the mark")
            valkey.client.delete(KEYS.namespace_mark)
            await until(lambda: valkey.client.get(KEYS.namespace_mark) == b"samphire:", "the mark again")
            valkey.client.set(KEYS.namespace_mark, "other:")
            (lease,) = (key for key in valkey.client.keys(KEYS.worker_prefix + "*") if key.count(b":") == 2)
            valkey.client.delete(lease)  # as if it had lapsed
            await until(lambda: "two deployments serve the same queues" in caplog.text, "the log line")
            assert "'other:'" in caplog.text
            assert valkey.client.get(KEYS.namespace_mark) == b"other:"

    run(test)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("samphire:workers", ""),
        ("samphire.namespace", "shop_"),
        ("celery-task-meta-x", ""),
        ("_celery-task-meta-x", "shop"),
        ("_celery-taskset-meta-x.j", "shop"),
        ("_kombu.binding.celery", ""),
        ("unacked", ""),
        ("phire:dead", "sam"),
    ],
)
def test_no_next_step_goes_where_state_is_held(name: str, prefix: str) -> None:
    """Our own keys, the mark, and Celery's."""
    assert not may_be_queue(name, "samphire:", prefix)


def test_other_queues_may_be_named() -> None:
    """Any that an application may have."""
    for name in ("celery", "reports", "_reports", "reports:daily", "inference.m@acme", "samphire.control"):
        assert may_be_queue(name, "samphire:", "")


def test_a_mark_that_is_another_applications_key_is_left_alone(valkey: Valkey) -> None:
    """Then nobody is told, and the worker begins all the same."""

    async def test() -> None:
        valkey.client.sadd(KEYS.namespace_mark, "one")
        store = Store(Settings(broker_url=valkey.url), "w1")
        await store.enter()
        await store.leave()
        await store.close()
        assert valkey.client.smembers(KEYS.namespace_mark) == {b"one"}

    run(test)


@pytest.mark.parametrize("found", ["2", "a key of another type"])
def test_another_version_of_the_schema_is_told(valkey: Valkey, found: str) -> None:
    """To a worker, which does not begin, and to a client, whose task is not queued."""

    async def test() -> None:
        if found == "2":
            valkey.client.set(KEYS.schema, "2")
        else:
            valkey.client.sadd(KEYS.schema, "one")
        store = Store(Settings(broker_url=valkey.url), "w1")
        with pytest.raises(OtherDeploymentError, match=r"are of schema '.*', this worker knows schema 1: install"):
            await store.enter()
        await store.close()
        if found == "2":
            async with AsyncClient(valkey.url) as sdk:
                with pytest.raises(ProtocolError, match="by schema 2, this client knows schema 1: install"):
                    await sdk.submit("m", x())
            assert not valkey.client.exists("inference.m\x06\x163")

    run(test)


@pytest.mark.parametrize("namespace", ["a b", "a:b", "ä", "-x", "x" * 65, ":", "a*"])
def test_what_cannot_be_a_namespace_is_refused(namespace: str) -> None:
    """By client and worker."""
    with pytest.raises(InvalidInputError, match="expected a namespace"):
        Keys(namespace)


def test_a_celery_key_prefix_within_the_namespace_is_refused() -> None:
    """A queue could have the name of a key that holds state."""
    with pytest.raises(InvalidInputError, match="outside the namespace"):
        Keys("samphire", "samphire:app:")
    with pytest.raises(InvalidInputError, match="expected a Celery key prefix"):
        Keys("samphire", "a b")


def test_a_plain_application_beside_a_deployment(valkey: Valkey) -> None:
    """Its own queues, results and sets stay its own."""

    async def test() -> None:
        async with fake_triton("m") as triton, lane_worker(valkey.url, triton), AsyncClient(valkey.url) as sdk:
            with plain_celery(valkey.url) as app:
                sent = app.send_task("shop.bill", args=[1], queue="billing")
                await use_everything(sdk, triton)
                assert valkey.client.llen("billing") == 1
                assert app.AsyncResult(sent.id).state == "PENDING"

    run(test)
