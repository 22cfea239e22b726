"""Who may be with a model: many micro-batches at once, or one suspect alone."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turnstile:
    """Lets many through together, or one alone; who waits to be alone lets nobody pass before it."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = False
        self._waiting_alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def through(self, *, alone: bool) -> AsyncIterator[None]:
        """Be inside; with `alone` nobody else is meanwhile, so what happens is this one's doing."""
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


class Turnstiles:
    """One of each model, and before it one of all models."""

    def __init__(self) -> None:
        self._all_models = Turnstile()
        self._by_model: defaultdict[str, Turnstile] = defaultdict(Turnstile)

    @asynccontextmanager
    async def through(self, model: str, *, alone: bool = False, all_models: bool = False) -> AsyncIterator[None]:
        """Be with a model; with `alone` nobody else is meanwhile, and with `all_models` nobody is with any other."""
        async with self._all_models.through(alone=all_models), self._by_model[model].through(alone=alone):
            yield
