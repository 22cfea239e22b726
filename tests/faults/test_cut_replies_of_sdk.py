"""Every command of the SDK with its reply cut: the broker has carried it out, or has not, and nobody knows."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import redis
from numpy.typing import NDArray

from samphire import (
    AsyncClient,
    AsyncTask,
    BrokerUnavailableError,
    LetterGoneError,
    ModelFaultError,
    ResultDeletedError,
    Step,
)
from samphire.client.dead_letters import AsyncDeadLetters
from samphire.client.models import AsyncModels
from samphire.client.webhooks import AsyncWebhooks, DeliveryAttempt, WebhookDelivery, WebhookEndpoint
from samphire.wire.deliveries import LAST, delivery_id
from tests.faults.ends import Ends, nothing_is_left
from tests.faults.test_cut_replies import (
    again,
    cut_all,
    public_methods,
    server,  # noqa: F401
)
from tests.proxy import Where, cutting_proxy
from tests.stacks import Up, eventually
from tests.support.names import KEYS

TIMEOUT_S = 30


@dataclass
class Sdk:
    """A client behind the proxy, and one that is not; a real worker and Triton serve them."""

    client: AsyncClient
    direct: AsyncClient
    server: redis.Redis
    arm: Callable[[], None]
    expected: dict[str, int]
    """How often each task's end is to be published."""

    def made(self, task: AsyncTask, ends: int = 1) -> AsyncTask:
        """A task that will end."""
        self.expected[task.id] = ends
        return task

    def again(self, task: AsyncTask) -> AsyncTask:
        """The handle of another client's task, on the client that is cut."""
        return self.client.task(task.id)

    async def letter(self) -> str:
        """A new dead letter."""
        task = self.made(await self.direct.submit("picky", {"x": np.array([[-1]], np.float32)}, max_attempts=1))
        with pytest.raises(ModelFaultError):
            await task.result(TIMEOUT_S)
        return task.id

    async def later(self) -> AsyncTask:
        """A task that waits for its time, which does not come."""
        task = self.made(await self.direct.submit("identity", fp32(1), delay_s=600))
        while await task.status() != "scheduled":
            await asyncio.sleep(0.01)
        return task


def fp32(*values: float) -> dict[str, NDArray[Any]]:
    return {"input_fp32": np.array([values], np.float32)}


def first_value(result: Any) -> float:
    return float(result.outputs["output_fp32"].flat[0])


async def sdk_submit(s: Sdk) -> None:
    s.arm()
    task = s.made(await s.client.submit("identity", fp32(7)))
    assert first_value(await task.result(TIMEOUT_S)) == 7


async def sdk_submit_with_key(s: Sdk) -> None:
    s.arm()
    key = f"key-{time.monotonic_ns()}"
    task = s.made(await s.client.submit("identity", fp32(7), idempotency_key=key))
    assert (await s.client.submit("identity", fp32(7), idempotency_key=key)).id == task.id
    assert first_value(await task.result(TIMEOUT_S)) == 7


async def sdk_submit_with_claim_checks(s: Sdk) -> None:
    big = np.arange(50_000, dtype=np.float32).reshape(1, -1)
    s.arm()
    task = s.made(await s.client.submit("identity", {"input_fp32": big}))
    assert np.array_equal((await task.result(TIMEOUT_S)).outputs["output_fp32"], big)


async def sdk_chain(s: Sdk) -> None:
    first = Step("identity", fp32(7))
    s.arm()
    task = await s.client.chain(first, Step("identity", {"input_fp32": first["output_fp32"]}))
    assert first_value(await task.result(TIMEOUT_S)) == 7
    s.made(task)
    s.expected["a step before"] = 1


async def sdk_map(s: Sdk) -> None:
    s.arm()
    results = [result async for result in s.client.map("identity", [fp32(n) for n in range(5)])]
    assert [first_value(result) for result in results] == [0, 1, 2, 3, 4]
    s.expected |= {result.task_id: 1 for result in results}


async def sdk_result(s: Sdk) -> None:
    task = s.made(await s.direct.submit("identity", fp32(7)))
    s.arm()
    assert first_value(await s.again(task).result(TIMEOUT_S)) == 7


async def sdk_result_deleted(s: Sdk) -> None:
    task = s.made(await s.direct.submit("identity", fp32(7)))
    s.arm()
    assert first_value(await s.again(task).result(TIMEOUT_S, delete=True)) == 7
    with pytest.raises(ResultDeletedError):
        while True:
            await task.result(TIMEOUT_S)
            await asyncio.sleep(0.02)


