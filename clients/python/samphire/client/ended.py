"""What workers remember of tasks that have ended, longer than their results live.

Every end is remembered for one to two times `SAMPHIRE_REMEMBER_S` (two hours by default), also of a task whose result
has expired, was deleted, or was never kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from samphire.client.results import Status
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection
from samphire.wire.keys import Keys

PAGE = 500
_VALUE = re.compile(r"[A-Za-z](\d*)")
"""How it has ended, and the number of the run if it is not the first; see the schema of keys."""
_STATES: dict[str, Status] = {
    "S": "succeeded",
    "F": "failed",
    "C": "cancelled",
    "c": "cancelled",
    "E": "expired",
}


async def last_run(connection: DirectConnection, keys: Keys, task_id: str) -> int:
    """The number of the run in which a task has ended last, as far as it is remembered; 0 where it is not."""
    values = await connection.ask_all([("HGET", key, task_id) for key in (keys.ended, keys.ended_before)])
    for value in values:
        if value is not None and (found := _VALUE.match(key_text(value))) is not None:
            return int(found[1] or 1)
    return 0


async def ended_states(connection: DirectConnection, keys: Keys, task_ids: Sequence[str]) -> dict[str, Status]:
    """How tasks have ended, as far as it is remembered; two commands for each 500 ids.

    Args:
        connection: to the broker.
        keys: of the deployment.
        task_ids: tasks whose stored result is missing: what is stored tells more, and is newer.

    Returns:
        "succeeded", "failed", "cancelled" or "expired" by task id. A task that is not in it has not ended, or too long
        ago, or its next run has begun.

    Raises:
        BrokerUnavailableError: the broker is away; it may be asked again.
        BrokerRightError: this user may not read `ended` and `ended:before`.
    """
    found: dict[str, Status] = {}
    for begin in range(0, len(task_ids), PAGE):
        page = task_ids[begin : begin + PAGE]
        for key in (keys.ended_before, keys.ended):  # what is in the newer one counts
            values = await connection.ask("HMGET", key, *page)
            for task_id, value in zip(page, values, strict=True):
                if value is not None and (state := _STATES.get(key_text(value)[:1])) is not None:
                    found[task_id] = state
    return found
