"""Ids of the deliveries of webhooks: whoever knows a task, and who is told of it, can find what became of it."""

from __future__ import annotations

import hashlib

LAST = 2**27 - 1
"""Sequence number of the end of a task's first run: over those of all attempts, of which there are at most 100."""
_CHARACTERS = 32


def delivery_id(task_id: str, kind: str, sequence: int, endpoint: str, url: str, run: int = 1) -> str:
    """The id of a delivery, which is the `webhook-id` that its receiver sees.

    Args:
        task_id: the task that it tells of.
        kind: the type of the event: `task.succeeded`, …
        sequence: number of the event in the task's first run.
        endpoint: name of the endpoint, of a URL, `ad_hoc_name`.
        url: that the task has named; "" where it has named an endpoint.
        run: of the task; a run that is not the first has ids of its own (`shared/outbox.lua`).
    """
    named = f"{task_id}\0{kind}\0{sequence}\0{endpoint}\0{url}"
    found = "msg_" + hashlib.sha256(named.encode()).hexdigest()[:_CHARACTERS]
    return found if run == 1 else f"{found}-{run}"
