"""Settling in batches: whatever has ended while one call was under way goes out with the next."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from samphire_broker.store import Settled, Settlement, Store, Webhook
from samphire_workers.claims.ledger import Ledger
from samphire_workers.monitoring.observers import Observers
from samphire_workers.repeat import persist

logger = logging.getLogger(__name__)

_DONE = Settled.DONE  # to look a member up in its class takes longer than what is done with it
BATCH = 256
BATCH_BYTES = 4 * 2**20


class Settler:
    """Ends tasks on the store, and reports the claims that are done with.

    Args:
        store: where.
        ledger: lets the claims go.
        observers: are told how long the broker took.
        refused: called with a settlement that was not written, and why (what is neither `DONE` nor `LOST`). The claim
            is still held, and has to be settled otherwise.
    """

    def __init__(
        self, store: Store, ledger: Ledger, observers: Observers, refused: Callable[[Settlement, Settled], None]
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._observers = observers
        self._refused = refused
        self._settlements: list[Settlement] = []
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()

    def add(self, settlement: Settlement) -> None:
        """End a task with the next batch."""
        self._settlements.append(settlement)
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
            while self._settlements:
                await self._send(_take(self._settlements))
            self._none.set()

    async def _send(self, batch: Sequence[Settlement]) -> None:
        began = time.monotonic()
        ours = await persist(lambda: self._store.settle(batch))  # fenced, so it may be repeated
        self._observers.settled(len(batch), time.monotonic() - began)
        done: list[str] = []
        for settlement, verdict in zip(batch, ours, strict=True):
            if verdict is _DONE:
                done.append(settlement.field)
            elif verdict is Settled.LOST:
                done.append(settlement.field)
                logger.warning(
                    "task %s is settled already, or another worker's by now: this outcome is dropped",
                    settlement.task_id,
                    extra={"action": "fenced"},
                )
            else:
                self._refused(settlement, verdict)
        self._ledger.let_go(done)


def _size(webhooks: Sequence[Webhook]) -> int:
    return sum(len(webhook.message) for webhook in webhooks)


def _take(settlements: list[Settlement]) -> list[Settlement]:
    """Remove and return as many settlements as one call should carry."""
    nbytes = 0
    for count, settlement in enumerate(settlements[:BATCH]):
        nbytes += len(settlement.meta) + sum(len(message) for _, message in settlement.pushes)
        nbytes += _size(settlement.webhooks)
        nbytes += sum(len(other.meta) + _size(other.webhooks) for other in settlement.others)
        if count and nbytes > BATCH_BYTES:
            break
    else:
        count = min(len(settlements), BATCH)
    taken = settlements[:count]
    del settlements[:count]
    return taken
