"""Calls of the broker that are repeated until it has answered: only such as may run twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from samphire.errors import BrokerMemoryFullError, BrokerRightError, BrokerUnavailableError
from samphire.transport.repeat import Pauses

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 0.1
RETRY_CAP_S = 1.0
RIGHT_RETRY_S = 2.0
"""A right that was taken away from the worker's user comes back when somebody gives it back."""


async def persist(action: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call until the broker has answered; any other error is raised."""
    pauses = Pauses(RETRY_S, RETRY_CAP_S)
    while True:
        try:
            return await action()
        except (BrokerUnavailableError, BrokerMemoryFullError) as error:
            logger.warning(
                "the broker does not answer, or its memory is full: what this worker holds waits for it: %s",
                error,
                extra={"action": "broker_away"},
            )
            await asyncio.sleep(pauses.next_s())
        except BrokerRightError as error:  # a script has written nothing then
            logger.error(
                "%s. What this worker holds stays as it is, and is tried again every %.0f s",
                error,
                RIGHT_RETRY_S,
                extra={"action": "right_missing"},
            )
            await asyncio.sleep(RIGHT_RETRY_S)
