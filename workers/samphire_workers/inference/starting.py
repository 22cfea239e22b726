"""The start of tasks: written before they are run, so that what goes down with them is known to be their doing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from samphire.errors import WorkerCrashError
from samphire_broker.retry import policy_for
from samphire_broker.settings import Settings
from samphire_broker.store import Started, Store, Tried, WorkerInfo
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference.alone import LOOK_LEAST_S, LOOK_S
from samphire_workers.intake.request import Request
from samphire_workers.monitoring.observers import Observers
from samphire_workers.repeat import persist
from samphire_workers.settlement.endings import Endings
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

# To look a member up in its class takes longer than what is done with it, and this is done for every task.
_RUNS, _NOT_YET = Started.RUNS, Started.NOT_YET


class Starter:
    """Writes the start of tasks, and ends those that may not be started.

    Args:
        settings: those of the worker.
        store: where starts are written.
        endings: ends what is not started.
        ledger: where requests go back.
        work: tells whether this worker hands everything back.
        info: who starts.
        observers: are told of starts.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endings: Endings,
        ledger: Ledger,
        work: Work,
        info: WorkerInfo,
        observers: Observers,
    ) -> None:
        self._settings = settings
        self._store = store
        self._endings = endings
        self._ledger = ledger
        self._work = work
        self._info = info
        self._observers = observers

    async def start(self, batch: Sequence[Request]) -> list[Request]:
        """Start what may be started, once no other worker is alone with the model."""
        look_s = LOOK_S
        while (started := await self.try_start(batch)) is None:
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, LOOK_LEAST_S)
            self._endings.give_up_late(batch)
            batch = [request for request in batch if not request.over]
            for request in batch:
                request.taken_in_at = time.monotonic()  # it is not the model that is slow
            if self._work.is_handed_back:
                await self._ledger.release(batch)
                return []
        return started

    async def try_start(self, batch: Sequence[Request]) -> list[Request] | None:
        """Start what may be started; None: another worker is alone with the model."""
        if not batch:
            return []
        marks = [(request.claim.field, request.task_id) for request in batch]
        verdicts = await persist(lambda: self._store.start(marks, self._info))
        if _NOT_YET in verdicts:
            return None
        started: list[Request] = []
        dropped: list[str] = []
        for request, verdict in zip(batch, verdicts, strict=True):
            if request.over or (verdict is not _RUNS and not self._may_run(request, verdict, dropped)):
                continue
            request.started_at = request.started_at or time.time()
            started.append(request)
        self._observers.started(started)
        if any(request.destination is not None for request in started):
            self._endings.tell_started(started)
        self._ledger.let_go(dropped)
        return started

    def _may_run(self, request: Request, verdict: Started | Tried, dropped: list[str]) -> bool:
        """Whether a task runs that was tried before, or of which the broker says something else."""
        if isinstance(verdict, Tried):
            request.attempts, request.crashes, request.losses, _ = verdict
            if request.attempts < policy_for(request.infer, self._settings).max_attempts:
                return True
            self.exhausted(request, verdict)
        elif verdict is Started.CANCELLED:
            self._endings.revoke(request, "cancelled")
        else:  # it is another worker's, or a copy of a task that has ended: there is nothing to write
            logger.info("task %s is not run here (%s)", request.task_id, verdict.name, extra={"action": "dropped"})
            request.over = True
            dropped.append(request.claim.field)
            self._observers.dropped(request)
        return False

    def exhausted(self, request: Request, before: Tried) -> None:
        """Fail a task that has had all its attempts; this one is not made."""
        request.attempts, request.crashes, request.losses, _ = before
        request.started_at = None
        message = f"{request.crashes} of {request.attempts} attempts took a worker, the model or Triton down"
        self._endings.fail(request, WorkerCrashError(message))
