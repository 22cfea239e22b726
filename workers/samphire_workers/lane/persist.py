"""Calls of the broker that are repeated until it has answered: only such as may run twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from samphire.errors import BrokerMemoryFullError, BrokerUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 0.25


async def persist(action: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until the broker has answered; any other error is raised."""
    while True:
        try:
            return await action()
        except (BrokerUnavailableError, BrokerMemoryFullError) as error:
            logger.warning("the broker is away: %s", error, extra={"action": "broker_away"})
            await asyncio.sleep(RETRY_S)
