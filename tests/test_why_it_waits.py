"""`task.status(detail=True)`: each reason why a task is not done, as it really comes about."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
import redis

from samphire import AsyncClient, AsyncTask, EndpointUnavailableError, Step, TaskDetail, UnknownModelError
from samphire.client.messages import mentions, message_id, sent_at_of
from samphire.client.place import QueueSearch, before
from samphire.transport.address import broker_of
from samphire.transport.direct import DirectConnection
from samphire.wire import keys
from samphire.wire.contract import INFER_TASK, InferRequest, InputTensor
from samphire.wire.envelope import encode_task, new_task_id
from samphire_broker.settings import Settings
from samphire_broker.store import Store, WorkerInfo
from samphire_workers.queues.round_robin import RoundRobin
from tests.stacks import Valkey
from tests.support.lane import body, broken, fake_triton, in_a_loop, lane_worker, state, until, until_set, x
from tests.support.names import KEYS
from tests.support.plain import plain_celery

TIMEOUT_S = 30


async def beat(store: Store, url: str) -> None:
    """Take a lease."""
    connection = DirectConnection(broker_of(url).address)
    await store.beat(WorkerInfo(store.worker_id, "w@host", 1), connection)
    await connection.close()


async def why(task: AsyncTask, text: str) -> TaskDetail:
    """What is told of a task, once it has this in it."""
    give_up = time.monotonic() + TIMEOUT_S
    while text not in (found := await task.status(detail=True)).why:
        assert time.monotonic() < give_up, f"expected {text!r}, told {found}"
        await asyncio.sleep(0.02)
    return found


@in_a_loop
async def test_no_worker_and_the_place_by_priorities(valkey: Valkey) -> None:
    """Tasks of the same priority in their order; those of another by its weight."""
    async with AsyncClient(valkey.url) as client:
        normal = [await client.submit("one", x()) for _ in range(30)]
        high = [await client.submit("one", x(), priority="high") for _ in range(20)]
        await client.submit("one", x(), priority="low")
        await client.submit("two", x())
        found = [await task.status(detail=True) for task in (normal[0], normal[4], normal[29], high[0], high[19])]
    assert {(detail.status, detail.queue) for detail in found} == {("queued", "inference.one")}
    assert all(detail.why.startswith("no worker runs; ") and "of the 51 tasks" in detail.why for detail in found)
    # Of a round of 15 the high ones get 8, the normal 4, the low 2: what one leaves the first of the others takes.
    assert [detail.ahead for detail in found] == [8, 23, 50, 0, 27]


@in_a_loop
async def test_what_the_model_lacks(valkey: Valkey) -> None:
    """A model that is there and not ready, one that nobody has, and no endpoint that answers."""
    async with fake_triton("one") as triton, AsyncClient(valkey.url, validate=False) as client:
        async with lane_worker(valkey.url, triton):
            first = await client.submit("one", x())
            await first.result(TIMEOUT_S)
            assert await first.status(detail=True) == TaskDetail("succeeded")
            triton.is_up = False
            task = await client.submit("one", x())
            found = await why(task, "no endpoint answers: " + triton.address)
            assert (found.status, found.queue, found.ahead) == ("queued", "inference.one", 0)
        field = {"one": "", "!one": "version 1: no such file", "*": "1"}
        valkey.client.hset(KEYS.catalogue, mapping=field)
        valkey.client.hdel(KEYS.catalogue, *[f for f in valkey.client.hkeys(KEYS.catalogue) if b"@" in f])
        worker = "w" * 32
        valkey.client.sadd(KEYS.workers, worker)
        valkey.client.set(KEYS.worker_prefix + worker, 1)
        assert (await task.status(detail=True)).why.startswith("model one is not loaded: version 1: no such file; ")
        other = await client.submit("other", x())
        assert (await other.status(detail=True)).why.startswith("no endpoint of the workers has the model other; ")


@in_a_loop
async def test_scheduled_running_held_and_tried(valkey: Valkey) -> None:
    """Wherever a worker has brought it, the next moment is told."""
    go_on = asyncio.Event()

    async with fake_triton("one", "bad") as triton, AsyncClient(valkey.url) as client:
        triton.behave |= {"one": until_set(go_on), "bad": broken}
        async with lane_worker(valkey.url, triton, backoff_base_s=60, backoff_cap_s=60, backoff_jitter=0):
            later = await client.submit("one", x(), delay_s=3600)
            found = await why(later, "scheduled for 20")
            assert found.status == "scheduled" and abs((found.next_at or 0) - time.time() - 3600) < 60
            bad = await client.submit("bad", x())
            found = await why(bad, "tried once, next at 20")
            assert found.why.endswith(": ModelFaultError: the model raised")
            assert (found.status, found.attempts) == ("retrying", 1) and (found.next_at or 0) > time.time() + 30
            running = await client.submit("one", x())
            found = await why(running, "held by worker w@host, running for ")
            assert (found.status, found.worker) == ("running", "w@host") and 0 <= (found.running_s or 0) < TIMEOUT_S
            behind = [await client.submit("one", x()) for _ in range(3 * 4)]  # four calls may be under way
            told = [await task.status(detail=True) for task in behind]
            assert {detail.status for detail in told} <= {"queued", "running"} and all(detail.why for detail in told)
            go_on.set()
            for task in (running, *behind):
                await task.result(TIMEOUT_S)
                assert (await task.status(detail=True)).why == ""


@in_a_loop
async def test_claimed_and_not_started(valkey: Valkey) -> None:
    """What only a worker knows is told to who may look into what workers hold, and to others that it is not known."""
    async with AsyncClient(valkey.url) as client:
        task = await client.submit("one", x())
        (message,) = valkey.client.lrange("inference.one\x06\x163", 0, -1)
        valkey.client.delete("inference.one\x06\x163")
        store = Store(Settings(broker_url=valkey.url), "w" * 32)
        await beat(store, valkey.url)
        valkey.client.hset(f"{KEYS.worker_prefix}{'w' * 32}:inflight", "1:inference.one\x06\x163", message)
        found = await task.status(detail=True)
        assert (found.why, found.worker, found.is_known) == ("held by worker w@host, not started yet", "w@host", True)
        await store.close()
        valkey.client.acl_setuser(
            "producer", enabled=True, nopass=True, categories=["+@all", "-@dangerous"], keys=PRODUCER
        )
        url = valkey.url.replace("//", "//producer:x@")
        async with AsyncClient(url, validate=False) as other:
            found = await other.task(task.id).status(detail=True)
            assert found.status == "queued" and found.is_known is None and "place is not known" in found.why
            found = await other.task("nobody").status(detail=True)
            assert found.is_known is None
            queued = await other.submit("one", x())
            found = await queued.status(detail=True)
            assert found.ahead == 0 and found.queue == "inference.one"


PRODUCER = [
    *("inference*", "samphire:sub:*", "%R~celery-task-meta-*", "%R~samphire:scheduled", "%R~samphire:ended*"),
    *("%R~samphire:catalogue", "%R~samphire:schema", "%R~samphire:epoch"),
]


@in_a_loop
async def test_a_chain_and_what_nobody_knows(valkey: Valkey) -> None:
    """The last step of a chain waits for those before it; an id that is nowhere is known to nobody."""
    go_on = asyncio.Event()

    async with fake_triton("one", "two") as triton, AsyncClient(valkey.url) as client:
        triton.behave["one"] = until_set(go_on)
        first = Step("one", x())
        chain = await client.chain(first, Step("two", {"x": first["y"]}))
        found = await chain.status(detail=True)
        assert found.queue == "inference" and found.ahead == 0
        nobody = client.task(str(uuid.uuid4()))
        found = await nobody.status(detail=True)
        assert found.is_known is False and found.why.startswith("nobody knows it") and found.status == "queued"
        async with lane_worker(valkey.url, triton):
            await until(lambda: triton.asked, "the first step")
            found = await chain.status(detail=True)
            assert found.is_known is not False and found.status == "queued", found
            go_on.set()
            await chain.result(TIMEOUT_S)


def pushed(client: redis.Redis, queue: str, step: int, times: Sequence[float]) -> list[str]:
    """Messages of a queue's list, submitted at these times."""
    ids = []
    request = InferRequest("one", [InputTensor("x", "FP32", [1, 1], raw="AACAPw==")])
    with client.pipeline(transaction=False) as pipe:
        for at in times:
            ids.append(new_task_id(at))
            message = encode_task(INFER_TASK, ids[-1], request, queue, step, sent_at=int(at * 1000) / 1000)
            pipe.lpush(keys.queue_list(queue, step), message)
        pipe.sadd(KEYS.queues, queue)
        pipe.execute()
    return ids


