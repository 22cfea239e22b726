"""What a producer may read of webhooks: the endpoints that it can name, and what became of its own deliveries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, cast

import msgspec

from samphire.client.encoder import plain_text
from samphire.client.ended import last_run
from samphire.client.webhook_names import WebhookNames
from samphire.errors import InvalidInputError
from samphire.transport.connection import key_text
from samphire.transport.direct import Argument, DirectConnection
from samphire.wire.contract import is_task_id
from samphire.wire.deliveries import LAST, delivery_id
from samphire.wire.endpoints import default_secret_name
from samphire.wire.keys import Keys

RUNS = 16
"""Of a task whose end is not remembered any more so many runs are looked for."""
ENDS = ("task.succeeded", "task.failed", "task.cancelled", "task.expired")

DeliveryState = Literal["waiting", "delivered", "failed", "cancelled"]


@dataclass(frozen=True)
class WebhookEndpoint:
    """An endpoint that this tenant's tasks can name."""

    name: str
    disabled: bool
    """Its deliveries wait until an operator enables it."""


@dataclass(frozen=True)
class DeliveryAttempt:
    """One attempt of a delivery."""

    at: datetime
    error: str = ""
    """Why it has not arrived; "" if it has."""
    status: int | None = None
    """Of the answer; None where there was none."""
    ms: float = 0.0
    """How long it took, in milliseconds."""
    answer: str = ""
    """What the answer begins with."""


@dataclass(frozen=True)
class WebhookDelivery:
    """The webhook that tells of the end of a task."""

    id: str
    """The `webhook-id` that its receiver sees."""
    event: str
    """`task.succeeded`, `task.failed`, `task.cancelled` or `task.expired`."""
    run: int
    """Of the task: 1, and one more for each time that it was redriven, or sent again after it had failed."""
    state: DeliveryState
    attempts: tuple[DeliveryAttempt, ...] = ()
    next_at: datetime | None = None
    """When it is tried again, of one that waits for that."""


_decode_attempts = msgspec.json.Decoder(tuple[DeliveryAttempt, ...]).decode


class AsyncWebhooks:
    """What stands of webhooks, for the tasks of one tenant."""

    def __init__(self, connection: DirectConnection, keys: Keys, names: WebhookNames, tenant: str) -> None:
        self._connection = connection
        self._keys = keys
        self._names = names
        self._tenant = tenant

    async def endpoints(self) -> list[WebhookEndpoint]:
        """The endpoints that tasks of this tenant can name, by name."""
        found = await self._names.all()
        return [
            WebhookEndpoint(name, public.disabled)
            for name, public in sorted(found.items())
            if not name.startswith(default_secret_name("")) and public.tenant in ("", self._tenant)
        ]

    async def has_default_secret(self) -> bool:
        """Whether a task of this tenant can name a URL: there is what signs for it."""
        return await self._names.has_default_secret(self._tenant)

    async def delivery(self, task_id: str, webhook: str) -> WebhookDelivery | None:
        """What became of the webhook that tells of a task's end; of a task that has had several runs, of the last.

        Args:
            task_id: of a task of this tenant.
            webhook: what the task was submitted with: the name of an endpoint, or a URL.

        Returns:
            None where there is none: the task has not ended, has named another webhook or none, or what became of it is
            not kept any more.

        Raises:
            InvalidInputError: that is no id of a task, or no webhook is sent to such a URL.
            BrokerRightError: this user may not read it.
            BrokerUnavailableError: the broker does not answer.
        """
        if not is_task_id(plain_text("the task's id", task_id)):
            raise InvalidInputError(f"expected the id of a task, given {task_id!r:.100}")
        endpoint, url = await self._names.target(plain_text("the webhook", webhook), self._tenant)
        last = await last_run(self._connection, self._keys, task_id)  # else, after long, each run is looked for
        for runs in (range(last, last + 1), range(1, RUNS + 1)):
            candidates = [
                WebhookDelivery(delivery_id(task_id, event, LAST, endpoint, url, run), event, run, "waiting")
                for run in runs
                for event in ENDS
                if run
            ]
            if found := await self._those_that_are(candidates, endpoint):
                return found[-1]
        return None

    async def _those_that_are(self, candidates: Sequence[WebhookDelivery], endpoint: str) -> list[WebhookDelivery]:
        commands: list[tuple[Argument, ...]] = []
        waiting = self._keys.waiting_deliveries(endpoint)
        for one in candidates:  # what ends meanwhile is still there with its record
            commands.append(("ZSCORE", waiting, one.id))
            commands.append(("HMGET", self._keys.delivery(one.id), "state", "attempts"))
        replies = await self._connection.ask_all(commands)
        found = []
        for one, mark, (state, attempts) in zip(candidates, replies[::2], replies[1::2], strict=True):
            if state is not None:
                found.append(_ended(one, state, attempts))
            elif mark is not None:
                found.append(await self._under_way(one))
        return found

    async def _under_way(self, delivery: WebhookDelivery) -> WebhookDelivery:
        history, next_at, record = await self._connection.ask_all(
            [
                ("HGET", self._keys.task_prefix + delivery.id, "history"),
                ("ZSCORE", self._keys.scheduled, delivery.id),
                ("HMGET", self._keys.delivery(delivery.id), "state", "attempts"),
            ]
        )
        if record[0] is not None:  # it has ended meanwhile
            return _ended(delivery, *record)
        attempts = _decode_attempts(b"[" + history + b"]") if history else ()
        again = None if next_at is None else datetime.fromtimestamp(float(next_at), UTC)
        return replace(delivery, attempts=attempts, next_at=again)


def _ended(delivery: WebhookDelivery, state: bytes, attempts: bytes | None) -> WebhookDelivery:
    """The same with what is kept of it."""
    state_now = cast(DeliveryState, key_text(state))
    return replace(delivery, state=state_now, attempts=_decode_attempts(attempts or b"[]"))
