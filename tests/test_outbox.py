"""Tasks within the transaction of a backend's own database: SQLite and PostgreSQL, SQLAlchemy and Django."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from samphire import BrokerUnavailableError, Client, InvalidInputError, ProtocolError, QueueFullError
from samphire.contrib.outbox import AT_ONCE, ONCE_S, SENT_ONCE_S, from_row, to_row
from samphire.contrib.sqlalchemy import Outbox, submit_on_commit
from samphire.wire import keys
from tests.stacks import ENDS_S, Valkey, bound, clean_environment, eventually
from tests.support.names import KEYS
from tests.support.postgres import running_postgres

ROOT = Path(__file__).parents[1]
INPUTS = {"x": np.ones((1, 1), np.float32)}
LIST = keys.queue_list("inference.m", keys.PRIORITIES["normal"])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A PostgreSQL; its URL."""
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, as SQLAlchemy takes it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'db.sqlite'}"
        return
    url = str(request.getfixturevalue("server")).replace("postgresql", "postgresql+psycopg", 1)
    yield url
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
    engine.dispose()


@pytest.fixture
def engine(database: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Client]:
    with Client(valkey.url) as client:
        yield client


def queued(valkey: Valkey) -> list[str]:
    """Ids of what is queued, oldest first."""
    messages = valkey.client.lrange(KEYS.of_celery(LIST), 0, -1)
    return [json.loads(message)["headers"]["id"] for message in reversed(messages)]


def test_a_submit_follows_the_commit(valkey: Valkey, client: Client, engine: sa.Engine) -> None:
    """Not before it, and in its order; the handle is there at once."""
    with Session(engine) as session:
        for _ in range(2):
            first = submit_on_commit(session, client, "m", INPUTS)
            second = submit_on_commit(session, client, "m", INPUTS)
            assert queued(valkey) == []
            session.commit()
            assert queued(valkey) == [first.id, second.id]
            assert first.status() == "queued"
            valkey.client.delete(KEYS.of_celery(LIST))


def test_what_is_rolled_back_submits_nothing(valkey: Valkey, client: Client, engine: sa.Engine) -> None:
    """A transaction, a savepoint, a savepoint in one that is released: only what commits is submitted."""
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))
        submit_on_commit(session, client, "m", INPUTS)
        session.rollback()
        kept = submit_on_commit(session, client, "m", INPUTS)
        with session.begin_nested() as outer:
            submit_on_commit(session, client, "m", INPUTS)
            with session.begin_nested():
                submit_on_commit(session, client, "m", INPUTS)
            outer.rollback()
        with session.begin_nested():
            also = submit_on_commit(session, client, "m", INPUTS)
        session.commit()
        assert queued(valkey) == [kept.id, also.id]
    with pytest.raises(LookupError), Session(engine) as session, session.begin():
        submit_on_commit(session, client, "m", INPUTS)
        raise LookupError
    with Session(engine) as session:
        submit_on_commit(session, client, "m", INPUTS)
        session.close()  # tells of no rollback
        session.execute(sa.text("SELECT 1"))
        last = submit_on_commit(session, client, "m", INPUTS)
        session.commit()
    assert queued(valkey) == [kept.id, also.id, last.id]


def test_a_bad_request_is_refused_within_the_transaction(valkey: Valkey, client: Client, engine: sa.Engine) -> None:
    """Before anything commits; nothing of it is kept."""
    outbox = Outbox(metadata := sa.MetaData())
    metadata.create_all(engine)
    with Session(engine) as session:
        for add in (submit_on_commit, outbox.add):
            with pytest.raises(InvalidInputError, match="expected a priority"):
                add(session, client, "m", INPUTS, priority="urgent")  # type: ignore[operator]
            with pytest.raises(InvalidInputError, match="expected no idempotency_key"):
                add(session, client, "m", INPUTS, idempotency_key="k")  # type: ignore[operator]
        with pytest.raises(InvalidInputError, match="given one that has a key"):
            outbox.add_prepared(session, client.prepare("m", INPUTS, idempotency_key="k"))
        session.commit()
        assert session.scalar(sa.select(sa.func.count()).select_from(outbox.table)) == 0
    assert queued(valkey) == []


