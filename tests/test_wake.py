"""What a lane is told when it is woken."""

from __future__ import annotations

import asyncio

from samphire.transport.address import broker_of
from samphire_workers.queues.wake import QueueWatch


def test_a_new_queue_is_heard_of_also_when_something_else_wakes() -> None:
    """Under load there is always something else: a tenant's first task would wait for the next look at all queues."""

    async def test() -> None:
        watch = QueueWatch(broker_of("redis://127.0.0.1:1/0"))
        watch.wake("inference.m@new")
        assert watch.clear() == ({"inference.m@new"}, {"inference.m@new"})
        watch.wake("inference.m@newer")
        watch.wake()
        assert watch.clear() == ({"inference.m@newer"}, set())  # it may be anywhere, and this one is new
        assert watch.clear() == (set(), set())

    asyncio.run(test())
