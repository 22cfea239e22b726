"""What a lane does beside the queues: the schedule, cancellations, deletions, and telling clients of the models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from samphire.errors import SamphireError
from samphire_broker.store import Store

logger = logging.getLogger(__name__)

CLOCK_S = 0.1
"""Between two looks at the scheduled tasks and at what clients ask for."""

CATALOGUE_S = 10.0
"""The catalogue is published when it changes, and again after this long."""
CATALOGUE_CHECK_S = 0.25

Cancel = Callable[[Sequence[str]], Awaitable[Mapping[str, str]]]


async def keep_clock(store: Store, cancel: Cancel) -> None:
    """Return scheduled tasks when they are due, and do what clients ask for, for ever."""
    while True:
        done = 0
        for chore in (store.return_due, lambda: _count(cancel), store.delete_results, store.serve_letters):
            try:
                done += await chore()
            except SamphireError as error:
                logger.warning("the clock stands: %s", error, extra={"action": "clock_failed"})
        await asyncio.sleep(0 if done else CLOCK_S)


async def _count(cancel: Cancel) -> int:
    return len(await cancel(()))


async def tell_clients(store: Store, signatures: Callable[[], dict[str, bytes]]) -> None:
    """Publish what the models take, so that clients can refuse what does not fit, for ever."""
    published: dict[str, bytes] = {}
    told_at = 0.0
    while True:
        told = signatures()
        if told != published or time.monotonic() - told_at > CATALOGUE_S:
            try:
                await store.publish_catalogue(told, published.keys() - told.keys())
                published, told_at = told, time.monotonic()
            except SamphireError as error:
                logger.warning("the catalogue was not published: %s", error, extra={"action": "catalogue_failed"})
        await asyncio.sleep(CATALOGUE_CHECK_S)
