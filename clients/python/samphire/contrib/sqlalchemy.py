"""Tasks within a transaction of SQLAlchemy: submitted once it commits, or kept in an outbox that commits with it.

>>> task = submit_on_commit(session, client, "digits", {"image": image})    # lost if the process dies after the commit
>>> task_id = outbox.add(session, client, "digits", {"image": image})       # never lost: a relay submits it

`python -m samphire.contrib.sqlalchemy DATABASE_URL` is a relay. Source of what a session tells: SQLAlchemy's
SessionEvents.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Unpack

import sqlalchemy as sa
from sqlalchemy.orm import Session, SessionTransaction

from samphire.client.encoder import Inputs
from samphire.client.prepared import PreparedTask, SubmitOptions
from samphire.client.sync import Client
from samphire.client.sync_parts import Task
from samphire.contrib.outbox import Relay, to_row
from samphire.errors import SamphireError

_WAITING = "samphire_waiting"
TABLE = "samphire_outbox"


def submit_on_commit(
    session: Session, client: Client, model: str, inputs: Inputs, **options: Unpack[SubmitOptions]
) -> Task:
    """Submit an inference once the session's transaction has committed; return its handle now.

    The request is checked and encoded now. A transaction or savepoint that is rolled back submits nothing. A process
    that dies between commit and submit loses the task, and a broker that is away then raises from `session.commit()`,
    after the data was committed: use an `Outbox` where nothing may be lost.

    Args:
        session: whose transaction it is; one begins if there is none.
        client: submits it.
        model, inputs, options: as in `Client.submit`.

    Raises:
        InvalidInputError: as in `Client.submit`; nothing is submitted.
    """
    prepared = client.prepare(model, inputs, **options)
    transaction = session.get_nested_transaction() or session.get_transaction() or session.begin()
    waiting = session.info.get(_WAITING)
    if waiting is None:
        waiting = session.info[_WAITING] = []
        sa.event.listen(session, "after_commit", _committed)
        sa.event.listen(session, "after_soft_rollback", _rolled_back)
    waiting.append((transaction, client, prepared))
    return client.task(prepared.id)


_Waiting = list[tuple[SessionTransaction, Client, PreparedTask]]


def _committed(session: Session) -> None:
    """Submit what waits for the outermost transaction, all of it, before the first error is raised."""
    if session.get_nested_transaction() is not None:
        return  # a savepoint was released
    waiting: _Waiting = session.info[_WAITING]
    taken, waiting[:] = list(waiting), []
    errors: list[SamphireError] = []
    for _, client, prepared in taken:
        try:
            client.submit_prepared(prepared)
        except SamphireError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _rolled_back(session: Session, previous: SessionTransaction) -> None:
    """Forget what waits for a transaction, or for one within it."""
    waiting: _Waiting = session.info[_WAITING]
    waiting[:] = [one for one in waiting if not _is_within(one[0], previous)]


def _is_within(transaction: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while transaction is not None:
        if transaction is outer:
            return True
        transaction = transaction.parent
    return False


class Outbox:
    """An outbox table.

    Args:
        metadata: of the application: `metadata.create_all` then makes the table, and Alembic finds it.
        name: of the table.
    """

    def __init__(self, metadata: sa.MetaData, name: str = TABLE) -> None:
        self.table = sa.Table(
            name,
            metadata,
            sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
            sa.Column("task_id", sa.String(255), nullable=False, unique=True),
            sa.Column("task", sa.Text, nullable=False),
            sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
            sa.Column("refused", sa.Text, nullable=False, default=""),
        )

    def add(
        self,
        session: Session | sa.Connection,
        client: Client,
        model: str,
        inputs: Inputs,
        **options: Unpack[SubmitOptions],
    ) -> str:
        """Write an inference into the outbox, within the transaction under way; return the task's id.

        Once that commits, a relay submits it; `client.task(id)` is its handle then. Delays and deadlines count from
        now.

        Raises:
            InvalidInputError: as in `Client.submit`; nothing is written.
        """
        prepared = client.prepare(model, inputs, **options)
        values = {"task_id": prepared.id, "task": to_row(prepared), "added_at": datetime.now(UTC), "refused": ""}
        session.execute(sa.insert(self.table).values(values))
        return prepared.id

    def relay(self, engine: sa.Engine, client: Client) -> Relay:
        """A relay of this table."""
        return Relay(_Rows(engine, self.table), client)


class _Rows:
    """The outbox as a relay reads it."""

    away: tuple[type[Exception], ...] = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)

    def __init__(self, engine: sa.Engine, table: sa.Table) -> None:
        self._engine = engine
        self._table = table

    def waiting(self, most: int) -> Sequence[tuple[int, str]]:
        columns = self._table.c
        oldest = sa.select(columns.number, columns.task).where(columns.refused == "").order_by(columns.number)
        with self._engine.connect() as connection:
            return [(number, task) for number, task in connection.execute(oldest.limit(most))]

    def sent(self, numbers: Sequence[int]) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.delete(self._table).where(self._table.c.number.in_(numbers)))

    def refused(self, number: int, why: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(self._table).where(self._table.c.number == number).values(refused=why))


def main(arguments: Sequence[str]) -> None:
    """Relay an outbox with the default name until SIGTERM or Ctrl-C."""
    if len(arguments) != 1:
        sys.exit("usage: python -m samphire.contrib.sqlalchemy DATABASE_URL, with the broker in SAMPHIRE_BROKER_URL")
    metadata = sa.MetaData()
    outbox = Outbox(metadata)
    engine = sa.create_engine(arguments[0])
    metadata.create_all(engine)
    with Client() as client:
        relay = outbox.relay(engine, client)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: relay.stop())
        print(f"relaying {outbox.table.name} of {engine.url!r} to {client!r}", flush=True)
        relay.run()


if __name__ == "__main__":
    main(sys.argv[1:])
