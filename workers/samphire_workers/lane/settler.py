"""Settling in batches: whatever has ended while one call was under way goes out with the next."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from samphire.errors import TransientError
from samphire_broker.store import DeadLetter, Settlement, Store

logger = logging.getLogger(__name__)

BATCH = 256
BATCH_BYTES = 4 * 2**20
RETRY_S = 0.25

Ending = TypeVar("Ending", Settlement, DeadLetter)


class Settler:
    """Ends tasks on the store, and reports the claims that are done with."""

    def __init__(self, store: Store, let_go: Callable[[Sequence[str]], None]) -> None:
        self._store = store
        self._let_go = let_go
        self._settlements: list[Settlement] = []
        self._letters: list[DeadLetter] = []
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()

    def add(self, ending: Settlement | DeadLetter) -> None:
        """End a task with the next batch."""
        if isinstance(ending, Settlement):
            self._settlements.append(ending)
        else:
            self._letters.append(ending)
        self._some.set()
        self._none.clear()

    async def drain(self) -> None:
        """Return once everything added is on the store."""
        await self._none.wait()

    async def run(self) -> None:
        """Settle what is added, for ever."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._settlements or self._letters:
                await self._send(self._store.settle, _take(self._settlements))
                await self._send(self._store.fail, _take(self._letters))
            self._none.set()

    async def _send(self, script: Callable[[Sequence[Ending]], Awaitable[list[int]]], batch: Sequence[Ending]) -> None:
        if not batch:
            return
        while True:
            try:
                ours = await script(batch)
                break
            except TransientError as error:  # fenced, so it may be repeated
                logger.warning("settling failed: %s", error, extra={"action": "settle_failed"})
                await asyncio.sleep(RETRY_S)
        for ending, still_ours in zip(batch, ours, strict=True):
            if not still_ours:
                logger.warning(
                    "task %s was taken over by another worker; its outcome here is dropped",
                    ending.task_id,
                    extra={"action": "fenced"},
                )
        self._let_go([ending.field for ending in batch])


def _take(endings: list[Ending]) -> list[Ending]:
    """Remove and return as many endings as one call should carry."""
    nbytes = 0
    for count, ending in enumerate(endings[:BATCH]):
        nbytes += len(ending.meta)
        if count and nbytes > BATCH_BYTES:
            break
    else:
        count = min(len(endings), BATCH)
    taken = endings[:count]
    del endings[:count]
    return taken