@in_a_loop
async def test_a_place_among_many(valkey: Valkey) -> None:
    """Found with few commands, in bursts and pauses, with clients whose clocks differ, in every list."""
    chance = random.Random(7)
    at, times = 1_790_000_000.0, []
    for _ in range(20_000):
        at += chance.choice(
            [0.0, 0.0, 0.0, 0.001, 0.002, chance.expovariate(1 / 5) if chance.random() < 0.001 else 0.0]
        )
        times.append(at + chance.choice([0.0, 0.003]))
    ids = pushed(valkey.client, "inference.one", 3, times)
    others = pushed(valkey.client, "inference.one@acme", 6, [times[0] + n / 10 for n in range(1000)])
    connection = DirectConnection(broker_of(valkey.url).address)
    before_it = valkey.client.info("commandstats")
    sample = [0, 1, 49, 19_998, 19_999, *chance.sample(range(20_000), 60)]
    for n in sample:
        found = await QueueSearch(connection, KEYS, ids[n]).find()
        assert found.place is not None and found.place == ("inference.one", n, 20_000), (n, found)
    for n in (0, 500, 999):
        found = await QueueSearch(connection, KEYS, others[n]).find()
        assert found.place == ("inference.one@acme", n, 1000)
    after_it = valkey.client.info("commandstats")
    used = {name: after_it[name]["calls"] - before_it.get(name, {"calls": 0})["calls"] for name in after_it}
    assert used["cmdstat_lindex"] < 40 * len(sample) and used["cmdstat_lrange"] < 20 * len(sample)
    for unknown in (str(uuid.uuid4()), new_task_id(times[10_000]), new_task_id(1.0), new_task_id(4e9)):
        found = await QueueSearch(connection, KEYS, unknown).find()
        assert found.place is None and not found.is_certain
    await connection.close()


