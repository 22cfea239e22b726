"""Running tasks that are no inference: each by itself, by what its kind says."""

from __future__ import annotations

import asyncio
from math import inf

from samphire_broker.store import Store
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference.starting import Starter
from samphire_workers.intake.request import Request, Run
from samphire_workers.settlement.endings import Endings
from samphire_workers.settlement.outcome import TimeLimitError
from samphire_workers.unexpected import our_error


class Runner:
    """Starts tasks, so that a lost worker counts as an attempt, runs them, and ends them.

    Args:
        store: has the broker's clock.
        ledger: where requests go back.
        starter: writes their start.
        endings: ends them.
    """

    def __init__(self, store: Store, ledger: Ledger, starter: Starter, endings: Endings) -> None:
        self._store = store
        self._ledger = ledger
        self._starter = starter
        self._endings = endings
        self._running: dict[str, tuple[Request, asyncio.Task[object]]] = {}
        """By claim."""

    async def run(self, request: Request, run: Run) -> None:
        """Bring one task to its end."""
        for started in await self._starter.start([request]):
            running = asyncio.create_task(run(started))
            self._running[started.claim.field] = started, running
            try:
                await self._until_due(started, running)
            finally:
                running.cancel()
                del self._running[started.claim.field]

    def stop_over(self) -> None:
        """Cancel what runs for nobody any more."""
        for request, running in self._running.values():
            if request.over:
                running.cancel()

    def hand_back(self) -> None:
        """Give up what runs: it goes back to its queues as if it had not begun."""
        for _, running in self._running.values():
            running.cancel()

    async def _until_due(self, request: Request, running: asyncio.Task[object]) -> None:
        limit_s = min(request.times.limit, request.times.soft_limit)
        left_s = min(limit_s, request.times.deadline - self._store.clock.now())
        await asyncio.wait([running], timeout=None if left_s == inf else max(0.0, left_s))
        if request.over:  # it was cancelled, and that is written
            return
        if not running.done():
            if left_s == limit_s:
                self._endings.fail(request, TimeLimitError(limit_s, soft=request.times.soft_limit == limit_s))
            else:
                self._endings.give_up_late([request])
        elif running.cancelled():
            await self._ledger.release([request])
        elif (error := running.exception()) is not None:
            self._endings.fail(request, our_error(error))
        else:
            self._endings.succeed_with(request, running.result())
