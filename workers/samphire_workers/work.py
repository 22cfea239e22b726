"""What a lane does at once: each of its asyncio tasks has an owner here, which notices its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any


class Work:
    """The asyncio tasks of a lane: an error in any of them ends the lane.

    Entered once, as an asynchronous context manager; it is left when all of them have ended.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._begun: set[asyncio.Task[None]] = set()
        self._kept: set[asyncio.Task[None]] = set()
        self.is_handed_back = False
        """Whether what is held goes back to its queues instead of being finished."""

    async def __aenter__(self) -> Work:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._group.__aexit__(kind, error, traceback)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin what the lane brings to its end before it ends itself."""
        self._start(work, self._begun)

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin what goes on for as long as the lane runs."""
        return self._start(work, self._kept)

    def _start(self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        among.add(task)
        task.add_done_callback(among.discard)
        return task

    async def wait_for_begun(self) -> bool:
        """Wait until what is under way has ended; False where there was nothing."""
        if self._begun:
            await asyncio.wait(self._begun)
            return True
        return False

    def end_kept(self) -> None:
        """End what would go on."""
        for task in list(self._kept):
            task.cancel()