@in_a_loop
async def test_what_else_lies_in_the_queues(valkey: Valkey) -> None:
    """Keys of other types and what is no message are passed over, few messages or many."""
    for many in (0, 5000):
        at = time.time()
        valkey.client.set("inference.odd", "no list")
        valkey.client.hset("inference.one\x06\x166", "no", "list")
        garbage = [b"", b"\xff\x00", b"{}", b'{"headers": {"id": 7}}', b'{"headers":{"id":"other"}}', b"x" * 100_000]
        valkey.client.lpush("inference.one\x06\x163", *garbage)
        first, *_ = pushed(valkey.client, "inference.one", 3, [at + n / 1000 for n in range(many + 1)])
        valkey.client.lpush("inference.one\x06\x163", *garbage)
        valkey.client.sadd(KEYS.queues, "inference.odd", "no queue of ours")
        async with AsyncClient(valkey.url, validate=False) as client:
            found = await client.task(first).status(detail=True)
            assert (found.queue, found.ahead) == ("inference.one", len(garbage)), found
            unknown = await client.task("nobody").status(detail=True)
            assert unknown.is_known is (None if many else False)
        valkey.client.delete("inference.one\x06\x163")


@in_a_loop
async def test_beside_plain_producers(valkey: Valkey) -> None:
    """Their messages tell no time; of their tasks no place is told where many are queued."""
    at = time.time()
    ids = []
    for n in range(200):
        plain = [b'{"headers": {"id": "plain-%d"}}' % m for m in range(1 + n % 25)]
        valkey.client.lpush("inference.one\x06\x163", *plain)
        ids += pushed(valkey.client, "inference.one", 3, [at + n + m / 100 for m in range(n % 40)])
    messages = valkey.client.lrange("inference.one\x06\x163", 0, -1)[::-1]
    assert len(messages) > 5000
    connection = DirectConnection(broker_of(valkey.url).address)
    for n, message in list(enumerate(messages))[::97]:
        found = await QueueSearch(connection, KEYS, message_id(message)).find()
        if message_id(message) in ids:
            assert found.place == ("inference.one", n, len(messages))
        else:
            assert found.place is None and not found.is_certain
    await connection.close()


