"""What a lane does beside the queues: the schedule, what clients ask for, and telling of its state."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from samphire.errors import SamphireError
from samphire.transport.clock import BrokerClock
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_workers.monitoring.observers import LaneSeen, Observers, QueueSeen

logger = logging.getLogger(__name__)

CLOCK_S = 0.1
"""Between two looks at the scheduled tasks and at what clients ask for."""

CATALOGUE_S = 10.0
"""The catalogue is published when it changes, and again after this long."""
CATALOGUE_CHECK_S = 0.25

LETTERS_S = 10.0
"""Between two looks at how many dead letters there are."""
WARN_S = 600.0
TIME_S = 5.0
"""Between two looks at the broker's clock."""
SKEW_S = 2.0
WARN_PART = 0.8

STATE_S = 1.0
COUNT_S = 5.0
"""Between two looks at what lies in the queues."""
COUNTED_MAX = 2000
"""Lists that one look counts: four a queue."""

ListsInUse = Callable[[], Sequence[str]]
Cancel = Callable[[Sequence[str]], Awaitable[Mapping[str, str]]]


async def keep_clock(store: Store, cancel: Cancel) -> None:
    """Return scheduled tasks when they are due, and do what clients ask for, for ever."""
    chores = (
        store.return_due,
        lambda: _cancel_some(cancel),
        store.delete_results,
        store.serve_letters,
        store.serve_follows,
    )
    while True:
        done = 0
        for chore in chores:
            try:
                done += await chore()
            except SamphireError as error:
                logger.warning(
                    "scheduled tasks, cancellations, redrives and new readers of logs wait; it is tried again: %s",
                    error,
                    extra={"action": "clock_failed"},
                )
        await asyncio.sleep(0 if done else CLOCK_S)


async def keep_time(clock: BrokerClock) -> None:
    """Keep up with the broker's clock, and tell once when this machine's differs much from it, for ever."""
    told = False
    while True:
        try:
            await clock.look()
        except SamphireError as error:
            logger.warning(
                "the broker's clock was not read; the last reading counts: %s", error, extra={"action": "time_failed"}
            )
        if abs(clock.skew_s) > SKEW_S and not told:
            logger.warning(
                "this machine's clock is %+.1f s from the broker's. Delays and deadlines go by the broker's; times in "
                "logs and events are this machine's: synchronise it",
                clock.skew_s,
                extra={"action": "clock_skew"},
            )
        told = abs(clock.skew_s) > SKEW_S
        await asyncio.sleep(TIME_S)


async def _cancel_some(cancel: Cancel) -> int:
    """Do what clients wish to cancel; how many wishes are done with. A task that runs is told again, if not at once."""
    return sum(verdict != "running" for verdict in (await cancel(())).values())


async def watch_letters(store: Store, settings: Settings, observers: Observers) -> None:
    """Keep the dead letters within their limits, and warn before they are reached, for ever."""
    warned_at = -WARN_S
    while True:
        try:
            deleted, left, oldest_s = await store.trim_letters()
        except SamphireError as error:
            logger.warning(
                "dead letters were not counted, and none was deleted; it is tried again: %s",
                error,
                extra={"action": "letters_failed"},
            )
            await asyncio.sleep(LETTERS_S)
            continue
        observers.letters(left)
        near = left >= WARN_PART * settings.dead_letters_max or oldest_s >= WARN_PART * settings.dead_letter_ttl_s
        if deleted or (near and time.monotonic() - warned_at >= WARN_S):
            logger.warning(
                "%d dead letters, the oldest %.1f h old: kept are %d, for %.1f h; %d of the oldest were deleted just "
                "now. Redrive or purge them (samphire dead-letters), or raise the limits",
                left,
                oldest_s / 3600,
                settings.dead_letters_max,
                settings.dead_letter_ttl_s / 3600,
                deleted,
                extra={"action": "letters_near_limit"},
            )
            warned_at = time.monotonic()
        await asyncio.sleep(0 if deleted else LETTERS_S)


async def tell_observers(store: Store, observers: Observers, look: Callable[[], LaneSeen], lists: ListsInUse) -> None:
    """Tell observers what this lane holds and what lies in its queues, for ever.

    Args:
        store: the broker.
        observers: who is told.
        look: what the lane holds now.
        lists: the lists of the queues that may hold something.
    """
    counted_at = -COUNT_S
    while True:
        observers.looked(look())
        if time.monotonic() - counted_at >= COUNT_S:
            counted_at = time.monotonic()
            try:
                observers.counted(await _count(store, lists()[:COUNTED_MAX]))
            except Exception as error:  # noqa: BLE001 - figures are not worth a lane
                logger.warning(
                    "queues were not counted: the metrics show their last depths: %s",
                    error,
                    extra={"action": "count_failed"},
                )
        await asyncio.sleep(STATE_S)


async def _count(store: Store, lists: Sequence[str]) -> list[QueueSeen]:
    now, seen = store.clock.now(), []
    for name, (depth, sent_at) in zip(lists, await store.depths(lists), strict=True):
        if depth is None:
            continue
        queue, priority = keys.split_list(name)
        seen.append(QueueSeen(queue, priority, depth, None if sent_at is None else max(0.0, now - sent_at)))
    return seen


async def tell_clients(store: Store, signatures: Callable[[], dict[str, bytes]]) -> None:
    """Publish what the models take, so that clients can refuse what does not fit, for ever."""
    published: dict[str, bytes] = {}
    told_at = 0.0
    while True:
        told = signatures()
        is_due = told and time.monotonic() - told_at > CATALOGUE_S
        if told != published or is_due:
            try:
                await store.publish_catalogue(told)
                published, told_at = told, time.monotonic()
            except SamphireError as error:
                logger.warning(
                    "clients are not told of changed models now; it is tried again: %s",
                    error,
                    extra={"action": "catalogue_failed"},
                )
        await asyncio.sleep(CATALOGUE_CHECK_S)
