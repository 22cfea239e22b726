"""Fixtures: a broker for a test, a whole stack for a session."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from samphire import Client, keys
from tests.stacks import Up, Valkey, eventually, model_repository, running_stack, running_valkey

settings.register_profile("samphire", deadline=None, derandomize=True)  # a slow machine is no failure
settings.load_profile("samphire")


def need_servers() -> None:
    """Skip for a person, fail in CI, where the embedded servers cannot run."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return
    message = "the embedded servers need Linux on x86-64"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


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
            eventually(lambda: client.hexists(keys.CATALOGUE, keys.CATALOGUE_COMPLETE), 20, "the catalogue")
        yield up


@pytest.fixture
def client(stack: Up) -> Iterator[Client]:
    """A client of the session's stack."""
    with Client(stack.broker_url) as client:
        yield client
