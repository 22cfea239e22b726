"""One worker's turn to run something of a model that no other worker does meanwhile.

A model's process and an endpoint are everybody's: what takes them down is known only if nothing else ran on them,
in any worker. The turn is a key on the broker that lapses unless it is kept, so a worker that dies holds up nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from samphire_broker.store import Store
from samphire_workers.lane.persist import persist

KEPT_S = 5.0
"""A turn that was not asked for again lapses after this long."""
KEEP_S = 1.0
LOOK_S = 0.05
"""Between two looks whether the turn has come."""


class Alone:
    """Takes turns with the other workers, one at a time."""

    def __init__(self, store: Store, is_ending: Callable[[], bool]) -> None:
        self._store = store
        self._is_ending = is_ending
        self._one = asyncio.Lock()

    @asynccontextmanager
    async def turn(self, model: str) -> AsyncIterator[None]:
        """Be the only worker that starts anything of a model, or of all (""); what others began may go on."""
        async with self._one:
            while await self._ask(model) < 0 and not self._is_ending():
                await asyncio.sleep(LOOK_S)
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep(model))
                try:
                    yield
                finally:
                    keeper.cancel()
            await persist(lambda: self._store.alone(model, 0))

    async def others_gone(self, model: str) -> None:
        """Wait, within a turn, until no other worker runs anything of the model any more."""
        while await self._ask(model) > 0 and not self._is_ending():
            await asyncio.sleep(LOOK_S)

    async def _ask(self, model: str) -> int:
        return await persist(lambda: self._store.alone(model, KEPT_S))

    async def _keep(self, model: str) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            await self._ask(model)
