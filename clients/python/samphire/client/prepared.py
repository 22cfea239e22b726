"""A task that is checked and encoded, and not yet submitted: it can be kept, and be submitted by another process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TypedDict

from samphire.client.encoder import Blob, Parameters
from samphire.errors import InvalidInputError
from samphire.transport.publisher import IdempotencyKey
from samphire.wire.contract import Backoff
from samphire.wire.keys import Priority


class SubmitOptions(TypedDict, total=False):
    """The options of `submit`, for type checkers."""

    version: str | int
    priority: Priority
    outputs: Iterable[str]
    parameters: Parameters | None
    eta: datetime | None
    delay_s: float | None
    deadline_s: float | None
    idempotency_key: str | None
    max_attempts: int | None
    backoff: Backoff | None
    collect: bool
    webhook: str | None


@dataclass(frozen=True)
class PreparedTask:
    """A task as it will be queued; `AsyncClient.prepare` makes one."""

    id: str
    """The task's id, also Celery's."""
    queue: str
    priority: int
    """Celery's number."""
    message: bytes
    stream: str
    """Where its end is told to the client that prepared it."""
    blobs: tuple[Blob, ...] = ()
    """Names and bytes of its claim checks."""
    key: IdempotencyKey | None = None
    """Of its idempotency key."""


def once(prepared: PreparedTask, ttl_s: int) -> IdempotencyKey:
    """What makes all submits of one prepared task one, for so many seconds.

    Raises:
        InvalidInputError: the task has an idempotency key of its own, or the time is none.
    """
    if prepared.key is not None:
        raise InvalidInputError("expected once_s of a task without an idempotency key, given one that has a key")
    if ttl_s < 1:
        raise InvalidInputError(f"expected once_s of at least 1, given {ttl_s}")
    name = hashlib.sha256(f"once\0{prepared.id}".encode()).hexdigest()
    return IdempotencyKey(name, prepared.id, hashlib.sha256(prepared.message).hexdigest(), ttl_s)
