"""An outbox in a backend's own database: tasks are written in its transaction, and a relay submits them.

A task that is submitted before the commit runs on data that is not there; one that is submitted after it is lost with
the process. A row that commits with the data is neither: the relay submits it until the broker has it, and however
often that is, the task is queued once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Protocol

import msgspec

from samphire.client.encoder import Inputs
from samphire.client.prepared import PreparedTask, SubmitOptions, once
from samphire.client.sync import Client
from samphire.errors import InvalidInputError, ProtocolError, QueueFullError, SamphireError

logger = logging.getLogger(__name__)

ONCE_S = 7 * 86_400
"""For so long after a submit a row that is submitted again queues nothing, as after a kill."""
SENT_ONCE_S = 600
"""And for so long once its row is deleted: another relay may have read it before. It costs the broker some 300 bytes a
task."""
AT_ONCE = 100
POLL_S = 0.5
TROUBLE_S = 2.0
"""Between two tries while the broker or the database is away."""
STOP_S = 0.1
"""Between two looks whether to end."""

_encode = msgspec.json.Encoder().encode


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    queue: str
    priority: int
    message: bytes
    stream: str
    blobs: list[tuple[str, bytes]]
    key: None


_decode = msgspec.json.Decoder(_Row).decode


def prepare_once(client: Client, model: str, inputs: Inputs, options: SubmitOptions) -> PreparedTask:
    """Check and encode a task whose id is told before it is submitted.

    Raises:
        InvalidInputError: as in `Client.submit`; or an idempotency key, whose task may be another than this one.
    """
    if options.get("idempotency_key") is not None:
        raise InvalidInputError(
            "expected no idempotency_key: the task is submitted once, and its id is told before that"
        )
    return client.prepare(model, inputs, **options)


def to_row(prepared: PreparedTask) -> str:
    """A prepared task as text, for a column of any database."""
    return _encode(asdict(prepared)).decode()


def from_row(text: str) -> PreparedTask:
    """A prepared task of `to_row`.

    Raises:
        ProtocolError: the text is of something else, or of another version.
    """
    try:
        row = _decode(text)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"expected a task as the outbox writes it: {error}") from error
    return PreparedTask(row.id, row.queue, row.priority, row.message, row.stream, tuple(row.blobs))


class Rows(Protocol):
    """The outbox table of one database; each call is a transaction of its own."""

    away: tuple[type[Exception], ...]
    """Errors that pass: the database is away or busy, or the table is not there yet."""

    def waiting(self, most: int, without: Collection[str]) -> Sequence[tuple[int, str]]:
        """The oldest rows that wait, at most so many, without those for some queues: number and queue."""

    def read(self, number: int) -> str | None:
        """The task of a row; None: the row is gone."""

    def sent(self, numbers: Sequence[int]) -> None:
        """Delete rows whose tasks the broker has."""

    def refused(self, number: int, why: str) -> None:
        """Keep a row that can never be submitted, with the reason; it waits no more."""


class Relay:
    """Submits what an outbox holds.

    Several may run at once, as for two copies of an application: a task is queued once all the same.

    Args:
        rows: the table.
        client: of the broker. Its queue limit holds: rows for a full queue wait, the others go on.
    """

    def __init__(self, rows: Rows, client: Client) -> None:
        self._rows = rows
        self._client = client
        self._passing: tuple[type[Exception], ...] = (SamphireError, *rows.away)
        self._stopped = False

    def stop(self) -> None:
        """Let `run` end; safe in a signal handler."""
        self._stopped = True

    def run(self) -> None:
        """Submit what is there and what comes, until `stop`; what is away is waited for."""
        while not self._stopped:
            pause_s = POLL_S
            try:
                if self.run_once():
                    continue
            except self._passing as error:
                pause_s = max(TROUBLE_S, getattr(error, "retry_after_s", None) or 0.0)
                why = str(error).partition("\n")[0]  # SQLAlchemy adds the statement
                logger.warning(
                    "nothing more is submitted from the outbox now; it is tried again: %s. If its table is not there, "
                    "make it (docs/transactions.md)",
                    why,
                )
            ends_at = time.monotonic() + pause_s
            while not self._stopped and time.monotonic() < ends_at:
                time.sleep(STOP_S)

    def run_once(self) -> int:
        """Submit what is there, some `AT_ONCE` rows; how many were dealt with.

        Raises:
            QueueFullError: nothing is there but rows for queues that are full.
            SamphireError: the broker is away, or refuses this user. What it has was deleted; the rest waits.
        """
        full: dict[str, QueueFullError] = {}
        done = 0
        while not done and (rows := self._rows.waiting(AT_ONCE, full.keys())):
            sent: list[tuple[int, PreparedTask]] = []
            try:
                for number, queue in rows:
                    if queue in full:
                        continue
                    try:
                        done += self._deal_with(number, sent)
                    except QueueFullError as error:
                        full[queue] = error
            finally:
                self._forget(sent)
        if full and not done:
            raise next(iter(full.values()))
        return done

    def _deal_with(self, number: int, sent: list[tuple[int, PreparedTask]]) -> int:
        """Submit a row; 0: another relay has."""
        text = self._rows.read(number)
        if text is None:
            return 0
        try:
            prepared = from_row(text)
        except ProtocolError as error:
            logger.error("row %d of the outbox is not submitted and stays, with the reason: %s", number, error)
            self._rows.refused(number, f"{type(error).__name__}: {error}")
            return 1
        self._client.submit_prepared(prepared, once_s=ONCE_S)
        sent.append((number, prepared))
        return 1

    def _forget(self, sent: Sequence[tuple[int, PreparedTask]]) -> None:
        """Delete rows that the broker has, and let it forget soon that they were submitted."""
        if not sent:
            return
        self._rows.sent([number for number, _ in sent])
        session = self._client._client._session
        names = [session.broker.keys.idempotency_prefix + once(prepared, ONCE_S).name for _, prepared in sent]

        async def shorten() -> None:
            for name in names:
                await session.publisher.connection.ask("EXPIRE", name, SENT_ONCE_S)

        self._client._run(shorten)
