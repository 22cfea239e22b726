"""Flower, the task monitor of Celery, on loopback and never without a password."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
import stat
import sys
from base64 import b64encode
from http.client import HTTPConnection
from pathlib import Path

from samphire.transport.address import Broker, environment_of
from samphire_broker.embedded.ports import LOOPBACK
from samphire_broker.embedded.process import PartError, PartSpec

FLOWER_USER = "samphire"
PASSWORD_VARIABLE = "SAMPHIRE_FLOWER_PASSWORD"
MAX_TASKS = 20_000
"""Tasks that Flower keeps in memory, some 7 KB each; the oldest are forgotten first."""
PROBED_PATH = "/api/task/types"
"""Needs a password and asks no worker."""


def given_password() -> str | None:
    """The password of the environment, if there is one.

    Raises:
        PartError: it has characters that Flower cannot take.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    if password and not (password.isascii() and password.isprintable() and "," not in password):
        raise PartError(f"{PASSWORD_VARIABLE}: expected printable ASCII without a comma, which Flower cannot take")
    return password or None


def kept_password(file: Path) -> str:
    """The password of the data directory, made at its first use; only the owner can read the file."""
    if not file.exists():
        draft = file.with_name(file.name + ".part")
        draft.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        draft.write_text(secrets.token_urlsafe(24) + "\n")
        draft.replace(file)
    return file.read_text().strip()


def flower_spec(data_dir: Path, port: int, broker: Broker, password: str) -> PartSpec:
    """Flower in a process of its own; what it needs to know stands in its environment, where `ps` does not show it.

    Raises:
        PartError: the package is missing.
    """
    if importlib.util.find_spec("flower") is None:
        raise PartError("no Flower found: pip install 'samphire[embedded]'")
    credentials = f"{FLOWER_USER}:{password}"

    def status(headers: dict[str, str]) -> int:
        connection = HTTPConnection(LOOPBACK, port, timeout=5)
        try:
            connection.request("GET", PROBED_PATH, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    async def wait_ready(_pid: int) -> None:
        while True:
            try:
                open_status = await asyncio.to_thread(status, {})
                break
            except OSError:  # not listening yet
                await asyncio.sleep(0.1)
        authorization = {"Authorization": "Basic " + b64encode(credentials.encode()).decode()}
        statuses = (open_status, await asyncio.to_thread(status, authorization))
        if statuses != (401, 200):
            raise PartError(f"flower answers {statuses} without and with the password, expected (401, 200)")

    return PartSpec(
        name="flower",
        command=[sys.executable, "-m", "celery", "-A", "samphire_workers.app", "flower"],
        env={
            **environment_of(broker),
            "FLOWER_CONF": os.devnull,  # else a flowerconfig.py that happens to stand here would be run
            "FLOWER_ADDRESS": LOOPBACK,
            "FLOWER_PORT": str(port),
            "FLOWER_BASIC_AUTH": credentials,
            "FLOWER_MAX_TASKS": str(MAX_TASKS),
            "FLOWER_PERSISTENT": "false",
            "FLOWER_TASKS_COLUMNS": "name,kwargs,uuid,state,received,runtime,worker",
        },
        log_file=data_dir / "logs" / "flower.log",
        address=f"http://{LOOPBACK}:{port}",
        wait_ready=wait_ready,
    )
