"""Every command of every call is cut once: its reply, when the broker has carried it out, and its request before.

A case is a call with its setting. It is run again and again, with the first command cut, then the second, until there
is none left to cut: connecting, loading a script and repeating are commands like any other. Afterwards every
id is accounted for. A public method without a case fails the test.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import pytest

from samphire import (
    BrokerUnavailableError,
)
from samphire.transport.direct import Script
from samphire_broker.store import (
    Appended,
    Claimed,
    LogEntry,
    Looked,
    OtherEnd,
    Settlement,
    Started,
    Store,
    Tried,
    Webhook,
)
from samphire_broker.store.calls import VERBS, script_text
from tests.proxy import Proxy, Where, cutting_proxy
from tests.stacks import Valkey, running_valkey
from tests.support.names import KEYS
from tests.test_store import META, QUEUE, Worker, everywhere, failed, push, status

T = TypeVar("T")


MOST_CUTS = 60
"""More commands than any call makes: a case that is cut more often than this does not come to its end."""


REPEATS = 3


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """The call, repeated after a lost reply as lanes and callers repeat it."""
    for _ in range(REPEATS):
        try:
            return await call()
        except BrokerUnavailableError as error:
            assert error.retryable
    raise AssertionError(f"after one cut, {REPEATS} calls failed")


def public_methods(kind: type) -> set[str]:
    """Names of what can be called, but for closing."""
    return {name for name in dir(kind) if not name.startswith("_")} - {"close"}


def scripts() -> dict[str, str]:
    """Names of the store's scripts by SHA-1."""
    found = {verb: script_text(verb, KEYS) for verb in VERBS}
    found["submit"] = (resources.files("samphire.transport") / "submit.lua").read_text()
    return {Script(text).sha: name for name, text in found.items()}


@dataclass
class Setting:
    """A worker behind the proxy, and another that is not."""

    valkey: Valkey
    worker: Worker
    other: Worker
    arm: Callable[[], None]
    """From here on commands are cut."""
    proxy_url: str

    async def claims(self, *names: str) -> list[Claimed]:
        """Messages that the worker has claimed."""
        push(self.valkey, *names)
        return await self.worker.claim()

    def ended(self) -> list[tuple[str, str]]:
        """Events in the stream, one by one."""
        entries = [fields for _, fields in self.valkey.client.xrange("samphire:events:c")]
        return [(k.decode(), v.decode()) for fields in entries for k, v in fields.items() if k != b"result"]


async def beat(s: Setting) -> None:
    s.arm()
    assert await again(s.worker.beat) >= 1
    assert s.valkey.client.smembers(KEYS.workers) == {b"w1", b"w2"}


async def claim(s: Setting) -> None:
    push(s.valkey, "a", "b", "c")
    held = {c.field: c for c in await s.worker.claim(1)}
    s.arm()
    try:
        claimed = await s.worker.claim(1)
    except BrokerUnavailableError:
        claimed = await again(lambda: s.worker.store.adopt(set(held)))
    held |= {c.field: c for c in claimed}
    inflight = s.valkey.client.hgetall("samphire:worker:w1:inflight")
    assert {c.field.encode(): c.message for c in held.values()} == inflight
    assert everywhere(s.valkey) == ["a", "b", "c"]


async def adopt(s: Setting) -> None:
    await s.claims("a", "b")
    s.arm()
    assert [c.message for c in await again(lambda: s.worker.store.adopt(set()))] == [b"a", b"b"]
    assert everywhere(s.valkey) == ["a", "b"]


async def start(s: Setting) -> None:
    claims = await s.claims("a", "done", "done", "gone")
    await s.worker.settle(claims[1])
    await s.other.store.cancel(META, ["gone"])
    s.arm()
    first, _, duplicate, cancelled = await again(lambda: s.worker.start(claims))
    assert (first, cancelled) == (0, Started.CANCELLED)
    assert duplicate in (-1, -2)  # the second time it is not ours any more, which comes to the same
    assert (status(s.valkey, "a"), status(s.valkey, "done")) == ("STARTED", "SUCCESS")
    assert everywhere(s.valkey) == ["a", "gone"]
    assert s.valkey.client.hvals("samphire:worker:w1:started") == [b"a"]


