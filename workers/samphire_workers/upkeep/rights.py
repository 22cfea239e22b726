"""Whether the broker lets this worker do what it has to: asked at its start, so that nothing fails in the middle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from samphire.errors import BrokerRightError, InvalidInputError, SamphireError
from samphire_broker.store import OtherDeploymentError, Right, Store

logger = logging.getLogger(__name__)

RETRY_S = 0.5


async def check_rights(store: Store, is_stopping: Callable[[], bool]) -> None:
    """Return once the broker has said that this worker has all the rights that it needs, and is of its deployment.

    Raises:
        BrokerRightError: it lacks some, which the message names; the worker must not begin.
        OtherDeploymentError: the queues are served by another deployment, or the keys are of another version.
        InvalidInputError: the broker refuses user and password.
    """
    while not is_stopping():
        try:
            missing = await store.missing_rights()
            if not any(right.vital for right in missing):
                await store.enter()
        except (BrokerRightError, OtherDeploymentError, InvalidInputError):
            raise
        except SamphireError as error:
            logger.warning(
                "the broker does not answer: the worker starts once it does: %s", error, extra={"action": "broker_away"}
            )
            await asyncio.sleep(RETRY_S)
            continue
        vital = [right for right in missing if right.vital]
        for right in missing:
            if not right.vital:
                logger.warning(
                    "the worker's broker user may not run %s; the worker goes on without",
                    right,
                    extra={"action": "right_missing"},
                )
        if vital:
            raise BrokerRightError(told(vital))
        return


def told(missing: list[Right]) -> str:
    """What is missing, what that means, and what to do, in one line."""
    names = "; ".join(map(str, missing[:10])) + (f"; and {len(missing) - 10} more" if len(missing) > 10 else "")
    return (
        f"the user of SAMPHIRE_BROKER_URL lacks rights on the broker: {names}. This worker does not start, since tasks "
        "would be claimed and never ended; grant them (ACL SETUSER), docs/deployment.md has the whole rule"
    )
