"""Running tasks that are no inference: each by itself, by what its kind says."""

from __future__ import annotations

import asyncio
import logging
import time
from math import inf

from samphire.errors import InternalError
from samphire_broker.store import Store
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference.starting import Starter
from samphire_workers.intake.request import Request, Run
from samphire_workers.settlement.endings import Endings
from samphire_workers.settlement.outcome import TimeLimitError
from samphire_workers.unexpected import our_error
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

STOP_S = 5.0
"""What is cancelled may clean up for so long."""
LOOK_LEAST_S = 0.01
"""A deadline goes by the broker's clock, which may be set back a little: it is looked at again after this long."""


class Runner:
    """Starts tasks, so that a lost worker counts as an attempt, runs them, and ends them.

    Args:
        store: has the broker's clock.
        ledger: where requests go back.
        work: tells whether this worker hands everything back.
        starter: writes their start.
        endings: ends them.
    """

    def __init__(self, store: Store, ledger: Ledger, work: Work, starter: Starter, endings: Endings) -> None:
        self._store = store
        self._ledger = ledger
        self._work = work
        self._starter = starter
        self._endings = endings
        self._running: dict[str, tuple[Request, asyncio.Task[object]]] = {}
        """By claim."""

    async def run(self, request: Request, run: Run) -> None:
        """Bring one task to its end."""
        for started in await self._starter.start([request]):
            if self._work.is_handed_back:
                await self._ledger.release([started])
            else:
                await self._run_started(started, run)

    def stop_over(self) -> None:
        """Cancel what runs for nobody any more."""
        for request, running in self._running.values():
            if request.over:
                running.cancel()

    def hand_back(self) -> None:
        """Give up what runs: it goes back to its queues as if it had not begun."""
        for _, running in self._running.values():
            running.cancel()

    async def _run_started(self, request: Request, run: Run) -> None:
        began = time.monotonic()
        running = asyncio.create_task(run(request))
        self._running[request.claim.field] = request, running
        try:
            await self._until_over(request, running)
        finally:
            running.cancel()
            await asyncio.wait([running], timeout=STOP_S)
            del self._running[request.claim.field]
            self._ledger.limits.took(request.model, time.monotonic() - began)
        if not running.done():
            logger.error(
                "task %s was cancelled and does not end: it goes on beside what comes next, and may run twice",
                request.task_id,
                extra={"action": "not_ended"},
            )
        else:
            await self._end(request, running)

    async def _until_over(self, request: Request, running: asyncio.Task[object]) -> None:
        limit_s = min(request.times.limit, request.times.soft_limit)
        limit_at = time.monotonic() + limit_s
        while not running.done() and not request.over:
            left_s = min(limit_at - time.monotonic(), request.times.deadline - self._store.clock.now())
            await asyncio.wait([running], timeout=None if left_s == inf else max(LOOK_LEAST_S, left_s))
            if running.done() or request.over:
                return
            if time.monotonic() >= limit_at:
                request.over = True
                self._endings.fail(request, TimeLimitError(limit_s, soft=request.times.soft_limit == limit_s))
            else:
                self._endings.give_up_late([request])

    async def _end(self, request: Request, running: asyncio.Task[object]) -> None:
        error = None if running.cancelled() else running.exception()
        if request.over:  # its end is written
            return
        if running.cancelled() and self._work.is_handed_back:
            await self._ledger.release([request])
        elif running.cancelled():
            self._endings.fail(request, InternalError("its run was cancelled, and nobody had asked for that"))
        elif error is not None:
            self._endings.fail(request, our_error(error))
        else:
            self._endings.succeed_with(request, running.result())
