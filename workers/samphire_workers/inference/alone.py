"""Running something of a model that no other worker runs meanwhile.

A model's process and an endpoint are everybody's: what takes them down is known only if nothing else ran on them,
in any worker. One worker at a time holds a key on the broker for that; the key lapses unless it is kept, and whoever
reaps a lost worker takes it away, so nobody is held up for ever.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from samphire_broker.store import Store
from samphire_workers.repeat import persist
from samphire_workers.work import Work

KEPT_S = 20.0
"""A key that was not asked for again lapses after this long: longer than a call of the broker may take."""
KEEP_S = 1.0
LOOK_S = 0.05
LOOK_LEAST_S = 0.2
"""Between two looks whether others are done, first and at most."""
OTHERS_FIRST_S = 1.0
"""Who has held the key for so long, for one task after the other, lets others begin something."""


_holds = itertools.count(1)
"""Numbers of the holds of this process, over all its lanes: one that a failed lane has left lapses like any other's."""


class Alone:
    """Holds the key for one task of this worker after the other."""

    def __init__(self, store: Store, work: Work) -> None:
        self._store = store
        self._work = work
        self._one = asyncio.Lock()
        self._began = self._ended = 0.0
        self._hold = 0

    @asynccontextmanager
    async def hold(self, model: str) -> AsyncIterator[None]:
        """Let no other worker start anything of a model, or of all (""); what they have begun may go on."""
        async with self._one:
            now = time.monotonic()
            if now - self._began > OTHERS_FIRST_S:
                if now - self._ended < LOOK_LEAST_S and not self._work.is_handed_back:
                    await asyncio.sleep(LOOK_LEAST_S + LOOK_S)
                self._began = time.monotonic()
            self._hold = next(_holds)
            while await self._ask(model) < 0 and not self._work.is_handed_back:
                await asyncio.sleep(LOOK_S)
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep(model))
                try:
                    yield
                finally:
                    keeper.cancel()
            await persist(lambda: self._store.alone(model, 0, self._hold))
            self._ended = time.monotonic()

    async def until_nobody_else(self, model: str) -> None:
        """Wait, holding no lock, until no other worker is alone with a model; or until this worker ends."""
        while not self._work.is_handed_back and await persist(lambda: self._store.is_another_alone(model)):
            await asyncio.sleep(LOOK_LEAST_S)

    async def others_end(self, model: str, within_s: float) -> bool:
        """Wait, holding the key, until no other worker runs anything of the model; False if that does not come true."""
        until = time.monotonic() + within_s
        while (under_way := await self._ask(model)) > 0 and time.monotonic() < until and not self._work.is_handed_back:
            await asyncio.sleep(LOOK_S)
        return under_way == 0

    async def _ask(self, model: str) -> int:
        return await persist(lambda: self._store.alone(model, KEPT_S, self._hold))

    async def _keep(self, model: str) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            await self._ask(model)