async def sdk_cancel(s: Sdk) -> None:
    task = await s.later()
    s.arm()
    assert await again(s.again(task).cancel) is True
    assert await task.status() == "cancelled"


async def sdk_status(s: Sdk) -> None:
    task = await s.later()
    s.arm()
    assert await again(s.again(task).status) == "scheduled"
    await task.cancel()


async def sdk_events(s: Sdk) -> None:
    task = s.made(await s.direct.submit("identity", fp32(7)))
    await task.result(TIMEOUT_S)
    s.arm()

    async def events() -> list[str]:
        return [event.status async for event in s.again(task).events()]

    assert await again(events) in (["succeeded", "succeeded"], ["succeeded"])  # a snapshot, and the end


async def sdk_stream(s: Sdk) -> None:
    """What a reader has got until its connection is cut is not given out again."""
    text = "one two three"
    inputs = {"text": np.array([text.encode()], object), "delay_ms": np.array([20], np.int32)}
    task = s.made(await s.direct.submit("token_stream", inputs))
    s.arm()
    pieces: list[bytes] = []
    position: str | None = None

    async def stream() -> None:
        nonlocal position
        async for event in s.again(task).stream(position):
            position = event.position
            pieces.append(event.outputs["token"][0])

    await again(stream)
    assert b"".join(pieces).decode() == text


async def sdk_progress(s: Sdk) -> None:
    task = s.made(await s.direct.submit("identity", fp32(7)))
    await task.result(TIMEOUT_S)
    s.arm()
    assert await again(lambda: s.again(task).progress()) is None


async def sdk_task(s: Sdk) -> None:
    s.arm()
    assert await again(s.client.task("nobody").status) == "queued"


async def sdk_signature(s: Sdk) -> None:
    s.arm()
    found = await again(lambda: s.client.signature("identity"))
    assert found is not None and found.versions == ("1",)


async def sdk_prepare(s: Sdk) -> None:
    """And submit, twice: it is queued once, since it says so."""
    s.arm()
    prepared = await again(lambda: s.client.prepare("identity", fp32(7), deadline_s=600))
    s.made(s.direct.task(prepared.id))
    for _ in range(2):
        task = await again(lambda: s.client.submit_prepared(prepared, once_s=60))
        assert task.id == prepared.id
    assert first_value(await task.result(TIMEOUT_S)) == 7


async def sdk_models(s: Sdk) -> None:
    s.arm()
    listed = await again(s.client.models.list)
    assert await again(lambda: s.client.models.get("identity")) in listed


async def sdk_list(s: Sdk) -> None:
    letter = await s.letter()
    s.arm()
    assert letter in [found.id for found in await again(lambda: s.client.dead_letters.list(limit=5))]


async def sdk_get(s: Sdk) -> None:
    letter = await s.letter()
    s.arm()
    found = await again(lambda: s.client.dead_letters.get(letter))
    assert found.message is not None and json.loads(found.message)["headers"]["id"] == letter


async def sdk_redrive(s: Sdk) -> None:
    letter = await s.letter()
    died_at = (await s.direct.dead_letters.get(letter)).died_at
    s.arm()
    try:
        assert await s.client.dead_letters.redrive([letter]) == 1
    except BrokerUnavailableError as error:
        assert error.retryable  # the request may stand: who asks again looks first
        while s.server.exists(KEYS.letters):
            await asyncio.sleep(0.02)
        found = [seen for seen in await s.direct.dead_letters.list() if seen.id == letter]
        if found and found[0].died_at == died_at:
            assert await again(lambda: s.client.dead_letters.redrive([letter])) == 1
    s.expected[letter] = 2  # one end a run


async def sdk_purge(s: Sdk) -> None:
    letter = await s.letter()
    s.arm()
    try:
        assert await s.client.dead_letters.purge([letter]) == 1
    except BrokerUnavailableError as error:
        assert error.retryable
        with pytest.raises(LetterGoneError):
            while True:
                await again(lambda: s.client.dead_letters.purge([letter]))
    assert letter not in [found.id for found in await s.direct.dead_letters.list()]


async def sdk_endpoints(s: Sdk) -> None:
    s.server.hset(KEYS.webhook_names, "orders", "{}")
    s.arm()
    assert await again(s.client.webhooks.endpoints) == [WebhookEndpoint("orders", disabled=False)]


async def sdk_has_default_secret(s: Sdk) -> None:
    s.server.hset(KEYS.webhook_names, "@", '{"has_secret":true}')
    s.arm()
    assert await again(s.client.webhooks.has_default_secret) is True


