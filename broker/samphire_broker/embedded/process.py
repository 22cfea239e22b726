"""A part of the stack: one supervised child process that never outlives its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESTART_DELAY_MIN_S = 0.5
RESTART_DELAY_MAX_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A part that has run this long starts again without delay when it dies."""


class PartError(Exception):
    """A part of the stack did not start."""


@dataclass(frozen=True)
class PartSpec:
    """What to run and how to tell that it works."""

    name: str
    command: Sequence[str]
    log_file: Path
    address: str
    wait_ready: Callable[[int], Awaitable[None]]
    """Called with the process id; returns when the part can do its work."""
    env: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 60.0
    stop_timeout_s: float = 15.0
    before_start: Callable[[], None] = lambda: None
    after_stop: Callable[[], None] = lambda: None


class Part:
    """One running part: started, awaited, restarted with backoff, stopped.

    The child gets SIGKILL from the kernel when the supervisor's main thread ends for any reason
    (`setpriv --pdeathsig`, prctl(2) PR_SET_PDEATHSIG), so not even kill -9 leaves it behind. The
    signal belongs to the thread that spawned, so parts are only started from the main thread.
    """

    def __init__(self, spec: PartSpec) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Process id of the running child; 0 before the first start."""
        return self.process.pid if self.process else 0

    async def start(self) -> None:
        """Start the child and wait until it is ready.

        Raises:
            PartError: it ended, or was not ready in time; the message holds the end of its log.
        """
        spec = self.spec
        if self.process is not None:
            await self._kill()  # a server that was killed may have left the processes of its models behind
        spec.before_start()
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise PartError("the command setpriv is missing: install the package util-linux")
        with spec.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                setpriv,
                "--pdeathsig",
                "KILL",
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.env},
                # An own group: Ctrl-C in the terminal reaches the supervisor alone, which stops in order.
                start_new_session=True,
            )
        ready = asyncio.ensure_future(spec.wait_ready(self.process.pid))
        ended = asyncio.ensure_future(self.process.wait())
        try:
            done, _ = await asyncio.wait(
                {ready, ended}, timeout=spec.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ready in done:
                try:
                    ready.result()
                except PartError:
                    raise
                except Exception as error:
                    raise PartError(f"{spec.name} is not ready: {error}") from error
                return
            reason = (
                f"ended with exit code {ended.result()}"
                if ended in done
                else f"was not ready within {spec.ready_timeout_s:.0f} s"
            )
            raise PartError(f"{spec.name} {reason}; the end of {spec.log_file}:\n{_tail(spec.log_file)}")
        finally:
            for waiter in (ready, ended):
                waiter.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await waiter

    async def keep_running(self, on_change: Callable[[str], None]) -> None:
        """Restart the child with backoff whenever it ends, for ever; `on_change` gets a line a time."""
        delay_s = RESTART_DELAY_MIN_S
        while True:
            assert self.process is not None
            started = time.monotonic()
            code = await self.process.wait()
            if time.monotonic() - started > HEALTHY_AFTER_S:
                delay_s = RESTART_DELAY_MIN_S
            on_change(f"{self.spec.name} ended (exit code {code}); restarting in {delay_s:.1f} s")
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RESTART_DELAY_MAX_S)
            try:
                await self.start()
            except PartError as error:
                on_change(str(error))
                await self._kill()
            else:
                on_change(f"{self.spec.name} is ready again (pid {self.pid})")

    async def stop(self, *, at_once: bool = False) -> None:
        """Ask the child to end (SIGTERM), wait, then kill its process group; `at_once` kills it without asking."""
        if self.process is None:
            return
        if self.process.returncode is None and not at_once:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.process.wait(), self.spec.stop_timeout_s)
        await self._kill()
        self.spec.after_stop()

    async def _kill(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


def _tail(path: Path, lines: int = 15) -> str:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 8192))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