async def settle(s: Setting) -> None:
    done, dead = await s.claims("a", "b")
    await s.worker.start([done, dead])
    succeeded = Settlement(done.field, "a", "succeeded", '{"status":"SUCCESS"}', "events:c", pushes=((QUEUE, "next"),))
    s.arm()
    ours = await again(lambda: s.worker.store.settle([succeeded, failed(dead, "b", stream="events:c")]))
    assert ours in ([1, 1], [0, 0])
    assert (status(s.valkey, "a"), status(s.valkey, "b")) == ("SUCCESS", "FAILURE")
    assert sorted(s.ended()) == [("failed", "b"), ("succeeded", "a")]
    assert everywhere(s.valkey) == ["b", "next"]


async def append(s: Setting) -> None:
    (claim,) = await s.claims("a")
    await s.worker.start([claim])
    entries = [LogEntry(claim.field, "a", 1.0, 2, 3, "output", 2.0, 3, 3, b"abc")]
    entries.append(LogEntry(claim.field, "a", 1.0, 5, 1, "output", 2.0, 4, 4, b"d"))
    s.arm()
    for entry in entries:
        assert (await again(lambda entry=entry: s.worker.store.append([entry]))) == [Appended.WRITTEN]  # type: ignore[misc]
    log = [fields[b"e"] for _, fields in s.valkey.client.xrange(KEYS.log_prefix + "a")]
    assert log == [b"started", b"output", b"output"]


async def serve_follows(s: Setting) -> None:
    push(s.valkey, "a")
    s.valkey.client.rpush(KEYS.follows, "a")
    s.arm()
    await again(s.worker.store.serve_follows)
    assert not s.valkey.client.exists(KEYS.follows)
    assert s.valkey.client.xlen(KEYS.log_prefix + "a") == 1


async def notify(s: Setting) -> None:
    (claim,) = await s.claims("a")
    webhook = Webhook("msg_1", "hook", '{"samphire_watermark":0}')
    s.arm()
    assert await again(lambda: s.worker.store.notify([(claim.field, "a", webhook)])) == 0
    assert s.valkey.client.lrange("samphire.webhooks.hook", 0, -1) == [b'{"samphire_watermark":1}']
    assert s.valkey.client.zrange(KEYS.waiting_deliveries("hook"), 0, -1) == [b"msg_1"]


async def endpoints(s: Setting) -> None:
    s.valkey.client.hset(KEYS.webhook_config, "hook", "{}")
    s.arm()
    assert await again(s.worker.store.endpoints) == {"hook": b"{}"}


async def publish_webhook_policy(s: Setting) -> None:
    s.arm()
    await again(lambda: s.worker.store.publish_webhook_policy(b"{}"))
    assert s.valkey.client.hget(KEYS.webhook_names, "*") == b"{}"


async def endpoint_health(s: Setting) -> None:
    s.valkey.client.hset(KEYS.webhook_health, "hook", "{}")
    s.arm()
    assert await again(lambda: s.worker.store.endpoint_health("hook")) == b"{}"


async def keep_endpoint_health(s: Setting) -> None:
    s.arm()
    await again(lambda: s.worker.store.keep_endpoint_health("hook", b"{}", 50, b"warning"))
    assert s.valkey.client.hget(KEYS.webhook_health, "hook") == b"{}"
    assert s.valkey.client.xlen(KEYS.operator_events) == 1


async def change_endpoint(s: Setting) -> None:
    s.arm()
    await again(lambda: s.worker.store.change_endpoint("hook", b"", b"{}", b"{}", b"event"))
    assert s.valkey.client.hget(KEYS.webhook_config, "hook") == b"{}"
    assert s.valkey.client.xlen(KEYS.operator_events) == 1


async def release(s: Setting) -> None:
    claims = await s.claims("a", "b")
    await s.worker.start(claims[:1])
    s.arm()
    assert await again(lambda: s.worker.store.release([c.field for c in claims], attempt="{}")) in (2, 0)
    assert s.valkey.client.lrange(QUEUE, 0, -1) == [b"b", b"a"]
    assert s.valkey.client.hget("samphire:task:a", "attempts") == b"1"


async def route(s: Setting) -> None:
    claims = await s.claims("a", "b")
    s.arm()
    moves = [(c.field, "inference.n", "inference.n") for c in claims]
    assert await again(lambda: s.worker.store.route(moves)) in (2, 0)
    assert s.valkey.client.lrange("inference.n", 0, -1) == [b"b", b"a"]
    assert everywhere(s.valkey) == []


async def schedule(s: Setting) -> None:
    claims = await s.claims("a", "b")
    s.arm()
    tasks = [(c.field, c.message.decode(), 4e9) for c in claims]
    assert await again(lambda: s.worker.store.schedule(tasks)) in ([1, 1], [0, 0])
    assert everywhere(s.valkey) == ["a", "b"]
    assert s.valkey.client.zrange(KEYS.scheduled, 0, -1) == [b"a", b"b"]


