"""Tasks within a transaction of SQLAlchemy: submitted once it commits, or kept in an outbox that commits with it.

>>> task = submit_on_commit(session, client, "digits", {"image": image})    # lost if the process dies after the commit
>>> task_id = outbox.add(session, client, "digits", {"image": image})       # never lost: a relay submits it

`python -m samphire.contrib.sqlalchemy` is a relay. Source of what a session tells: SQLAlchemy's
SessionEvents.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Unpack

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import LONGTEXT
from sqlalchemy.orm import Session, SessionTransaction

from samphire.client.encoder import Inputs
from samphire.client.prepared import PreparedTask, SubmitOptions
from samphire.client.sync import Client
from samphire.client.sync_parts import Task
from samphire.contrib.outbox import Relay, prepare_once, to_row
from samphire.errors import InvalidInputError, SamphireError

_WAITING, _COMMITTED = "samphire_waiting", "samphire_committed"
TABLE = "samphire_outbox"
DATABASE_VARIABLE = "SAMPHIRE_OUTBOX_DATABASE_URL"

_Waiting = list[tuple[SessionTransaction, Client, PreparedTask]]


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
        model, inputs, options: as in `Client.submit`, but for `idempotency_key`.

    Raises:
        InvalidInputError: as in `Client.submit`; nothing is submitted.
    """
    prepared = prepare_once(client, model, inputs, options)
    transaction = session.get_nested_transaction() or session.get_transaction() or session.begin()
    if _WAITING not in session.info:
        session.info[_WAITING], session.info[_COMMITTED] = [], []
        sa.event.listen(session, "after_commit", _committed)
        sa.event.listen(session, "after_soft_rollback", _rolled_back)
        sa.event.listen(session, "after_transaction_end", _ended)
    session.info[_WAITING].append((transaction, client, prepared))
    return client.task(prepared.id)


def _committed(session: Session) -> None:
    """The outermost transaction has committed, or a savepoint was released, which decides nothing."""
    if session.get_nested_transaction() is None:
        session.info[_COMMITTED] += session.info[_WAITING]
        session.info[_WAITING].clear()


def _rolled_back(session: Session, previous: SessionTransaction) -> None:
    """Forget what waits for a transaction, or for one within it."""
    waiting: _Waiting = session.info[_WAITING]
    waiting[:] = [one for one in waiting if not _is_within(one[0], previous)]


def _ended(session: Session, transaction: SessionTransaction) -> None:
    """Submit what has committed, now that the session can be used again; all of it, before the first error is raised.

    A session that is closed tells of no rollback: what waits yet was not committed.
    """
    if transaction.parent is not None:
        return
    session.info[_WAITING].clear()
    committed: _Waiting = session.info[_COMMITTED]
    taken, committed[:] = list(committed), []
    errors: list[SamphireError] = []
    for _, client, prepared in taken:
        try:
            client.submit_prepared(prepared)
        except SamphireError as error:
            errors.append(error)
    if errors:
        raise errors[0]


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
        name, schema: of the table.
    """

    def __init__(self, metadata: sa.MetaData, name: str = TABLE, schema: str | None = None) -> None:
        self.table = sa.Table(
            name,
            metadata,
            sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
            sa.Column("task_id", sa.String(255), nullable=False, unique=True),
            sa.Column("queue", sa.String(255), nullable=False),
            sa.Column("task", sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=False),
            sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
            sa.Column("refused", sa.Text, nullable=False),
            schema=schema,
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
        return self.add_prepared(session, prepare_once(client, model, inputs, options))

    def add_prepared(self, session: Session | sa.Connection, prepared: PreparedTask) -> str:
        """Write a task of `prepare` into the outbox; else as `add`. It asks the broker nothing, and so blocks no loop.

        Raises:
            InvalidInputError: the task has an idempotency key.
        """
        if prepared.key is not None:
            raise InvalidInputError("expected a task without an idempotency key, given one that has a key")
        values = {"task_id": prepared.id, "queue": prepared.queue, "task": to_row(prepared)}
        session.execute(sa.insert(self.table).values({**values, "added_at": datetime.now(UTC), "refused": ""}))
        return prepared.id

    def relay(self, engine: sa.Engine, client: Client) -> Relay:
        """A relay of this table."""
        return Relay(_Rows(engine, self.table), client)


class _Rows:
    """The outbox as a relay reads it."""

    away: tuple[type[Exception], ...] = (
        sa.exc.OperationalError,
        sa.exc.InterfaceError,
        sa.exc.TimeoutError,
        sa.exc.ProgrammingError,  # PostgreSQL's, where the table is not there
    )

    def __init__(self, engine: sa.Engine, table: sa.Table) -> None:
        self._engine = engine
        self._table = table

    def waiting(self, most: int, without: Collection[str]) -> Sequence[tuple[int, str]]:
        columns = self._table.c
        waiting = sa.select(columns.number, columns.queue).where(columns.refused == "")
        oldest = waiting.where(columns.queue.not_in(without)).order_by(columns.number).limit(most)
        with self._engine.connect() as connection:
            return [(number, queue) for number, queue in connection.execute(oldest)]

    def read(self, number: int) -> str | None:
        with self._engine.connect() as connection:
            found: str | None = connection.scalar(sa.select(self._table.c.task).where(self._table.c.number == number))
            return found

    def sent(self, numbers: Sequence[int]) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.delete(self._table).where(self._table.c.number.in_(numbers)))

    def refused(self, number: int, why: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(sa.update(self._table).where(self._table.c.number == number).values(refused=why))


def main(arguments: Sequence[str] | None = None) -> None:
    """Relay an outbox until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m samphire.contrib.sqlalchemy",
        description="Submit what an outbox holds, until SIGTERM or Ctrl-C.",
    )
    parser.add_argument(
        "database", nargs="?", default=os.environ.get(DATABASE_VARIABLE), help=f"default: {DATABASE_VARIABLE}"
    )
    parser.add_argument("--table", default=TABLE, help="name of the outbox (default: %(default)s)")
    parser.add_argument("--schema", help="schema of the outbox")
    given = parser.parse_args(arguments)
    if not given.database:
        parser.error(f"expected the database's URL, or {DATABASE_VARIABLE}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        engine, client = sa.create_engine(given.database), Client()
    except (sa.exc.ArgumentError, ModuleNotFoundError) as error:
        parser.error(f"expected the URL of a database whose driver is installed: {error}")
    except InvalidInputError as error:
        parser.error(f"SAMPHIRE_BROKER_URL: {error}")
    outbox = Outbox(sa.MetaData(), given.table, given.schema)
    with client:
        relay = outbox.relay(engine, client)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: relay.stop())
        print(f"relaying {outbox.table.fullname} of {engine.url!r} to {client!r}", flush=True)
        relay.run()


if __name__ == "__main__":
    main()
