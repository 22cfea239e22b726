"""An outbox in a backend's own database: tasks are written in its transaction, and a relay submits them.

A task that is submitted before the commit runs on data that is not there; one that is submitted after it is lost with
the process. A row that commits with the data is neither: the relay submits it until the broker has it, and however
often that is, the task is queued once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

import msgspec

from samphire.client.prepared import PreparedTask
from samphire.client.sync import Client
from samphire.errors import IdempotencyConflictError, ProtocolError, SamphireError, TransientError
from samphire.transport.publisher import IdempotencyKey

logger = logging.getLogger(__name__)

ONCE_S = 7 * 86_400
"""For so long after the first submit a row that is submitted again queues nothing: as after a kill, or a restored
backup of the database."""
AT_ONCE = 100
POLL_S = 0.5
TROUBLE_S = 2.0
"""Between two tries while the broker or the database is away."""

_encode = msgspec.json.Encoder().encode


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    queue: str
    priority: int
    message: bytes
    blobs: list[tuple[str, bytes]] = []
    key: tuple[str, str, str, int] | None = None


_decode = msgspec.json.Decoder(_Row).decode


def to_row(prepared: PreparedTask) -> str:
    """A prepared task as text, for a column of any database."""
    return _encode(asdict(prepared)).decode()


def from_row(text: str) -> PreparedTask:
    """A prepared task of `to_row`.

    Raises:
        ProtocolError: the text is of something else, or of a later version.
    """
    try:
        row = _decode(text)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"expected a task as the outbox writes it: {error}") from error
    key = None
    if row.key is not None:
        name, task_id, digest, ttl_s = row.key
        key = IdempotencyKey(name, task_id, digest, max(ttl_s, ONCE_S))
    return PreparedTask(row.id, row.queue, row.priority, row.message, tuple(row.blobs), key)


class Rows(Protocol):
    """The outbox table of one database; each call is a transaction of its own."""

    away: tuple[type[Exception], ...]
    """Errors that pass: the database is away, or busy."""

    def waiting(self, most: int) -> Sequence[tuple[int, str]]:
        """The oldest rows that wait, at most so many: number and task."""

    def sent(self, numbers: Sequence[int]) -> None:
        """Delete rows whose tasks the broker has."""

    def refused(self, number: int, why: str) -> None:
        """Keep a row that can never be submitted, with the reason; it waits no more."""


class Relay:
    """Submits what an outbox holds.

    Several may run at once, as for two copies of an application: a task is queued once all the same.

    Args:
        rows: the table.
        client: of the broker. Its queue limit holds: a full queue is waited for.
    """

    def __init__(self, rows: Rows, client: Client) -> None:
        self._rows = rows
        self._client = client
        self._passing: tuple[type[Exception], ...] = (TransientError, *rows.away)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let `run` end; safe in a signal handler."""
        self._stopped.set()

    def run(self) -> None:
        """Submit what is there and what comes, until `stop`; what is away is waited for."""
        while not self._stopped.is_set():
            pause_s = POLL_S
            try:
                if self.run_once():
                    continue
            except self._passing as error:
                pause_s = max(TROUBLE_S, getattr(error, "retry_after_s", None) or 0.0)
                logger.warning("nothing is submitted from the outbox now; it is tried again: %s", error)
            self._stopped.wait(pause_s)

    def run_once(self) -> int:
        """Submit what is there, at most `AT_ONCE` rows; how many were dealt with.

        Raises:
            TransientError: the broker is away or full. What it has was deleted; the rest waits.
            SamphireError: the broker refuses this user; the same holds.
        """
        rows = self._rows.waiting(AT_ONCE)
        sent: list[int] = []
        try:
            for number, text in rows:
                if self._submit(number, text):
                    sent.append(number)
        finally:
            if sent:
                self._rows.sent(sent)
        return len(rows)

    def _submit(self, number: int, text: str) -> bool:
        """Whether the broker has the task."""
        try:
            prepared = from_row(text)
        except ProtocolError as error:
            return self._refuse(number, error)
        try:
            self._client.submit_prepared(prepared, once_s=ONCE_S if prepared.key is None else None)
        except IdempotencyConflictError as error:
            return self._refuse(number, error)
        return True

    def _refuse(self, number: int, error: SamphireError) -> bool:
        logger.error("row %d of the outbox is not submitted and stays, with the reason: %s", number, error)
        self._rows.refused(number, f"{type(error).__name__}: {error}")
        return False
