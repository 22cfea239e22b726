"""This worker's lease: its heartbeat, on a connection that bears its name."""

from __future__ import annotations

import asyncio
import logging

from samphire.errors import SamphireError
from samphire.transport.direct import DirectConnection
from samphire_broker.settings import Settings
from samphire_broker.store import OtherDeploymentError, Store, WorkerInfo
from samphire_workers.monitoring.observers import NOBODY, Observers

logger = logging.getLogger(__name__)

BEAT_S = 0.3
RETRY_S = 0.1
"""A beat and a retry together take less than the time between two looks of others: a worker whose connection broke has
beaten again before it can be taken for lost."""


async def keep_lease(
    store: Store, settings: Settings, info: WorkerInfo, registered: asyncio.Event, observers: Observers = NOBODY
) -> None:
    """Beat for ever, on the connection whose name tells the others that this worker lives."""
    connection = DirectConnection(settings.broker.address, name=store.keys.connection_prefix + info.id)
    try:
        while True:
            try:
                if await store.beat(info, connection) == 1 and registered.is_set():
                    observers.lease_lost()
                    await store.enter()  # the lease had lapsed: meanwhile others may have come
                registered.set()
                await asyncio.sleep(BEAT_S)
            except OtherDeploymentError as error:
                logger.error(
                    "two deployments serve the same queues, and take tasks from each other: %s",
                    error,
                    extra={"action": "not_alone"},
                )
                await asyncio.sleep(BEAT_S)
            except SamphireError as error:
                logger.warning(
                    "the heartbeat was not written; if that lasts, others take over this worker's tasks: %s",
                    error,
                    extra={"action": "beat_failed"},
                )
                await asyncio.sleep(RETRY_S)
    finally:
        await connection.close()