async def return_due(s: Setting) -> None:
    await schedule(s)
    s.valkey.client.zadd(KEYS.scheduled, {"a": 1})
    s.arm()
    assert await again(s.worker.store.return_due) in (1, 0)
    assert s.valkey.client.lrange(QUEUE, 0, -1) == [b"a"]
    assert everywhere(s.valkey) == ["a", "b"]


async def cancel(s: Setting) -> None:
    push(s.valkey, "a", "b")
    s.valkey.client.rpush(KEYS.cancels, "events:c a")
    s.arm()
    await again(lambda: s.worker.store.cancel(META, ["b"]))
    assert status(s.valkey, "a") == "REVOKED"
    assert s.ended() == [("cancelled", "a")]
    assert set(s.valkey.client.zrange(KEYS.cancelled, 0, -1)) == {b"a", b"b"}
    assert everywhere(s.valkey) == ["a", "b"]


async def is_cancelled(s: Setting) -> None:
    await s.other.store.cancel(META, ["b"])
    s.arm()
    assert await again(lambda: s.worker.store.is_cancelled("b"))


async def delete_results(s: Setting) -> None:
    (done,) = await s.claims("a")
    await s.worker.settle(done, '{"status":"SUCCESS","result":{"ref":{"key":"result:blob:a:0"}}}')
    s.valkey.client.set("samphire:result:blob:a:0", "data")
    s.valkey.client.rpush(KEYS.deletes, "a", "a")
    s.arm()
    assert await again(s.worker.store.delete_results) in (2, 0)
    assert json.loads(s.valkey.client.get(KEYS.meta_prefix + "a"))["result"] == {"deleted": True}
    assert not s.valkey.client.exists("samphire:result:blob:a:0", KEYS.deletes)


async def serve_letters(s: Setting) -> None:
    one, two = await s.claims("a", "b")
    await s.worker.store.settle([failed(one, "a"), failed(two, "b")])
    s.valkey.client.rpush(KEYS.letters, "redrive a", "purge b", "redrive c")
    s.arm()
    assert await again(s.worker.store.serve_letters) in (3, 0)
    assert everywhere(s.valkey) == ["a"]
    assert (status(s.valkey, "a"), status(s.valkey, "b")) == (None, "FAILURE")


async def trim_letters(s: Setting) -> None:
    claims = await s.claims("a", "b", "c")
    await s.worker.store.settle([failed(claim, claim.message.decode()) for claim in claims])
    s.arm()
    trimmed = await again(s.worker.store.trim_letters)
    assert (trimmed.deleted, trimmed.left) in ((1, 2), (0, 2))
    assert everywhere(s.valkey) == ["b", "c"]


async def tried(s: Setting) -> None:
    claims = await s.claims("a", "b")
    await s.worker.start(claims)
    await s.worker.store.release([claims[0].field], attempt="{}", endpoint_died=True)
    s.arm()
    assert await again(lambda: s.worker.store.tried(["a", "b"])) == [Tried(1, 1, 1, 1), Tried(0, 0)]


async def alone(s: Setting) -> None:
    (claim,) = await s.claims("a")
    await s.worker.start([claim])
    s.arm()
    assert await again(lambda: s.worker.store.alone("m", 60)) == 0
    assert await s.other.store.alone("", 60) == -1
    s.arm()
    assert await again(lambda: s.worker.store.alone("m", 0)) == 0
    assert await s.other.store.alone("", 60) == 1


async def lead(s: Setting) -> None:
    """One worker leads a model, and gives that back; until then nobody else does."""
    s.arm()
    assert await again(lambda: s.worker.store.lead("m")) == 1
    assert await s.other.store.lead("m") == 0
    s.arm()
    assert await again(lambda: s.worker.store.lead("m", give_back=True)) == 0
    assert await s.other.store.lead("m") == 1


async def give_back(s: Setting) -> None:
    """All claims return to their queue, in their order."""
    await s.claims("a", "b")
    s.arm()
    await again(s.worker.store.give_back)
    assert s.valkey.client.lrange(QUEUE, 0, -1) == [b"b", b"a"]
    assert not s.valkey.client.exists("samphire:worker:w1:inflight")


