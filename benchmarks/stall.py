"""How long the broker answers nobody, while large messages are claimed."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Self

import redis

from benchmarks.stack import BenchStack, Figures

MESSAGES = 32
MESSAGE_BYTES = 20 * 2**20
"""More than a lane takes: each becomes a dead letter, and its bytes stay on the broker."""
QUEUE = "bench-stall"
"""No inference queue: the lane does not see it."""


class Pings:
    """The longest time that a PING of another connection takes, while it runs as a context."""

    def __init__(self, broker_url: str) -> None:
        self._server = redis.Redis.from_url(broker_url, socket_timeout=60)
        self._done = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.longest_ms = 0.0

    def _ask(self) -> None:
        self._server.ping()
        self._first.set()
        while not self._done.is_set():
            began = time.perf_counter()
            self._server.ping()
            self.longest_ms = max(self.longest_ms, (time.perf_counter() - began) * 1000)
            time.sleep(0.0005)

    def __enter__(self) -> Self:
        self._thread.start()
        self._first.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._server.close()


def stall(stack: BenchStack, scale: float) -> Figures:
    """The longest stall of a claim from a queue of messages of 20 MB, and of an LPUSH of one of them.

    There are as many pushes as claims, so what the machine's other tenants do lengthens both.
    """
    return asyncio.run(_stall(stack, max(4, int(MESSAGES * min(1.0, scale)))))


async def _stall(stack: BenchStack, count: int) -> Figures:
    from samphire_broker.settings import Settings  # of the version that is measured
    from samphire_broker.store import Store, Turn

    store = Store(Settings(broker_url=stack.broker_url), "bench")
    lease = store.keys.worker_prefix + store.worker_id
    inflight, pushes = f"{lease}:inflight", list[float]()
    key = store.keys.of_celery(QUEUE)
    with stack.redis() as server:
        server.delete(key, inflight)
        for number in range(count):
            message = b"%02d" % number + b"x" * MESSAGE_BYTES
            with Pings(stack.broker_url) as pings:
                server.lpush(key, message)
            pushes.append(pings.longest_ms)
        server.set(lease, 1)
        fields, stalls = list[str](), list[float]()
        while len(fields) < count:
            with Pings(stack.broker_url) as pings:
                claims = await store.claim([Turn(QUEUE, 64, 0)], [64], 64, 10**9)
            assert claims, "a message was lost"
            fields += [claim.field for claim in claims]
            stalls.append(pings.longest_ms)
        found = [int(server.execute_command("HGET", inflight, field)[:2]) for field in fields]
        assert found == list(range(count)), "a message was not claimed, or twice, or out of turn"
        assert server.hlen(inflight) == count and not server.exists(key)
        server.delete(lease, inflight)
    await store.close()
    return {"stall_claim_ms": max(stalls), "stall_push_ms": max(pushes)}
