"""Who may use a model: many micro-batches together, or one suspect alone: a readers-writer lock of each model."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SharedLock:
    """Many hold it together, or one alone; who waits to be alone lets nobody pass before it."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = False
        self._waiting_alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, *, alone: bool) -> AsyncIterator[None]:
        """Hold it for the length of the block; with `alone` nobody else does, so what happens is this one's doing."""
        if alone:
            self._waiting_alone += 1
            try:
                while self._inside:
                    await self._changed.wait()
            finally:
                self._waiting_alone -= 1
                self._tell()
        else:
            while self._alone or self._waiting_alone:
                await self._changed.wait()
        self._alone = alone
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._alone = False
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class ModelLocks:
    """One of each model, and before it one of all models."""

    def __init__(self) -> None:
        self._all_models = SharedLock()
        self._by_model: defaultdict[str, SharedLock] = defaultdict(SharedLock)

    @asynccontextmanager
    async def hold(self, model: str, *, alone: bool = False, all_models: bool = False) -> AsyncIterator[None]:
        """Use a model; with `alone` nobody else uses it meanwhile, and with `all_models` nobody uses any other."""
        async with self._all_models.hold(alone=all_models), self._by_model[model].hold(alone=alone):
            yield
