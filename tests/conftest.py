"""Fixtures: a broker for a test, a whole stack for a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.result import AsyncResult
from hypothesis import settings

from samphire import Client
from samphire.wire import keys
from tests.stacks import Up, Valkey, eventually, model_repository, need_servers, running_stack, running_valkey
from tests.support.names import KEYS

# A result of Celery unsubscribes when it is collected: where its server is gone by then, Celery tries for 20 s to reach
# it, in the thread of whichever test runs. Connections end with their applications (`tests/support/plain.py`).
del AsyncResult.__del__

settings.register_profile("samphire", deadline=None, derandomize=True)  # a slow machine is no failure
settings.load_profile("samphire")


SHARED = ("stack", "stand", "own_stack", "up", "services", "wheel", "server", "hands", "checker", "howtos")
"""Fixtures that live longer than one test."""


def group_of(item: pytest.Item) -> str:
    """The tests of a file that share servers are a group; any other test is alone."""
    shares = any(name in SHARED for name in getattr(item, "fixturenames", ()))
    return item.path.stem if shares else ""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A group runs in one process, one test after the other; groups first, since they take longest."""
    for item in items:
        if group := group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: not group_of(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that are not heeded would start servers for every test, unnoticed but for the time."""
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in session.items if group_of(item)), "pytest-xdist does not group tests"


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A broker of the test's own."""
    need_servers()
    with running_valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shipped and test models in one repository."""
    return model_repository(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Up]:
    """One stack for all tests that do not break it."""
    need_servers()
    with running_stack(tmp_path_factory.mktemp("stack"), "--model-repository", str(repository)) as up:
        with up.redis() as client:
            eventually(lambda: client.hexists(KEYS.catalogue, keys.CATALOGUE_COMPLETE), 20, "the catalogue")
        yield up


@pytest.fixture
def client(stack: Up) -> Iterator[Client]:
    """A client of the session's stack."""
    with Client(stack.broker_url) as client:
        yield client
