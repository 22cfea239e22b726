"""What workers tell each other of tasks that monitors have seen begin: over a real broker, with Celery's own events."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
from celery import Celery
from msgspec import UNSET

from samphire_broker.store import Claimed
from samphire_workers.intake.request import Request
from samphire_workers.monitoring import sent as sent_module
from samphire_workers.monitoring.celery_events import CeleryEvents
from samphire_workers.monitoring.observers import seen
from samphire_workers.monitoring.sent import End, SentTasks
from samphire_workers.worker_log import Repeats
from tests.stacks import Valkey, eventually
from tests.support.plain import plain_celery

TIMEOUT_S = 20
ENDED = ("t1", End(1.0, 0.5, UNSET))


@pytest.fixture
def app(valkey: Valkey) -> Iterator[Celery]:
    """A Celery application on a broker of the test's own."""
    with plain_celery(valkey.url) as app:
        yield app


@pytest.fixture
def listener(app: Celery) -> Iterator[SentTasks]:
    """What another worker hears with; it does not listen yet."""
    listener = SentTasks(app)
    yield listener
    listener.stop()


def listens(valkey: Valkey) -> bool:
    return int(valkey.client.pubsub_numpat()) > 0


def tell_sent(app: Celery, task_id: str) -> None:
    with app.connection_for_write() as connection, app.events.Dispatcher(connection) as dispatcher:
        dispatcher.send("task-sent", uuid=task_id)


def test_others_hear_of_a_started_task_that_goes_back(valkey: Valkey, app: Celery, listener: SentTasks) -> None:
    """Whoever ends it tells its end, though its sample leaves the task out."""
    listener.listen()
    eventually(lambda: listens(valkey), TIMEOUT_S, "a listener")
    events = CeleryEvents(app, "a@host", 600)
    task = seen(Request(Claimed("1:inference.one", 0, b""), "t1"), time.time())
    events.started([task])
    events.dropped(task)
    events._send(events._buffer)
    events._close()
    listener.ended(*ENDED)
    eventually(lambda: listener.take(10) == [ENDED], TIMEOUT_S, "its end, to be told")


def test_a_broker_that_refuses_to_tell_of_tasks_is_asked_again(
    valkey: Valkey,
    app: Celery,
    listener: SentTasks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A right that was missing for a while, which is said once; the thread lives on."""
    monkeypatch.setattr(sent_module, "RETRY_S", 0.05)
    monkeypatch.setattr(sent_module, "RETRY_CAP_S", 0.05)
    tries: list[float] = []
    connect = app.connection_for_read

    def noted() -> object:
        tries.append(time.monotonic())
        return connect()

    monkeypatch.setattr(app, "connection_for_read", noted)
    valkey.client.execute_command("ACL", "SETUSER", "default", "resetchannels")
    repeats = Repeats()
    caplog.handler.addFilter(repeats)
    with caplog.at_level(logging.WARNING):
        listener.listen()
        eventually(lambda: len(tries) > 3, TIMEOUT_S, "more tries")
    assert [record.levelname for record in caplog.records if "task-sent" in record.getMessage()] == ["WARNING"]
    valkey.client.execute_command("ACL", "SETUSER", "default", "allchannels")
    eventually(lambda: listens(valkey), TIMEOUT_S, "a listener")
    tell_sent(app, "t1")
    listener.ended(*ENDED)
    eventually(lambda: listener.take(10) == [ENDED], TIMEOUT_S, "its end, to be told")
