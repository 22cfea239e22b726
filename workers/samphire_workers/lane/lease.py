"""Who lives: this worker's heartbeat, and the return of what lost workers held."""

from __future__ import annotations

import asyncio
import logging

from samphire import keys
from samphire.direct import DirectConnection
from samphire.errors import SamphireError, WorkerCrashError
from samphire_broker.settings import Settings
from samphire_broker.store import Store, WorkerInfo
from samphire_workers.lane.outcome import attempt_text

logger = logging.getLogger(__name__)

BEAT_S = 0.3
RETRY_S = 0.1
"""A beat and a retry together take less than the time between two looks of others: a worker whose connection broke has
beaten again before it can be taken for lost."""
REAP_INTERVAL_S = 0.55
"""Between two looks; the second that misses a worker finds it lost."""


async def keep_lease(store: Store, settings: Settings, info: WorkerInfo, registered: asyncio.Event) -> None:
    """Beat for ever, on the connection whose name tells the others that this worker lives."""
    connection = DirectConnection(settings.broker_url, name=keys.CONNECTION_PREFIX + info.id)
    try:
        while True:
            try:
                await store.beat(info, connection)
                registered.set()
                await asyncio.sleep(BEAT_S)
            except SamphireError as error:
                logger.warning("heartbeat failed: %s", error, extra={"action": "beat_failed"})
                await asyncio.sleep(RETRY_S)
    finally:
        await connection.close()


async def reap_others(store: Store, settings: Settings) -> None:
    """Return the in-flight messages of lost workers to their queues, for ever.

    A worker is lost when its lease has lapsed, or when its named connection was missing at two looks in
    a row and its lease has not beaten in between. Within one lease of a broker restart neither tells
    anything: all connections are gone, and leases may have lapsed while nobody could beat.
    """
    missing: dict[str, int] = {}
    while True:
        await asyncio.sleep(REAP_INTERVAL_S)
        try:
            others = await store.others()
            if others and await store.uptime_s() <= settings.lease_s:
                missing = {}
                continue
            lapsed = [worker_id for worker_id, beat in others.items() if beat is None]
            gone: dict[str, int] = {}
            if len(lapsed) < len(others):
                connected = await store.connected()
                gone = {
                    worker_id: beat
                    for worker_id, beat in others.items()
                    if beat is not None and worker_id not in connected
                }
            for worker_id in lapsed:
                await _reap(store, worker_id, None)
            for worker_id, beat in gone.items():
                if missing.get(worker_id) == beat:
                    await _reap(store, worker_id, beat)
            missing = gone
        except SamphireError as error:
            logger.warning("reaping failed: %s", error, extra={"action": "reap_failed"})
            missing = {}


async def _reap(store: Store, worker_id: str, last_beat: int | None) -> None:
    left = 1
    attempt = attempt_text(await store.hostname(worker_id), WorkerCrashError("the worker was lost"))
    while left:
        moved, started, left = await store.reap(worker_id, last_beat, attempt)
        if moved < 0:
            return  # it beats again
        if moved or not left:
            logger.warning(
                "worker %s is lost: %d messages returned, of them %d started",
                worker_id,
                moved,
                started,
                extra={"action": "reaped"},
            )
