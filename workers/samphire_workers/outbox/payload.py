"""What a webhook says of a task, and the message that carries it to whoever delivers it.

The body is made once: each attempt, and each replay, sends the same bytes under the same id.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from samphire.wire import keys
from samphire.wire.contract import DELIVER_TASK, DeliveryRequest
from samphire.wire.deliveries import delivery_id
from samphire.wire.envelope import encode_task
from samphire_broker.store import Webhook
from samphire_broker.webhooks.endpoint import Destination

ATTEMPT_STEP = 2**20
"""Between the sequence numbers of a task's attempts."""

_encode = msgspec.json.Encoder().encode


class About(NamedTuple):
    """The task that a webhook tells of, as far as it is known."""

    task_id: str
    tenant: str
    model: str = ""
    version: str = ""
    submitted_at: float | None = None
    """In s since 1970, as the next one."""
    started_at: float | None = None


def number_of(attempts: int, event: int) -> int:
    """Sequence number of an event of an attempt that is not the task's end.

    Args:
        attempts: how many there were before.
        event: its number in the attempt; its start is 1.
    """
    return (attempts + 1) * ATTEMPT_STEP + min(event, ATTEMPT_STEP - 1)


def webhook(
    destination: Destination, about: About, event: str, sequence: int, now: float, more: Mapping[str, Any], link: str
) -> Webhook:
    """A webhook, ready to be put out with what it tells of.

    Args:
        destination: who is told.
        about: the task.
        event: what happened: `succeeded`, `started`, …
        sequence: the number of the event among those of the task.
        now: the time in s since 1970.
        more: what else it says (`state`, `error`, `result`, …).
        link: where the gateway is; "" where there is none.
    """
    kind = f"task.{event}"
    data = {
        "run": 1,  # the script writes another, where it is another: it knows
        "sequence": sequence,
        "task_id": about.task_id,
        "tenant": about.tenant or None,
        "model": about.model,
        "model_version": about.version or None,
        "submitted_at": _time(about.submitted_at),
        "started_at": _time(about.started_at),
        **more,
        "link": f"{link}/v2/tasks/{about.task_id}" if link else None,
        "command": None if link else f"samphire result {about.task_id}",
    }
    data = {name: value for name, value in data.items() if value is not None}
    body = _encode({"type": kind, "timestamp": _time(now), "data": data}).decode()
    own_id = delivery_id(about.task_id, kind, sequence, destination.endpoint, destination.url)
    order = about.task_id if destination.ordered else ""
    request = DeliveryRequest(destination.endpoint, kind, about.task_id, body, destination.url, about.tenant, order)
    message = encode_task(
        DELIVER_TASK,
        own_id,
        request,
        keys.delivery_queue(destination.endpoint),
        0,
        kwargsrepr=f"{kind} of {about.task_id} to {destination.endpoint}",
        headers={"ignore_result": True, "samphire_watermark": 0},
        sent_at=int(now * 1000) / 1000,
    )
    return Webhook(own_id, destination.endpoint, message.decode(), order)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else iso_time(seconds)


def iso_time(seconds: float) -> str:
    """A time in s since 1970 as RFC 3339 has it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
