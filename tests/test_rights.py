"""Users of the broker that lack a right: nothing is lost, and what is missing is named. Real ACLs, real Valkey."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from samphire import BrokerRightError
from samphire.transport.address import broker_of
from samphire.transport.publisher import Publisher
from samphire_broker.store import Claimed, Later, Letter, Settlement
from samphire_workers.upkeep.rights import check_rights
from tests.stacks import Valkey
from tests.support.names import KEYS
from tests.test_store import ATTEMPT, META, QUEUE, Worker, everywhere, push, run, status
from tests.test_store_orders import end

PASSWORD = "secret"


FAILURE = (
    '{"status":"FAILURE","task_id":"%s","result":{"exc_type":"ModelFaultError","exc_message":"x","exc_module":""}}'
)


EVERYTHING = ("on", f">{PASSWORD}", "~*", "&*", "+@all")


def user_of(valkey: Valkey, name: str, *rules: str) -> str:
    """Make a user, and return the URL for it."""
    valkey.client.execute_command("ACL", "SETUSER", name, "reset", *rules)
    return valkey.url.replace("redis://", f"redis://{name}:{PASSWORD}@")


def letter(task_id: str) -> Letter:
    return Letter(task_id, "m", "r", "e", 1, ATTEMPT)


async def settle_all(w: Worker, claims: dict[str, Claimed]) -> object:
    ends = [
        end(claims["a"], "a", "succeeded", pushes=((QUEUE, "next"),)),
        end(claims["b"], "b", "failed", letter=letter("b")),
        end(claims["c"], "c", "retrying", retry=Later(60, ATTEMPT)),
        end(claims["d"], "d", "cancelled"),
    ]
    return await w.store.settle(ends)


async def schedule_all(w: Worker, claims: dict[str, Claimed]) -> object:
    return await w.store.schedule([(claim.field, task_id, 4e9) for task_id, claim in claims.items()])


async def release_all(w: Worker, claims: dict[str, Claimed]) -> object:
    return await w.store.release([claim.field for claim in claims.values()], attempt=ATTEMPT, endpoint_died=True)


async def route_all(w: Worker, claims: dict[str, Claimed]) -> object:
    return await w.store.route([(claim.field, QUEUE, QUEUE) for claim in claims.values()])


async def start_all(w: Worker, claims: dict[str, Claimed]) -> object:
    return await w.start(list(claims.values()))


async def claim_more(w: Worker, _claims: dict[str, Claimed]) -> object:
    return await w.claim()


async def reap_other(w: Worker, _claims: dict[str, Claimed]) -> object:
    return await w.store.reap("w2", None, ATTEMPT)


async def return_due(w: Worker, _claims: dict[str, Claimed]) -> object:
    return await w.store.return_due()


async def cancel_some(w: Worker, _claims: dict[str, Claimed]) -> object:
    return await w.store.cancel(META, ["later"])


async def serve_letters(w: Worker, _claims: dict[str, Claimed]) -> object:
    return await w.store.serve_letters()


async def lead_some(w: Worker, _claims: dict[str, Claimed]) -> object:
    return await w.store.lead("m", give_back=False)


CALLS: dict[Callable[[Worker, dict[str, Claimed]], Awaitable[object]], str] = {
    settle_all: "del hset hdel setex set publish lpush zadd zrem sadd srem hincrby expire xadd unlink rename",
    schedule_all: "hset hdel zadd hlen",
    release_all: "rpush hdel hset hincrby sadd expire del hget get",
    route_all: "lpush hdel sadd publish hget",
    start_all: "mset hset hdel hmget exists",
    claim_more: "hset hdel ltrim lrange exists",
    reap_other: "rpush hdel del srem sadd hset hincrby expire hkeys",
    return_due: "rpush zrem hdel publish hget",
    cancel_some: "setex zadd set rpush zrem hdel publish ltrim xadd hvals",
    lead_some: "hset hdel hget smembers",
    serve_letters: "del hset hincrby zrem lpush ltrim publish sadd xadd",
}
"""What each of them runs, as one right after the other is taken away."""


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_no_missing_right_loses_a_task(valkey: Valkey, call: Callable[..., Awaitable[object]]) -> None:
    """A call is refused before it writes anything, or does without; with the right given back it goes on."""

    async def test(command: str) -> None:
        valkey.client.flushdb()
        url = user_of(valkey, "limited", *EVERYTHING)
        w, other = Worker(url, "w1"), Worker(valkey.url, "w2")
        await w.beat()
        await other.beat()
        push(valkey, "lost")
        await other.start(await other.claim())
        valkey.client.delete("samphire:worker:w2")
        push(valkey, "later", "dead")
        later, dead = await other_claims(valkey, "w3")
        await later[1].store.schedule([(later[0].field, "later", 4e9)])
        await dead[1].store.settle([end(dead[0], "dead", "failed", letter=letter("dead"))])
        valkey.client.zadd(KEYS.scheduled, {"later": 1})
        valkey.client.rpush(KEYS.letters, "redrive:1 dead")
        valkey.client.rpush(KEYS.cancels, "events:c later")
        push(valkey, "a", "b", "c", "d")
        claims = {claim.message.decode(): claim for claim in await w.claim()}
        push(valkey, "more")
        before = set(everywhere(valkey))
        valkey.client.execute_command("ACL", "SETUSER", "limited", f"-{command}")
        for _ in range(2):  # again and again, as lanes do
            try:
                await call(w, claims)
            except BrokerRightError as error:
                assert command in str(error).lower()
            found = set(everywhere(valkey))
            ended = {task_id for task_id in before if status(valkey, task_id) in ("SUCCESS", "REVOKED", "FAILURE")}
            assert before <= found | ended, f"without {command}: {before - found - ended} lost"
        valkey.client.execute_command("ACL", "SETUSER", "limited", "+@all")
        await call(w, claims)
        found = set(everywhere(valkey))
        ended = {task_id for task_id in before if status(valkey, task_id) in ("SUCCESS", "REVOKED", "FAILURE")}
        assert before <= found | ended
        for worker in (w, other, later[1]):
            await worker.named.close()
            await worker.store.close()

    for command in CALLS[call].split(" "):
        run(lambda command=command: test(command))  # type: ignore[misc]


async def other_claims(valkey: Valkey, name: str) -> list[tuple[Claimed, Worker]]:
    worker = Worker(valkey.url, name)
    await worker.beat()
    return [(claim, worker) for claim in await worker.claim()]


def test_results_are_stored_without_the_right_to_publish_them(valkey: Valkey) -> None:
    """Once a whole batch of claims was deleted before PUBLISH was refused (F2)."""

    async def test() -> None:
        url = user_of(valkey, "quiet", "on", f">{PASSWORD}", "~*", "resetchannels", "&samphire:0:wake", "+@all")
        w = Worker(url, "w1")
        await w.beat()
        push(valkey, *(str(n) for n in range(40)))
        claims = await w.claim()
        await w.start(claims)
        settlements = [end(claim, claim.message.decode(), "succeeded") for claim in claims]
        assert await w.store.settle(settlements) == [1] * 40
        assert {status(valkey, str(n)) for n in range(40)} == {"SUCCESS"}
        assert not valkey.client.exists("samphire:worker:w1:inflight", "samphire:worker:w1:started")
        with pytest.raises(BrokerRightError, match=r"PUBLISH celery-task-meta-id x \(results\)"):
            await check_rights(w.store, lambda: False)
        await w.named.close()
        await w.store.close()

    run(test)


@pytest.mark.parametrize("stream", ["scheduled", "dead", "sub:queues", "events:c d", "events:c"])
def test_a_settlement_appends_to_clients_streams_and_to_no_other_key(valkey: Valkey, stream: str) -> None:
    """Producers name them, and a step of a chain its own (F2)."""

    async def test() -> None:
        w = Worker(valkey.url, "w1")
        await w.beat()
        valkey.client.lpush(QUEUE, "a")
        (claim,) = await w.claim()
        ended = Settlement(claim.field, "a", "succeeded", '{"status":"SUCCESS"}', stream)
        assert await w.store.settle([ended]) == [1]
        assert bool(valkey.client.exists(stream)) == (stream == "samphire:events:c")
        await w.named.close()
        await w.store.close()

    run(test)


@pytest.mark.parametrize("command", ["sadd", "setex", "lpush", "set", "publish", "info"])
def test_a_submit_without_a_right_queues_all_or_nothing(valkey: Valkey, command: str) -> None:
    """With a claim check and an idempotency key; waking lanes and asking for the memory may be done without."""

    async def test() -> None:
        url = user_of(valkey, "producer", *EVERYTHING, f"-{command}")
        publisher = Publisher(broker_of(url), queue_limit=0, blob_ttl_s=60)
        if command in ("publish", "info"):
            await publisher.publish(QUEUE, 0, [b"a"], [("sub:blob:a:0", b"data")])
            assert valkey.client.lrange(QUEUE, 0, -1) == [b"a"]
        else:
            with pytest.raises(BrokerRightError, match=command.upper()):
                await publisher.publish(QUEUE, 0, [b"a"], [("sub:blob:a:0", b"data")])
            assert valkey.client.keys("*") == []
        await publisher.close()

    run(test)


def rules() -> dict[str, str]:
    """The rules of docs/deployment.md, by user."""
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    return {found[1]: found[2] for found in re.finditer(r"^ACL SETUSER (\w+) on >password (.*)$", text, re.MULTILINE)}
