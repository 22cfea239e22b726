"""What somebody wants to cancel and what is in no queue that is known: looked for in every queue there is."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from samphire_broker.store import NOWHERE, Store

logger = logging.getLogger(__name__)


def requests_for(verdicts: Mapping[str, str]) -> list[str]:
    """The requests ("<stream> <task id>") that `Store.cancel` could not answer."""
    return [
        f"{verdict.removeprefix(NOWHERE).strip()} {task_id}"
        for task_id, verdict in verdicts.items()
        if verdict.startswith(NOWHERE)
    ]


async def cancel_everywhere(
    store: Store, requests: Sequence[str], meta: str, queues: Collection[str]
) -> dict[str, str]:
    """Name all queues that there are, and cancel once more; may be repeated. Raises as `Store` does.

    Args:
        store: the broker.
        requests: "<stream> <task id>" each.
        meta: the result to store, with an empty task id.
        queues: those that this lane knows.
    """
    found = set(queues)
    cursor = -1
    while cursor:
        cursor, some = await store.find_queues(max(cursor, 0))
        found |= some
    await store.name_queues(found)
    verdicts = await store.cancel(meta, again=requests)
    logger.debug("looked for %d tasks in %d queues", len(requests), len(found), extra={"action": "sought"})
    return verdicts
