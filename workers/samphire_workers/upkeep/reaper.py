"""The return of what lost workers held to its queues."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from samphire.errors import BrokerRightError, SamphireError, WorkerCrashError
from samphire.transport.direct import DirectConnection
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_workers.settlement.outcome import attempt_text

logger = logging.getLogger(__name__)

REAP_INTERVAL_S = 0.55
"""Between two looks; the second that misses a worker finds it lost."""


class BrokerAge:
    """How long the broker has run, as far as that is certain: by a clock of one's own since its run was first seen.

    What the broker says itself is believed once, at the first look, of a run that was there before this worker: its
    clock may be set back or forward.

    Args:
        settings: of the worker.
        clock: in s; it is never set.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._run: str | None = None
        self._began = 0.0
        # Without the right to ask, a connection that breaks stands for a broker that may have restarted.
        self._probe = DirectConnection(settings.broker.address)
        self._may_ask = True

    async def close(self) -> None:
        """Close the connection."""
        await self._probe.close()

    async def seconds(self, store: Store) -> float:
        """For how long the broker has run at least; raises as `Store` does when it is away."""
        run, told_s = await self._ask(store)
        now = self._clock()
        if run != self._run:
            self._began = now - (max(0, told_s) if self._run is None else 0)
            self._run = run
        return now - self._began

    async def _ask(self, store: Store) -> tuple[str, int]:
        if self._may_ask:
            try:
                return await store.broker_run()
            except BrokerRightError as error:
                self._may_ask = False
                logger.warning(
                    "%s. A restart of the broker is now told from connections that break: then nobody is taken for "
                    "lost within one lease",
                    error,
                    extra={"action": "right_missing"},
                )
        await self._probe.execute("TIME")
        return f"connection {self._probe.opened}", 0


class Reaper:
    """Finds workers that are lost, and returns what they held.

    A worker is lost when its lease has lapsed, or when its named connection is missing, at two looks in a row and
    without a beat in between. Within one lease of a broker restart neither tells anything: all connections are gone,
    and leases may have lapsed while nobody could beat. Where this user may not list connections a lapsed lease is
    enough.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._lease_s = settings.lease_s
        self._age = BrokerAge(settings)
        self._missing: dict[str, int | None] = {}
        """Who was missed at the last look, with the counter of their lease."""
        self._may_list = True

    async def run(self) -> None:
        """Look for ever."""
        try:
            while True:
                await asyncio.sleep(REAP_INTERVAL_S)
                try:
                    await self.look()
                except SamphireError as error:
                    logger.warning(
                        "tasks of lost workers are not returned now; it is tried again: %s",
                        error,
                        extra={"action": "reap_failed"},
                    )
                    self._missing = {}
        finally:
            await self._age.close()

    async def look(self) -> None:
        """Look once; raises as `Store` does."""
        age_s = await self._age.seconds(self._store)
        others = await self._store.others()
        if age_s <= self._lease_s:
            self._missing = {}
            return
        missing: dict[str, int | None] = {worker_id: beat for worker_id, beat in others.items() if beat is None}
        if len(missing) < len(others):
            connected = await self._connected()
            if connected is not None:
                missing |= {worker_id: beat for worker_id, beat in others.items() if worker_id not in connected}
        for worker_id, beat in missing.items():
            if self._missing.get(worker_id, -1) == beat:
                await _reap(self._store, worker_id, beat)
        self._missing = missing

    async def _connected(self) -> set[str] | None:
        if not self._may_list:
            return None
        try:
            return await self._store.connected()
        except BrokerRightError as error:
            self._may_list = False
            logger.warning(
                "%s. A lost worker is now found only once its lease of %.0f s has lapsed, and not within seconds",
                error,
                self._lease_s,
                extra={"action": "right_missing"},
            )
            return None


async def reap_others(store: Store, settings: Settings) -> None:
    """Return the in-flight messages of lost workers to their queues, for ever."""
    await Reaper(store, settings).run()


async def _reap(store: Store, worker_id: str, last_beat: int | None) -> None:
    left = 1
    attempt = attempt_text(await store.hostname(worker_id), WorkerCrashError("the worker was lost"))
    while left:
        moved, started, left = await store.reap(worker_id, last_beat, attempt)
        if moved < 0:
            return  # it beats again
        if left and not moved:
            return  # what can be returned to nowhere now stays, until the next look
        logger.warning(
            "worker %s is lost: %d of its tasks are back in their queues, %d of them with an attempt less",
            worker_id,
            moved,
            started,
            extra={"action": "reaped"},
        )