@in_a_loop
async def test_queues_that_nobody_has_named(valkey: Valkey) -> None:
    """A plain producer pushes where no worker is: it is looked for before anybody says that it is unknown."""
    with plain_celery(valkey.url) as app:
        app.send_task("samphire.infer", kwargs=body("one"), queue="inference.one", task_id="plain-1", priority=6)
        app.send_task("samphire.infer", kwargs=body("one"), queue="inference", task_id="tâche-1")
    async with AsyncClient(valkey.url) as client:
        for task_id, queue in (("plain-1", "inference.one"), ("tâche-1", "inference")):
            found = await client.task(task_id).status(detail=True)
            assert (found.queue, found.ahead, found.is_known) == (queue, 0, True)
        valkey.client.lpush("samphire.webhooks.shop", b'{"headers": {"id": "msg_1"}}')
        valkey.client.sadd(KEYS.queues, "samphire.webhooks.shop")
        assert (await client.task("msg_1").status(detail=True)).queue == "samphire.webhooks.shop"


@in_a_loop
async def test_claims_while_it_is_looked_for(valkey: Valkey) -> None:
    """Whatever is claimed between two pages, what stays in the queue is found."""
    ids = pushed(valkey.client, "inference.one", 3, [time.time()] * 3000)

    class Claiming(DirectConnection):
        async def ask_all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
            replies = await super().ask_all(commands)
            if commands[0][0] == "LRANGE":
                valkey.client.rpop("inference.one\x06\x163", 40)
            return replies

    connection = Claiming(broker_of(valkey.url).address)
    for task_id in (ids[2900], ids[2990]):
        found = await QueueSearch(connection, KEYS, task_id).find()
        left = valkey.client.llen("inference.one\x06\x163")
        assert found.place is not None and left - 100 <= found.place.ahead <= left + 80
    gone = await QueueSearch(connection, KEYS, ids[0]).find()
    assert gone.place is None
    await connection.close()


@in_a_loop
async def test_no_more_is_read_than_a_bound(valkey: Valkey) -> None:
    """Large messages, and many queues; then it is not said that nobody knows the task."""
    large = b'{"body": "' + b"x" * 2**20 + b'", "headers": {"id": "large"}}'
    for _ in range(64):
        valkey.client.lpush("inference.one", large)
    for n in range(60):
        ids = pushed(valkey.client, f"inference.m{n}", 3, [time.time() + m / 1000 for m in range(500)])
    connection = DirectConnection(broker_of(valkey.url).address)
    for unknown in ("nobody", new_task_id(time.time() + 0.2)):
        valkey.client.config_resetstat()
        found = await QueueSearch(connection, KEYS, unknown).find()
        assert found.place is None and not found.is_certain
        assert valkey.client.info("stats")["total_net_output_bytes"] < 40 * 2**20
    found = await QueueSearch(connection, KEYS, ids[250]).find()
    assert found.place is not None and found.place.queue == "inference.m59"
    await connection.close()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b'{"body": "[[], {}, {\\"chain\\": [{\\"task_id\\": \\"one\\"}]}]", "headers": {"id": "two"}}', True),
        (b'{"body": "[[], {}, {}]", "headers": {"id": "two", "root_id": "one", "parent_id": "one"}}', False),
        (b'{"body": "samphire:sub:blob:one:0 one", "headers": {"id": "two"}}', False),
        (b'{"body": "eyJpZCI6ICJvbmUifQ==", "headers": {"id": "two"}}', True),  # {"id": "one"}
        (b'{"body": "eyJpZCI6ICJ0d28ifQ==", "headers": {"id": "two"}}', False),
        (b'{"body": "eJwLAAA=", "headers": {"id": "two", "compression": "application/x-gzip"}}', None),
    ],
)
def test_which_messages_name_a_task(message: bytes, expected: bool | None) -> None:
    """As one of those that follow them; not as one of those before, nor as a part of a word."""
    assert mentions(message, "one") is expected


