"""Submits, as the broker carries them out."""

from __future__ import annotations

import asyncio

import pytest

from samphire.errors import BrokerMemoryFullError, BrokerUnavailableError, ClientClosedError, QueueFullError
from samphire.transport.address import broker_of
from samphire.transport.publisher import Publisher
from samphire.wire import keys
from tests.proxy import cutting_proxy
from tests.stacks import Valkey, standing_still
from tests.support.names import KEYS
from tests.test_store import QUEUE, everywhere, push, run


def test_a_full_queue_refuses_and_says_so(valkey: Valkey) -> None:
    """The limit counts all priorities; nothing of what is refused is written."""

    async def test() -> None:
        push(valkey, "a", "b", priority=9)
        publisher = Publisher(broker_of(valkey.url), queue_limit=3, blob_ttl_s=60)
        await publisher.publish(QUEUE, 0, [b"c"], [])
        with pytest.raises(QueueFullError, match=r"holds 3 messages; its limit is 3") as caught:
            await publisher.publish(QUEUE, 0, [b"d"], [("sub:blob:d:0", b"data")])
        assert caught.value.retryable and caught.value.retry_after_s
        assert everywhere(valkey) == ["a", "b", "c"]
        assert not valkey.client.exists("samphire:sub:blob:d:0")
        await publisher.close()

    run(test)


def test_submits_that_are_too_many_together_each_have_their_chance(valkey: Valkey) -> None:
    """Those that fit are queued although they travelled with those that do not."""

    async def test() -> None:
        publisher = Publisher(broker_of(valkey.url), queue_limit=3, blob_ttl_s=60)
        submits = [publisher.publish(QUEUE, 3, [str(i).encode()], []) for i in range(5)]
        results = await asyncio.gather(*submits, return_exceptions=True)
        assert [type(result) for result in results] == [str] * 3 + [QueueFullError] * 2
        assert everywhere(valkey) == ["0", "1", "2"]
        await publisher.close()

    run(test)


def test_a_full_broker_refuses_before_it_is_full(valkey: Valkey) -> None:
    """At 80 % of the memory, with a clear error."""

    async def test() -> None:
        used = int(valkey.client.info("memory")["used_memory"])
        valkey.client.config_set("maxmemory", str(int(used * 1.1)))
        publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=60)
        with pytest.raises(BrokerMemoryFullError, match="refused above 80 %") as caught:
            await publisher.publish(QUEUE, 0, [b"a"], [])
        assert caught.value.retryable and caught.value.retry_after_s
        assert everywhere(valkey) == []
        await publisher.close()

    run(test)


def test_a_submit_whose_reply_was_lost_is_carried_out_once(valkey: Valkey) -> None:
    """The caller need not know: it is asked again, and nothing is queued twice."""

    async def test() -> None:
        async with cutting_proxy(valkey.url) as proxy:
            publisher = Publisher(broker_of(proxy.url), queue_limit=0, blob_ttl_s=60)
            await publisher.publish(QUEUE, 0, [b"warm"], [])  # the server knows the script now
            for number in range(5):
                proxy.cut_next = True
                await publisher.publish(QUEUE, 0, [f"{number}".encode()], [(f"sub:blob:{number}:0", b"data")])
                assert proxy.cuts == number + 1
            await publisher.close()
        assert valkey.client.lrange(QUEUE, 0, -1) == [b"4", b"3", b"2", b"1", b"0", b"warm"]
        marks = list(valkey.client.scan_iter(f"{KEYS.once_prefix}*"))
        assert len(marks) == 6 and all(valkey.client.ttl(mark) > 0 for mark in marks)

    run(test)


def test_a_submit_writes_messages_and_claim_checks_and_wakes(valkey: Valkey) -> None:
    """Order is kept, claim checks expire, only an empty queue wakes."""

    async def test() -> None:
        pubsub = valkey.client.pubsub(ignore_subscribe_messages=True)
        pubsub.subscribe(KEYS.wake_channel)
        publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=60)
        await publisher.publish(QUEUE, 3, [str(i).encode() for i in range(2500)], [("sub:blob:1:0", b"data")])
        await publisher.publish(QUEUE, 6, [b"again"], [])
        oldest_first = valkey.client.lrange(keys.queue_list(QUEUE, 3), 0, -1)[::-1]
        assert oldest_first == [str(i).encode() for i in range(2500)]
        assert 0 < valkey.client.ttl("samphire:sub:blob:1:0") <= 60
        assert valkey.client.smembers(KEYS.queues) == {QUEUE.encode()}
        woken = [message for _ in range(4) if (message := pubsub.get_message(timeout=0.2))]
        assert len(woken) == 1
        pubsub.close()
        await publisher.close()

    run(test)


def test_closing_tells_those_who_still_submit(valkey: Valkey) -> None:
    """No future is left unresolved."""

    async def test() -> None:
        publisher = Publisher(broker_of(valkey.url), queue_limit=0, blob_ttl_s=60)
        await publisher.publish(QUEUE, 0, [b"a"], [])
        with standing_still(valkey.process.pid):
            submits = [asyncio.create_task(publisher.publish(QUEUE, 0, [str(i).encode()], [])) for i in range(5)]
            await asyncio.sleep(0.1)
            submits[0].cancel()
            await asyncio.sleep(0.1)
            await publisher.close()
            results = await asyncio.gather(*submits, return_exceptions=True)
        assert [type(result) for result in results[1:]] == [ClientClosedError] * 4
        with pytest.raises(ClientClosedError):
            await publisher.publish(QUEUE, 0, [b"b"], [])

    run(test)


def test_a_broker_that_is_away_is_named(valkey: Valkey) -> None:
    """A refused connection is `BrokerUnavailableError`, not redis-py's error."""

    async def test() -> None:
        publisher = Publisher(broker_of("redis://127.0.0.1:1/0"), queue_limit=0, blob_ttl_s=60)
        with pytest.raises(BrokerUnavailableError, match="the broker is away"):
            await publisher.publish(QUEUE, 0, [b"a"], [])

    run(test)
