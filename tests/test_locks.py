"""Many together, or one alone."""

from __future__ import annotations

import asyncio

from samphire_workers.inference.locks import SharedLock


def test_nobody_is_beside_one_who_is_alone() -> None:
    """And all come through."""
    seen: list[str] = []

    async def test() -> None:
        lock, inside = SharedLock(), 0

        async def go(name: str, *, alone: bool) -> None:
            nonlocal inside
            async with lock.hold(alone=alone):
                inside += 1
                seen.append(name)
                assert not alone or inside == 1
                for _ in range(3):
                    await asyncio.sleep(0)
                assert not alone or inside == 1
                inside -= 1

        names = [("a", False), ("b", False), ("c", True), ("d", False), ("e", True), ("f", False)]
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            for name, alone in names:
                group.create_task(go(name, alone=alone))
                await asyncio.sleep(0)
        assert sorted(seen) == ["a", "b", "c", "d", "e", "f"]

    asyncio.run(test())


def test_one_who_gives_up_waiting_lets_the_others_pass() -> None:
    """And an error inside lets the next one in."""

    async def test() -> None:
        lock = SharedLock()
        async with asyncio.timeout(5), lock.hold(alone=False):
            waiting = asyncio.create_task(_pass(lock, alone=True))
            await asyncio.sleep(0)
            behind = asyncio.create_task(_pass(lock, alone=False))
            await asyncio.sleep(0)
            assert not behind.done()
            waiting.cancel()
            await behind
        try:
            async with lock.hold(alone=True):
                raise ValueError
        except ValueError:
            pass
        await asyncio.wait_for(_pass(lock, alone=True), 5)

    asyncio.run(test())


async def _pass(lock: SharedLock, *, alone: bool) -> None:
    async with lock.hold(alone=alone):
        pass