async def scheduled(s: Setting) -> None:
    """The earliest first."""
    claims = await s.claims("a", "b")
    now = time.time()
    tasks = [(claim.field, claim.message.decode(), now + 60 - n) for n, claim in enumerate(claims)]
    await s.worker.store.schedule(tasks)
    s.arm()
    found = await again(lambda: s.worker.store.scheduled(10))
    assert [(task_id, list_key, message) for task_id, _, list_key, message in found] == [
        ("b", QUEUE, b"b"),
        ("a", QUEUE, b"a"),
    ]


async def name_queues(s: Setting) -> None:
    s.arm()
    await again(lambda: s.worker.store.name_queues(["inference.m", "inference.n"]))
    assert await s.other.store.known_queues() == {"inference.m", "inference.n"}


async def publish_catalogue(s: Setting) -> None:
    s.valkey.client.hset(KEYS.catalogue, "gone", "{}")
    s.arm()
    await again(lambda: s.worker.store.publish_catalogue({"m": b"{}"}))
    own = f"@{s.worker.store.worker_id}".encode()
    assert s.valkey.client.hgetall(KEYS.catalogue) == {b"m": b"{}", own: b"m"}
    assert s.valkey.client.ttl(KEYS.catalogue) > 0


async def others(s: Setting) -> None:
    s.arm()
    assert await again(s.worker.store.others) == {"w2": 1}


async def connected(s: Setting) -> None:
    s.arm()
    assert "w2" in await again(s.worker.store.connected)


async def hostname(s: Setting) -> None:
    s.arm()
    assert await again(lambda: s.worker.store.hostname("w2")) == "w2@host"


async def broker_run(s: Setting) -> None:
    s.arm()
    run, uptime_s = await again(s.worker.store.broker_run)
    assert run == s.valkey.client.info("server")["run_id"] and uptime_s >= 0


async def missing_rights(s: Setting) -> None:
    s.arm()
    assert await again(s.worker.store.missing_rights) == []


async def is_another_alone(s: Setting) -> None:
    await s.other.store.alone("m", 60)
    s.arm()
    assert await again(lambda: s.worker.store.is_another_alone("m")) is True


async def end_others(s: Setting) -> None:
    """An end that Celery writes for another task is written once."""
    end = OtherEnd("x", "failed", '{"status":"FAILURE","task_id":"x","result":{}}', "events:c")
    s.arm()
    await again(lambda: s.worker.store.end_others([end]))
    assert b'"FAILURE"' in s.valkey.client.get(KEYS.meta_prefix + "x")
    assert s.valkey.client.xlen("samphire:events:c") == 1


async def reap(s: Setting) -> None:
    push(s.valkey, "a", "b")
    claims = await s.other.claim()
    await s.other.start(claims[:1])
    s.arm()
    assert await again(lambda: s.worker.store.reap("w2", 1, "{}")) in ((2, 1, 0), (0, 0, 0))
    assert s.valkey.client.lrange(QUEUE, 0, -1) == [b"b", b"a"]
    assert s.valkey.client.hget("samphire:task:a", "attempts") == b"1"
    assert await s.other.settle(claims[0]) == 0


async def leave(s: Setting) -> None:
    s.arm()
    await again(s.worker.store.leave)
    assert s.valkey.client.smembers(KEYS.workers) == {b"w2"}
    assert not s.valkey.client.exists("samphire:worker:w1", "samphire:worker:w1:info")


async def known_queues(s: Setting) -> None:
    s.valkey.client.sadd(KEYS.queues, "inference.m")
    s.arm()
    assert await again(s.worker.store.known_queues) == {"inference.m"}


async def find_queues(s: Setting) -> None:
    push(s.valkey, "a")
    s.arm()
    assert await again(lambda: s.worker.store.find_queues(0)) == (0, {"inference.m"})


async def enter(s: Setting) -> None:
    fresh = Worker(s.proxy_url, "w1")  # what is done when its connection is opened is cut as well
    s.valkey.client.set(KEYS.epoch, "old another")
    s.arm()
    try:
        await again(fresh.store.enter)
    finally:
        await fresh.named.close()
        await fresh.store.close()
    assert s.valkey.client.get(KEYS.epoch) != b"old another"
    assert s.valkey.client.get(KEYS.schema) == b"1"
    assert s.valkey.client.get(KEYS.namespace_mark) == KEYS.namespace.encode()