async def sdk_delivery(s: Sdk) -> None:
    """Of one that waits, and of one that has ended."""
    expected = []
    for number, event in enumerate(("task.succeeded", "task.failed")):
        own = delivery_id(f"order-{number}", event, LAST, "orders", "")
        attempt = DeliveryAttempt(datetime(2026, 11, 28, tzinfo=UTC), "answered 500", 500)
        expected.append(WebhookDelivery(own, event, 1, "failed" if number else "waiting", (attempt,)))
        text = '{"at":"2026-11-28T00:00:00Z","error":"answered 500","status":500}'
        if number:
            s.server.hset(KEYS.delivery(own), mapping={"state": "failed", "attempts": f"[{text}]"})
        else:
            s.server.zadd(KEYS.waiting_deliveries("orders"), {own: 1})
            s.server.hset(KEYS.task_prefix + own, "history", text)
    s.arm()
    found = [await again(lambda n=n: s.client.webhooks.delivery(f"order-{n}", "orders")) for n in range(2)]
    assert found == expected


SDK_CASES: dict[str, tuple[Callable[[Sdk], Awaitable[None]], ...]] = {
    "AsyncClient.submit": (sdk_submit, sdk_submit_with_key, sdk_submit_with_claim_checks),
    "AsyncClient.chain": (sdk_chain,),
    "AsyncClient.map": (sdk_map,),
    "AsyncClient.signature": (sdk_signature,),
    "AsyncClient.task": (sdk_task,),
    "AsyncClient.prepare": (sdk_prepare,),
    "AsyncClient.submit_prepared": (),
    "AsyncClient.models": (),
    "AsyncModels.list": (sdk_models,),
    "AsyncModels.get": (),
    "AsyncClient.dead_letters": (),
    "AsyncClient.webhooks": (),
    "AsyncTask.result": (sdk_result, sdk_result_deleted),
    "AsyncTask.cancel": (sdk_cancel,),
    "AsyncTask.status": (sdk_status,),
    "AsyncTask.events": (sdk_events,),
    "AsyncTask.progress": (sdk_progress,),
    "AsyncTask.stream": (sdk_stream,),
    "AsyncDeadLetters.list": (sdk_list,),
    "AsyncDeadLetters.get": (sdk_get,),
    "AsyncDeadLetters.redrive": (sdk_redrive,),
    "AsyncDeadLetters.purge": (sdk_purge,),
    "AsyncWebhooks.endpoints": (sdk_endpoints,),
    "AsyncWebhooks.has_default_secret": (sdk_has_default_secret,),
    "AsyncWebhooks.delivery": (sdk_delivery,),
}


@pytest.mark.parametrize("name", sorted(SDK_CASES))
@pytest.mark.parametrize("where", ["request", "reply"])
def test_every_command_of_the_sdk_is_cut(stack: Up, where: Where, name: str) -> None:
    """A submit returns, a wait ends, what raises may be repeated; nothing is lost, and no end is published twice."""

    async def test() -> None:
        async with cutting_proxy(stack.broker_url) as proxy:
            for case in SDK_CASES[name]:

                async def run(arm: Callable[[], None], case: Any = case) -> None:
                    with stack.redis() as server:
                        ends, expected = Ends(stack.broker_url), dict[str, int]()
                        ends.read()
                        try:
                            async with AsyncClient(proxy.url) as client, AsyncClient(stack.broker_url) as direct:
                                await case(Sdk(client, direct, server, arm, expected))
                            eventually(lambda: nothing_is_left(server), 20, "the end of all tasks")
                            account(ends.read(), expected)
                        finally:
                            ends.close()

                await cut_all(case.__name__, where, proxy, run)

    asyncio.run(test())


def account(ended: Counter[str], expected: dict[str, int]) -> None:
    """Every task that was submitted has ended, as often as it ran, and no other."""
    steps = expected.pop("a step before", 0)
    others = {task_id: count for task_id, count in ended.items() if task_id not in expected}
    assert {task_id: ended[task_id] for task_id in expected} == expected
    assert len(others) == steps and set(others.values()) <= {1}, f"nobody submitted these: {others}"


def test_every_public_method_of_the_sdk_has_a_case() -> None:
    """A new one is cut as well."""
    kinds = (AsyncClient, AsyncTask, AsyncDeadLetters, AsyncModels, AsyncWebhooks)
    public = {f"{kind.__name__}.{name}" for kind in kinds for name in public_methods(kind)}
    assert set(SDK_CASES) == public - {"AsyncTask.id"}
