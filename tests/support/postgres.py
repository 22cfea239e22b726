"""A PostgreSQL of a test's own."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from samphire_broker.embedded.ports import LOOPBACK, choose_port
from tests.stacks import bound, eventually
from tests.support.tools import tool

INSTALLED = "usr/lib/postgresql/*/bin/postgres"
NOBODY = "nobody"
"""PostgreSQL refuses to run as root."""


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """A server on loopback; its URL, as psycopg takes it."""
    binaries = Path(tool("postgresql", *sorted(map(str, Path("/").glob(INSTALLED)), reverse=True), "postgres")).parent
    with tempfile.TemporaryDirectory(prefix="samphire-postgres-") as folder:
        as_user: list[str] = []
        if os.getuid() == 0:
            user = pwd.getpwnam(NOBODY)
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        data, port = f"{folder}/data", choose_port(0, "")
        environment = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"], "HOME": folder}
        initdb = [*as_user, str(binaries / "initdb"), "-D", data, "-U", "samphire", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, env=environment, cwd=folder)
        command = [str(binaries / "postgres"), "-D", data, "-h", LOOPBACK, "-p", str(port), "-k", folder]
        with Path(folder, "log").open("wb") as log:
            server = subprocess.Popen(
                [*as_user, *bound([*command, "-c", "fsync=off"])], stdout=log, stderr=log, env=environment, cwd=folder
            )
        url = f"postgresql://samphire@{LOOPBACK}:{port}/postgres"
        try:
            eventually(lambda: _answers(url), 30, "PostgreSQL's answer")
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # at SIGTERM it would wait for its clients
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=5):
            return True
    except psycopg.OperationalError:
        return False
