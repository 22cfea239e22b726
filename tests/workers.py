"""Real Celery workers of a test's own, beside a stack's Triton."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.stacks import JOINED, clean_environment, eventually

CELERY = str(Path(sys.executable).parent / "celery")


@dataclass
class RunningWorker:
    """A worker's process and what it writes."""

    process: subprocess.Popen[bytes]
    path: Path

    def log(self) -> str:
        return self.path.read_text(errors="replace")


@contextlib.contextmanager
def running_worker(
    folder: Path, broker_url: str, triton_grpc: str, *, before: Sequence[str] = (), **settings: str
) -> Iterator[RunningWorker]:
    """A worker that is ready.

    Args:
        folder: for its log; its name is the worker's.
        broker_url, triton_grpc: what it works for.
        before: a command that runs the worker.
        settings: SAMPHIRE_ variables, in lower case and without the prefix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "worker.log"
    environment = (
        clean_environment() | JOINED | {"SAMPHIRE_BROKER_URL": broker_url, "SAMPHIRE_TRITON_URLS": triton_grpc}
    )
    environment |= {f"SAMPHIRE_{name.upper()}": value for name, value in settings.items()}
    command = [*before, CELERY, "-A", "samphire_workers.app", "worker", "--loglevel", "INFO", "-n", f"{folder.name}@%h"]
    with path.open("ab") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)
    worker = RunningWorker(process, path)
    try:
        eventually(lambda: process.poll() is not None or " ready." in worker.log(), 60, "the worker's start")
        assert process.poll() is None, worker.log()
        yield worker
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