async def depths(s: Setting) -> None:
    s.valkey.client.rpush("inference.m", b'{"headers": {"samphire_sent_at": 12.5}}', b"{}")
    s.valkey.client.rpush("inference.n", b'{"headers": {"samphire_sent_at":1.2.3}}', b'"samphire_sent_at":7')
    s.valkey.client.set("inference.o", "no list")
    s.valkey.client.rpush("inference.q", b'{"headers": {"eta": "2026-01-01T00:00:00", "samphire_sent_at": 12.5}}')
    s.arm()
    found = await again(lambda: s.worker.store.depths([f"inference.{model}" for model in "mnopq"]))
    assert found == [(2, None), (2, 7.0), (0, None), (0, None), (1, None)]


async def look_at_queues(s: Setting) -> None:
    s.valkey.client.sadd(KEYS.queues, "inference.full", "inference.empty", "inference.new")
    s.valkey.client.rpush("inference.full", "x")
    s.arm()
    found = await again(lambda: s.worker.store.look_at_queues(["inference.full", "inference.empty"], ["inference.new"]))
    assert found == [1, Looked.FORGOTTEN, 0]
    assert s.valkey.client.smembers(KEYS.queues) == {b"inference.full", b"inference.new"}


async def read_blob(s: Setting) -> None:
    s.valkey.client.set("samphire:sub:blob:a:0", b"x" * 200_000)
    s.arm()
    assert await again(lambda: s.worker.store.read_blob("sub:blob:a:0", 200_000)) == b"x" * 200_000


async def write_blob(s: Setting) -> None:
    s.arm()
    ref = await again(lambda: s.worker.store.write_blob("t", "a", 0, b"x" * 200_000, "sha"))
    assert s.valkey.client.get(KEYS.own(ref.key)) == b"x" * 200_000
    assert s.valkey.client.ttl(KEYS.own(ref.key)) > 0


STORE_CASES: dict[str, Callable[[Setting], Awaitable[None]]] = {
    case.__name__: case
    for case in (
        *(beat, claim, adopt, start, settle, release, route, schedule, return_due, cancel, is_cancelled),
        *(delete_results, serve_letters, publish_catalogue, others, connected, hostname, reap, leave),
        *(known_queues, name_queues, find_queues, read_blob, write_blob, tried, trim_letters, alone),
        *(lead, give_back, scheduled, broker_run, missing_rights, is_another_alone, end_others, enter, look_at_queues),
        *(depths, append, serve_follows, notify, endpoints, publish_webhook_policy, endpoint_health),
        *(keep_endpoint_health, change_endpoint),
    )
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A broker whose database each case empties."""
    with running_valkey(tmp_path_factory.mktemp("valkey")) as valkey:
        yield valkey


async def cut_all(name: str, where: Where, proxy: Proxy, case: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
    """Run a case with each of its commands cut, one after the other."""
    for number in range(MOST_CUTS):
        try:
            await case(lambda number=number: proxy.cut(where, number))  # type: ignore[misc]
        except BaseException as error:
            error.add_note(f"{name}, {where} {number} cut: {proxy.cut_commands[-1:]}")
            raise
        if proxy.disarm():
            assert number, f"{name}: nothing was cut"
            return
    raise AssertionError(f"{name} was cut {MOST_CUTS} times, and is not done")


@pytest.mark.parametrize("where", ["request", "reply"])
def test_every_command_of_the_store_is_cut(server: Valkey, where: Where) -> None:
    """Repeated as the lane repeats it, each call has its effect once."""
    assert STORE_CASES.keys() == public_methods(Store) - {"worker_id", "some_tried", "some_cancelled", "clock"}

    async def test() -> set[str]:
        async with cutting_proxy(server.url) as proxy:
            for name, case in STORE_CASES.items():

                async def run(arm: Callable[[], None], case: Any = case) -> None:
                    server.client.flushdb()
                    server.client.script_flush()  # loading it again can be cut as well
                    worker, other = Worker(proxy.url, "w1", dead_letters_max=2), Worker(server.url, "w2")
                    await worker.beat()
                    await other.beat()

                    def arm_anew() -> None:
                        server.client.script_flush()
                        arm()

                    try:
                        await case(Setting(server, worker, other, arm_anew, proxy.url))
                    finally:
                        for made in (worker, other):
                            await made.named.close()
                            await made.store.close()

                await cut_all(name, where, proxy, run)
            return set(proxy.cut_commands)

    cut = asyncio.run(test())
    names = scripts()
    cut = {"epoch" if command == "EVAL" else command for command in cut}
    names["epoch"] = "epoch"
    missed = set(names.values()) - {names.get(command, "") for command in cut} - {"submit"}
    assert not missed, f"the {where} of these scripts was never cut: {missed}"
    assert "SCRIPT LOAD" in cut