@pytest.mark.parametrize("text", ["1.2.3", "1e5", "", "-1", "999999999999999"])
def test_times_that_are_none(text: str) -> None:
    """They are no time, and no error."""
    assert sent_at_of(f'{{"headers": {{"samphire_sent_at": {text}, "id": "one"}}}}'.encode()) is None


@in_a_loop
async def test_the_order_that_is_told_is_that_of_the_claims(valkey: Valkey) -> None:
    """Real claims of real lists: nobody is further from what was told than a claim is large."""
    now = time.time()
    lengths = (300, 200, 500, 40)
    ids = [pushed(valkey.client, "inference.one", step, [now + n / 1000 for n in range(length)])
           for step, length in zip(keys.PRIORITY_STEPS, lengths, strict=True)]  # fmt: skip
    store = Store(Settings(broker_url=valkey.url), "w" * 32)
    await beat(store, valkey.url)
    round_robin = RoundRobin({})
    round_robin.add(["inference.one"])
    order: list[str] = []
    while True:
        plan = round_robin.plan(30, set(), set())
        claimed = await store.claim(plan.turns, [30] * len(plan.models), 30, 10**9)
        if not claimed:
            break
        order += [message_id(claim.message) for claim in claimed]
    await store.close()
    assert len(order) == sum(lengths)
    place = {task_id: n for n, task_id in enumerate(order)}
    for step, own in enumerate(ids):
        for position in range(0, len(own), 7):
            assert abs(before(lengths, step, position) - place[own[position]]) <= 30, (step, position)


@in_a_loop
async def test_a_model_that_never_loads_fails_its_tasks_where_that_is_wished(valkey: Valkey) -> None:
    """With a dead letter that says why; a model that was served before is waited for."""
    async with fake_triton("one", "late") as triton, AsyncClient(valkey.url, validate=False) as client:

        async def not_ready(request: Any, context: Any) -> Any:
            if request.name == "late":
                await broken_away(context)
            return await ready(request, context)

        ready, triton.ModelMetadata = triton.ModelMetadata, not_ready  # type: ignore[method-assign]
        await triton.stop()
        await triton.start()
        async with lane_worker(valkey.url, triton, unserved_timeout_s=0.5) as worker:
            await (await client.submit("one", x())).result(TIMEOUT_S)
            task = await client.submit("late", x())
            with pytest.raises(EndpointUnavailableError, match=r"model 'late' was not loaded within 0.5 s"):
                await task.result(TIMEOUT_S)
            letter = await client.dead_letters.get(task.id)
            assert "SAMPHIRE_UNSERVED_TIMEOUT_S" in letter.error and letter.attempts == 0
            with plain_celery(valkey.url) as app:  # what comes later fails too
                app.send_task("samphire.infer", kwargs=body("late"), queue="inference.late", task_id="plain")
                await until(lambda: state(valkey.client, "plain") == "FAILURE", "its end")
            with pytest.raises(UnknownModelError):  # that was no wait of a model that is deployed later
                await (await client.submit("later", x())).result(TIMEOUT_S)
            assert worker.lane._served.given_up() == {"late"}
            triton.is_up = False
            await until(lambda: not worker.endpoints.some_ready.is_set(), "an outage")
            assert not worker.lane._served.given_up(), "the time begins anew"
            waiting = await client.submit("one", x())
            await asyncio.sleep(1.0)
            assert await waiting.status() == "queued"
            triton.is_up = True
            await waiting.result(TIMEOUT_S)


async def broken_away(context: Any) -> None:
    """What Triton answers of a model that is not ready."""
    await context.abort(14, "Request for unknown model: 'late' has no available versions")