def test_a_broker_that_is_away_at_the_commit(tmp_path: Path, client: Client, valkey: Valkey) -> None:
    """The data is committed, the error says that nothing was submitted, and the session goes on."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'db.sqlite'}")
    metadata = sa.MetaData()
    table = sa.Table("t", metadata, sa.Column("n", sa.Integer))
    metadata.create_all(engine)
    with Session(engine) as session:
        session.execute(sa.insert(table).values(n=1))
        submit_on_commit(session, client, "m", INPUTS)
        valkey.process.kill()
        with pytest.raises(BrokerUnavailableError):
            session.commit()
        session.rollback()
        session.execute(sa.insert(table).values(n=2))
        session.commit()
    with engine.connect() as connection:
        assert list(connection.scalars(sa.select(table.c.n))) == [1, 2]
    engine.dispose()


def test_an_outbox_commits_with_the_data(valkey: Valkey, client: Client, engine: sa.Engine) -> None:
    """What is rolled back is not there; the relay submits the rest in its order, and leaves an empty table."""
    outbox = Outbox(metadata := sa.MetaData())
    metadata.create_all(engine)
    with Session(engine) as session:
        ids = [outbox.add(session, client, "m", INPUTS) for _ in range(3)]
        session.commit()
        outbox.add(session, client, "m", INPUTS)
        session.rollback()
        ids.append(outbox.add_prepared(session, client.prepare("m", INPUTS, deadline_s=600)))
        session.commit()
    relay = outbox.relay(engine, client)
    assert queued(valkey) == []
    assert (relay.run_once(), relay.run_once()) == (4, 0)
    assert queued(valkey) == ids
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(outbox.table)) == 0


DIES = """
import os, signal, sys
import sqlalchemy as sa
from samphire import Client
from samphire.contrib import sqlalchemy as contrib

metadata = sa.MetaData()
outbox = contrib.Outbox(metadata)
engine = sa.create_engine(sys.argv[1])

