"""Real servers for tests: each on its own ports, in its own folder and process group, always stopped."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import redis

from samphire_broker.embedded.ports import choose_port
from samphire_broker.embedded.valkey import server_binary
from samphire_broker.settings import shipped_model_repository

SAMPHIRE = str(Path(sys.executable).parent / "samphire")
TEST_MODELS = Path(__file__).parent / "models"

JOINED = {
    "SAMPHIRE_MICRO_BATCH": json.dumps(dict.fromkeys(("deadly", "flaky", "picky", "slow", "versions"), True)),
}
"""The test models that are joined although their configs do not say so: Triton itself is to join nothing of theirs."""


ENDS_S = 900
"""For a process that ends by itself: only one that hangs takes so long, however busy the machine."""

PATIENCE = 4.0
"""How many times longer than on an idle machine to wait: other tests, and other people's work, run beside."""


def need_servers() -> None:
    """Skip for a person, fail in CI, where the embedded servers cannot run."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        return
    message = "the embedded servers need Linux on x86-64"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def bound(command: list[str], end: Literal["TERM", "KILL"] = "TERM") -> list[str]:
    """The command as one that ends with this process, whatever ends it: a killed test run leaves no server behind.

    TERM is for what has children of its own to stop; a server that stands still just then takes nothing but KILL.
    """
    return ["setpriv", "--pdeathsig", end, *command]


def clean_environment() -> dict[str, str]:
    """The environment without what would redirect a stack."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SAMPHIRE_")}


def eventually(check: Callable[[], Any], timeout_s: float = 30.0, what: str = "the condition") -> Any:
    """Return the first true value of `check`; give up when it is not true after `timeout_s` times `PATIENCE`."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while True:
        if value := check():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout_s * PATIENCE:.0f} s")
        time.sleep(0.02)


def samphire(broker_url: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the `samphire` command on a broker; whatever happens, it shows no traceback."""
    ended = subprocess.run(
        [SAMPHIRE, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
        env=clean_environment() | {"SAMPHIRE_BROKER_URL": broker_url},
    )
    assert "Traceback" not in ended.stderr
    return ended


@dataclass
class Valkey:
    """A running server."""

    url: str
    client: redis.Redis
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_valkey(folder: Path, *options: str, port: int = 0, before: Sequence[str] = ()) -> Iterator[Valkey]:
    """A Valkey of its own, append-only like the stack's; `before` stands before its command."""
    need_servers()
    folder.mkdir(parents=True, exist_ok=True)
    port = choose_port(port, "")
    command = [*before, server_binary(), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", *options]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(bound(command, "KILL"), stdout=log, stderr=log, start_new_session=True)
    client = redis.Redis(port=port, socket_timeout=10)
    try:
        eventually(lambda: _answers(client), 10, "the broker's answer")
        yield Valkey(f"redis://127.0.0.1:{port}/0", client, process)
    finally:
        client.close()
        with contextlib.suppress(ProcessLookupError):  # the test may have ended it
            os.killpg(process.pid, signal.SIGTERM)  # what stands before its command may wait for it
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@dataclass
class Up:
    """A running `samphire up`."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    data_dir: Path
    output: Path

    @property
    def ready(self) -> dict[str, Any]:
        """What the ready file says now."""
        content: dict[str, Any] = json.loads(self.ready_file.read_text())
        return content

    @property
    def broker_url(self) -> str:
        url: str = self.ready["broker_url"]
        return url

    @property
    def triton_grpc(self) -> str:
        address: str = self.ready["triton_grpc"]
        return address

    def redis(self) -> redis.Redis:
        """A client of the stack's broker."""
        return redis.Redis.from_url(self.broker_url, socket_timeout=10)

    def children(self) -> list[psutil.Process]:
        """Every process of the stack but `up` itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def commands(self) -> dict[psutil.Process, str]:
        """The command line of each; one that has ended since is left out."""
        found = {}
        for process in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[process] = " ".join(process.cmdline())
        return found

    def worker_log(self) -> str:
        return (self.data_dir / "logs" / "worker1.log").read_text()


def stand_still(pid: int) -> None:
    """Stop a process until SIGCONT, and wait for that: its other threads go on until one has taken the signal."""
    process = psutil.Process(pid)
    process.suspend()
    eventually(lambda: process.status() == psutil.STATUS_STOPPED, 5, "the stop")


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile, and goes on afterwards."""
    try:
        stand_still(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def model_repository(folder: Path) -> Path:
    """The shipped models and those of the tests, in one repository."""
    shutil.copytree(shipped_model_repository(), folder, dirs_exist_ok=True)
    shutil.copytree(TEST_MODELS, folder, dirs_exist_ok=True)
    return folder


def only(folder: Path, *models: str) -> tuple[str, str]:
    """The option of `samphire up` that serves these models alone: a start takes about a second a model."""
    for name in models:
        source = shipped_model_repository() / name
        shutil.copytree(source if source.is_dir() else TEST_MODELS / name, folder / "only" / name)
    return "--model-repository", str(folder / "only")


def start_up(
    folder: Path,
    *options: str,
    data_dir: Path | None = None,
    env: dict[str, str] | None = None,
    samphire: str | Path = SAMPHIRE,
) -> Up:
    """Start `samphire up` on free ports, without waiting; `samphire` is the command of another environment."""
    need_servers()
    folder.mkdir(parents=True, exist_ok=True)
    ready_file, output = folder / "ready.json", folder / "output"
    data_dir = data_dir or folder / "data"
    command = [str(samphire), "up", "--data-dir", str(data_dir), "--ready-file", str(ready_file), "--ports", "free"]
    with output.open("wb") as out:
        process = subprocess.Popen(
            bound([*command, *options]),
            stdout=out,
            stderr=out,
            env={**clean_environment(), **JOINED, **(env or {})},
            start_new_session=True,
        )
    return Up(process, ready_file, data_dir, output)


@contextlib.contextmanager
def running_stack(
    folder: Path,
    *options: str,
    data_dir: Path | None = None,
    env: dict[str, str] | None = None,
    samphire: str | Path = SAMPHIRE,
) -> Iterator[Up]:
    """A whole stack, as `start_up` starts it; stopped at the end, whatever happened.

    A worker that does not come to its end has lost sight of something that it began: no test may leave that.
    """
    up = start_up(folder, *options, data_dir=data_dir, env=env, samphire=samphire)
    try:
        eventually(lambda: up.ready_file.exists() or up.process.poll() is not None, 120, "the ready file")
        assert up.process.poll() is None, up.output.read_text()
        yield up
    finally:
        ended = stop(up)
    assert ended, up.output.read_text()[-5000:]
    for log in (up.data_dir / "logs").glob("worker*.log"):
        assert "the lane did not end in time" not in log.read_text(), log.read_text()[-5000:]


def stop(up: Up, number: int = signal.SIGTERM) -> bool:
    """End `samphire up` with a signal, or by force; whether the signal was enough."""
    if up.process.poll() is None:
        up.process.send_signal(number)
        try:
            up.process.wait(100)
        except subprocess.TimeoutExpired:
            up.process.kill()
            up.process.wait()
            return False
    return True
