"""The servers of a benchmark: the real stack, by the real command, on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class BenchStack:
    """Addresses and process ids of a running stack."""

    broker_url: str
    triton_grpc: str
    broker_pid: int
    worker_pid: int

    def redis(self) -> redis.Redis:
        """A client of the broker."""
        return redis.Redis.from_url(self.broker_url, socket_timeout=60)


@contextlib.contextmanager
def bench_stack(fsync: str) -> Iterator[BenchStack]:
    """Run `samphire up` with one worker; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="samphire-bench-") as folder:
        ready_file = Path(folder) / "ready.json"
        command = [str(Path(sys.executable).parent / "samphire"), "up", "--data-dir", f"{folder}/data"]
        command += ["--ready-file", str(ready_file), "--broker-fsync", fsync, "--broker-memory", "8gb"]
        for flag in (
            "--broker-port",
            "--triton-grpc-port",
            "--triton-http-port",
            "--triton-metrics-port",
            "--flower-port",
        ):
            command += [flag, "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SAMPHIRE_")}
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
            yield BenchStack(ready["broker_url"], ready["triton_grpc"], pids["broker"], pids["worker"][0])
        finally:
            process.terminate()
            process.wait()