def dies(self, numbers):
    print("submitted", len(numbers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

contrib._Rows.sent = dies
outbox.relay(engine, Client()).run_once()
"""


def test_a_relay_that_is_killed_submits_nothing_twice(
    valkey: Valkey, client: Client, engine: sa.Engine, database: str
) -> None:
    """Killed after the broker has the tasks, and before their rows are deleted; the next one queues none again."""
    outbox = Outbox(metadata := sa.MetaData())
    metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        ids = [outbox.add(session, client, "m", INPUTS) for _ in range(20)]
        ids.append(outbox.add(session, client, "m", {"x": np.zeros((1, 50_000), np.float32)}))
    killed = subprocess.run(
        [sys.executable, "-c", DIES, database],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        env=clean_environment() | {"SAMPHIRE_BROKER_URL": valkey.url},
    )
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "submitted 21\n"), killed.stderr
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(outbox.table)) == 21
    assert queued(valkey) == ids
    marks = list(valkey.client.scan_iter(f"{KEYS.idempotency_prefix}*"))
    assert len(marks) == 21 and min(map(valkey.client.ttl, marks)) > ONCE_S - 3600
    assert outbox.relay(engine, client).run_once() == 21
    assert queued(valkey) == ids
    assert 0 < max(map(valkey.client.ttl, marks)) <= SENT_ONCE_S, "the broker's memory is not filled for a week"


def test_a_full_queue_holds_up_no_other(valkey: Valkey, engine: sa.Engine) -> None:
    """Its rows wait, and the relay says why once nothing else is there."""
    outbox = Outbox(metadata := sa.MetaData())
    metadata.create_all(engine)
    with Client(valkey.url, queue_limit=2) as client:
        with Session(engine) as session, session.begin():
            ids = [outbox.add(session, client, "m", INPUTS) for _ in range(AT_ONCE + 5)]
            outbox.add(session, client, "other", INPUTS)
        relay = outbox.relay(engine, client)
        assert relay.run_once() == 2
        assert relay.run_once() == 1
        with pytest.raises(QueueFullError):
            relay.run_once()
        assert queued(valkey) == ids[:2]
        valkey.client.delete(KEYS.of_celery(LIST))
        assert relay.run_once() == 2
        assert queued(valkey) == ids[2:4]


def test_a_handle_of_a_task_that_another_client_prepared(valkey: Valkey, client: Client) -> None:
    """It looks at the result itself: the other client's stream is told of the end."""
    prepared = client.prepare("m", INPUTS)
    with Client(valkey.url) as other:
        assert other.submit_prepared(prepared)._look == "often"
    assert client.submit_prepared(prepared)._look != "often"


def test_relays_side_by_side_and_a_broker_that_comes_back(
    valkey: Valkey, client: Client, engine: sa.Engine, database: str, tmp_path: Path
) -> None:
    """Two processes, before the table is there and while the broker is full: each task is queued once."""
    outbox = Outbox(metadata := sa.MetaData())
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": valkey.url}
    command = [sys.executable, "-m", "samphire.contrib.sqlalchemy", database]
    logs = [tmp_path / f"relay{number}" for number in range(2)]
    relays = []
    try:
        for log in logs:
            with log.open("w") as output:
                relays.append(subprocess.Popen(bound(command), stdout=output, stderr=output, env=environment))

        def said(text: str) -> bool:
            return all(text in log.read_text() for log in logs)

        eventually(lambda: said("relaying samphire_outbox"), 60, "their first line")
        eventually(lambda: said("it is tried again"), 60, "the missing table")
        metadata.create_all(engine)
        valkey.client.config_set("maxmemory", 1)  # refuses submits, as a memory that is full does
        ids = []
        for _ in range(5):
            with Session(engine) as session, session.begin():
                ids += [outbox.add(session, client, "m", INPUTS) for _ in range(10)]
        eventually(lambda: said("submits are refused above"), 60, "the refusal")
        valkey.client.config_set("maxmemory", 0)
        eventually(lambda: len(queued(valkey)) == 50, 60, "all tasks in the queue")

        def is_empty() -> bool:
            with engine.connect() as connection:
                return connection.scalar(sa.select(sa.func.count()).select_from(outbox.table)) == 0

        eventually(is_empty, 60, "an empty outbox")
        assert sorted(queued(valkey)) == sorted(ids)
    finally:
        for relay in relays:
            relay.terminate()
        ends = [relay.wait(ENDS_S) for relay in relays]
        print(*(log.read_text() for log in logs))
    assert ends == [0, 0]


def test_a_row_that_can_never_be_submitted(valkey: Valkey, client: Client, engine: sa.Engine) -> None:
    """It stays, with the reason; the others go on."""
    outbox = Outbox(metadata := sa.MetaData())
    metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        first = outbox.add(session, client, "m", INPUTS)
        row = {"task_id": "odd", "queue": "inference.m", "task": "{}", "added_at": sa.func.now(), "refused": ""}
        session.execute(sa.insert(outbox.table).values(row))
        last = outbox.add(session, client, "m", INPUTS)
    relay = outbox.relay(engine, client)
    assert relay.run_once() == 3
    assert relay.run_once() == 0
    assert queued(valkey) == [first, last]
    with engine.connect() as connection:
        reasons = list(connection.scalars(sa.select(outbox.table.c.refused).order_by(outbox.table.c.number)))
    assert [reason.split(":")[0] for reason in reasons] == ["ProtocolError"]


def test_a_task_as_text(client: Client) -> None:
    """It comes back as it was, with its claim checks."""
    prepared = client.prepare("m", {"x": np.zeros((1, 50_000), np.float32)})
    assert prepared.blobs
    assert from_row(to_row(prepared)) == prepared
    for text in ("", "{}", '{"id": 5}', to_row(prepared).replace('"queue"', '"lane"')):
        with pytest.raises(ProtocolError, match="as the outbox writes it"):
            from_row(text)


def test_once_s_is_checked(client: Client) -> None:
    """It is a time, and of a task without a key of its own."""
    with pytest.raises(InvalidInputError, match="at least 1"):
        client.submit_prepared(client.prepare("m", INPUTS), once_s=0)
    with pytest.raises(InvalidInputError, match="given one that has a key"):
        client.submit_prepared(client.prepare("m", INPUTS, idempotency_key="k"), once_s=5)


SETTINGS = """
import os
DATABASES = {"default": %s}
INSTALLED_APPS = ["samphire.contrib.django"]
USE_TZ = True
"""
DJANGO = """
import sys
import django
django.setup()
from django.db import transaction
from samphire import Client, InvalidInputError
from samphire.contrib.django import add_to_outbox, submit_on_commit

inputs = {"x": [[1.0]]}
with Client() as client:
    with transaction.atomic():
        kept = [submit_on_commit(client, "m", inputs).id]
        try:
            with transaction.atomic():
                submit_on_commit(client, "m", inputs)
                add_to_outbox(client, "m", inputs)
                raise LookupError
        except LookupError:
            pass
        try:
            add_to_outbox(client, "m", inputs, priority="urgent")
        except InvalidInputError:
            kept.append(add_to_outbox(client, "m", inputs))
    try:
        with transaction.atomic():
            submit_on_commit(client, "m", inputs)
            add_to_outbox(client, "m", inputs)
            raise LookupError
    except LookupError:
        pass
print(*kept)
"""


def test_django(valkey: Valkey, database: str, tmp_path: Path) -> None:
    """`migrate`, both ways within `atomic`, and the relay of `manage.py`; no migration is missing."""
    url = sa.make_url(database)
    engine = "sqlite3" if database.startswith("sqlite") else "postgresql"
    config = {"ENGINE": f"django.db.backends.{engine}", "NAME": url.database}
    if url.host:
        config |= {"HOST": url.host, "PORT": str(url.port), "USER": url.username}
    (tmp_path / "site_settings.py").write_text(SETTINGS % config)
    environment = clean_environment() | {
        "SAMPHIRE_BROKER_URL": valkey.url,
        "DJANGO_SETTINGS_MODULE": "site_settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "clients" / "python")]),
    }
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": ENDS_S, "env": environment}

    def run(*arguments: str) -> str:
        ended = subprocess.run([sys.executable, *arguments], **options)
        assert ended.returncode == 0, ended.stderr
        return str(ended.stdout)

    run("-m", "django", "migrate")
    run("-m", "django", "makemigrations", "--check", "--dry-run")
    on_commit, in_outbox = run("-c", DJANGO).split()
    assert queued(valkey) == [on_commit]
    relay = subprocess.Popen(
        bound([sys.executable, "-m", "django", "samphire_relay"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        eventually(lambda: queued(valkey) == [on_commit, in_outbox], 60, "the task of the outbox")
    finally:
        relay.terminate()
        _, errors = relay.communicate(timeout=ENDS_S)
    assert relay.returncode == 0, errors
