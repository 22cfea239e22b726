"""The servers of a benchmark: the real stack, by the real command, on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import redis

from samphire.wire.keys import Keys
from samphire_broker.embedded.ports import choose_port
from samphire_broker.settings import shipped_model_repository

START_TIMEOUT_S = 120
STOP_S = 30
SAMPHIRE = str(Path(sys.executable).parent / "samphire")
PORT_FLAGS = ("--broker-port", "--triton-grpc-port", "--triton-http-port", "--triton-metrics-port", "--flower-port")

TICKER = Path(__file__).parent / "models" / "ticker"
"""A model that ships with the benchmarks only."""

Figures = dict[str, float]


@dataclass(frozen=True)
class BenchStack:
    """Addresses and process ids of a running stack."""

    broker_url: str
    triton_grpc: str
    broker_pid: int
    worker_pid: int
    data_dir: Path
    webhook_ports: tuple[int, ...] = ()
    """Where webhooks may go on loopback."""

    @property
    def keys(self) -> Keys:
        """The keys of the deployment."""
        return Keys()

    def redis(self) -> redis.Redis:
        """A client of the broker."""
        return redis.Redis.from_url(self.broker_url, socket_timeout=60)

    @contextlib.contextmanager
    def worker_stopped(self) -> Iterator[None]:
        """The worker stands still meanwhile."""
        with standing_still([self.worker_pid]):
            yield


@contextlib.contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """These processes do nothing meanwhile: one goes on for a moment after SIGSTOP, which is waited for."""
    processes = [psutil.Process(pid) for pid in pids]
    try:
        for process in processes:
            process.suspend()
        until = time.monotonic() + STOP_S
        while any(process.status() != psutil.STATUS_STOPPED for process in processes):
            assert time.monotonic() < until, f"not all of {processes} stand still"
            time.sleep(0.001)
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@contextlib.contextmanager
def bench_stack(fsync: str) -> Iterator[BenchStack]:
    """Run `samphire up` with one worker; stopped at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAMPHIRE_")}
    ports = (choose_port(0, ""), choose_port(0, ""))
    environment |= {
        "SAMPHIRE_WEBHOOK_SCHEMES": "http",
        "SAMPHIRE_WEBHOOK_PORTS": ",".join(map(str, ports)),
        "SAMPHIRE_WEBHOOK_ALLOW_PRIVATE": "true",
    }
    known = subprocess.run([SAMPHIRE, "up", "--help"], capture_output=True, text=True, env=environment, check=True)
    with tempfile.TemporaryDirectory(prefix="samphire-bench-") as folder:
        ready_file = Path(folder) / "ready.json"
        command = ["setpriv", "--pdeathsig", "TERM", SAMPHIRE, "up", "--data-dir", f"{folder}/data"]
        command += ["--ready-file", str(ready_file), "--broker-fsync", fsync, "--broker-memory", "8gb"]
        models = Path(folder) / "models"
        shutil.copytree(shipped_model_repository(), models)
        shutil.copytree(TICKER, models / TICKER.name)
        command += ["--model-repository", str(models)]
        for flag in PORT_FLAGS:
            if flag in known.stdout:  # a version that is compared with may have no Flower
                command += [flag, "0"]
        with (Path(folder) / "output").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not ready_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the stack did not start:\n{(Path(folder) / 'output').read_text()}")
                time.sleep(0.1)
            ready = json.loads(ready_file.read_text())
            pids = ready["pids"]
            data_dir = Path(folder) / "data"
            pid = pids["worker"][0]
            yield BenchStack(ready["broker_url"], ready["triton_grpc"], pids["broker"], pid, data_dir, ports)
        finally:
            process.terminate()
            process.wait()


def drain_rate(count: int, left: Callable[[], int]) -> float:
    """Tasks a second from now on, until none of `count` is left; what comes before the first twentieth does not count.

    A backlog that is gone before it was looked at is one that took the time of the look.
    """
    began, begun = time.perf_counter(), count
    while (now := left()) > count * 0.95:
        time.sleep(0.005)
    if now > count / 2:
        began, begun = time.perf_counter(), now
    while left():
        time.sleep(0.005)
    return begun / (time.perf_counter() - began)


class Memory:
    """The most that a process has held, while it runs as a context."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most_mb = 0.0

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.most_mb = max(self.most_mb, self._process.memory_info().rss / 2**20)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
