"""What a producer's SDK reads of webhooks, with the rights of docs/deployment.md and no others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import redis

from samphire import AsyncClient, BrokerRightError, Client, InvalidInputError, WebhookEndpoint
from tests.stacks import Valkey
from tests.support.lane import broken, fake_triton, in_a_loop, until, x
from tests.support.names import KEYS
from tests.support.receiver import ok, receiver, status
from tests.support.webhooks import Hooks
from tests.test_rights import PASSWORD, user_of
from tests.test_rights_of_parts import url_for


@pytest.fixture
def hooks(valkey: Valkey, tmp_path: Path) -> Hooks:
    return Hooks(valkey, tmp_path)


@in_a_loop
async def test_the_endpoints_that_a_tenant_can_name(hooks: Hooks) -> None:
    """Its own and those of all, and whether it can name a URL; nothing that is set of them."""
    async with receiver() as to:
        hooks.add("orders", to)
        hooks.add("theirs", to, tenant="acme")
        with hooks.registry() as registry:
            registry.disable("theirs")
            registry.rotate_default("acme")
        url = url_for(hooks.valkey, "producer")
        async with AsyncClient(url) as client, AsyncClient(url, tenant="acme") as acme:
            orders = WebhookEndpoint("orders", disabled=False)
            assert await client.webhooks.endpoints() == [orders]
            assert await acme.webhooks.endpoints() == [orders, WebhookEndpoint("theirs", disabled=True)]
            assert not await client.webhooks.has_default_secret() and await acme.webhooks.has_default_secret()


@in_a_loop
async def test_what_became_of_a_delivery(hooks: Hooks) -> None:
    """From nothing to its last attempt; each run of a task has its own, and the last is told of."""
    async with receiver(status(503)) as to, fake_triton("one") as triton:
        triton.behave["one"] = broken
        hooks.add("orders", to, schedule_s=(0, 3600))
        url = url_for(hooks.valkey, "producer")
        async with AsyncClient(url) as client:
            async with hooks.worker(triton, max_attempts=1):
                await until(lambda: hooks.valkey.client.hexists(KEYS.catalogue, "one"), "the catalogue")
                later = await client.submit("one", x(), webhook="orders", delay_s=3600)
                assert await client.webhooks.delivery(later.id, "orders") is None
                task = await client.submit("one", x(), webhook="orders")
                await until(lambda: hooks.valkey.client.zscore(KEYS.scheduled, to.got[0].id) if to.got else None, "it")
                found = await client.webhooks.delivery(task.id, "orders")
                assert found is not None
                assert (found.id, found.event, found.run, found.state) == (to.got[0].id, "task.failed", 1, "waiting")
                (attempt,) = found.attempts
                assert attempt.status == 503 and "503" in attempt.error and attempt.answer == "no"
                assert found.next_at is not None and 3500 < (found.next_at - attempt.at).total_seconds() < 3600 * 1.3
                del triton.behave["one"]
                to.respond = ok
                await client.dead_letters.redrive([task.id])
                await until(lambda: len(to.got) == 2, "the webhook of its second run")
                await until(lambda: hooks.valkey.client.exists(KEYS.delivery(to.got[1].id)), "its end")
            found = await client.webhooks.delivery(task.id, "orders")
            assert found is not None
            assert (found.id, found.event, found.run, found.state) == (to.got[1].id, "task.succeeded", 2, "delivered")
            assert [attempt.status for attempt in found.attempts] == [200] and found.next_at is None
            assert await client.webhooks.delivery(task.id, "nobody") is None
            for key in (KEYS.ended, KEYS.ended_before):  # after long: then it looks for the runs
                hooks.valkey.client.delete(key)
            assert await client.webhooks.delivery(task.id, "orders") == found
            for bad in ("", "a b", "\ud800"):
                with pytest.raises(InvalidInputError, match="task"):
                    await client.webhooks.delivery(bad, "orders")
        with Client(url) as blocking:
            assert await asyncio.to_thread(blocking.webhooks.delivery, task.id, "orders") == found


@in_a_loop
async def test_a_url_is_found_by_the_tenant_that_named_it(hooks: Hooks) -> None:
    """And what is no URL that webhooks are sent to is an error."""
    async with receiver() as to, fake_triton("one") as triton:
        hooks.ports.add(to.port)
        with hooks.registry() as registry:
            registry.rotate_default("acme")
        async with hooks.worker(triton), AsyncClient(hooks.valkey.url, tenant="acme") as client:
            await until(lambda: hooks.valkey.client.hexists(KEYS.webhook_names, "*"), "the policy")
            task = await client.submit("one", x(), webhook=to.url)
            await until(lambda: to.got, "the webhook")
            await until(lambda: hooks.valkey.client.exists(KEYS.delivery(to.got[0].id)), "its end")
            found = await client.webhooks.delivery(task.id, to.url)
            assert found is not None and found.state == "delivered"
            async with AsyncClient(hooks.valkey.url) as other:
                assert await other.webhooks.delivery(task.id, to.url) is None
            with pytest.raises(InvalidInputError, match="port"):
                await client.webhooks.delivery(task.id, "http://127.0.0.1:1/")


@in_a_loop
async def test_who_may_not_read_is_told_so(hooks: Hooks) -> None:
    """The right is named; and the documented producer can list no delivery."""
    url = user_of(hooks.valkey, "few", "on", f">{PASSWORD}", "~samphire:sub:*", "+@all")
    async with AsyncClient(url) as client:
        with pytest.raises(BrokerRightError):
            await client.webhooks.endpoints()
        with pytest.raises(BrokerRightError):
            await client.webhooks.delivery("a", "orders")
    with redis.Redis.from_url(url_for(hooks.valkey, "producer")) as producer:
        for command in (
            ("ZRANGE", KEYS.waiting_deliveries("orders"), 0, -1),
            ("ZRANGE", KEYS.ended_deliveries("orders"), 0, -1),
            ("HGETALL", KEYS.webhook_config),
            ("SCAN", 0),
            ("RANDOMKEY",),
            ("KEYS", "*"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                producer.execute_command(*command)
