"""What running tasks give out, on its way into their logs: what came while a call was under way goes with the next.

So small outputs share an entry under load, and no timer makes any wait. An output is taken from the model only once
there is room for it here: a slow broker slows the model down, and fills no memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence

from samphire.errors import InternalError, SamphireError
from samphire.wire.outputs import StreamedTensor, encode_outputs
from samphire_broker.store import Appended, LogEntry, Store
from samphire_workers.intake.request import Request
from samphire_workers.repeat import persist

CALL_BYTES = 4 * 2**20
CALL_ENTRIES = 256
ENTRY_BYTES = 64 * 2**10
"""An entry takes no further output once it has so many."""
ENTRY_OUTPUTS = 256
PROGRESS_S = 0.1
"""Between two events of a task's progress: of those that come sooner the last one counts."""
_FIRST = 2
"""Number of the first event after the start of an attempt."""


class ClaimLostError(SamphireError):
    """The task is another worker's by now: nothing more of it is written here."""

    default_message = "The task is another worker's by now."


class OutputsLostError(SamphireError):
    """The broker has lost outputs that it had taken: the attempt cannot go on."""

    default_message = "The broker has lost outputs of this attempt: they are given out again."


class TaskLog:
    """The log of one attempt of a task, as its worker writes it.

    Args:
        writer: writes it.
        request: whose outputs these are.
        stop: called once nothing more is written, with the reason.
    """

    def __init__(self, writer: LogWriter, request: Request, stop: Callable[[SamphireError], None]) -> None:
        self._writer = writer
        self._request = request
        self._stop = stop
        self._waiting: list[Sequence[StreamedTensor]] = []
        self._waiting_bytes = 0
        self._progress: bytes | None = None
        self._progress_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        """Until the next progress may be told."""
        self._is_flushed = False
        self._next = _FIRST
        self._changed = asyncio.Event()
        """Something was written, or will not be."""
        self._under_way = False
        self._started_at = writer.now()
        self.outputs = 0
        """Written so far."""
        self.nbytes = 0
        self.error: SamphireError | None = None
        """Why nothing more is written."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits here."""
        return not self._waiting and self._progress is None

    async def output(self, tensors: Sequence[StreamedTensor], nbytes: int) -> None:
        """Take one output, once there is room for it.

        Raises:
            SamphireError: why nothing more is written.
        """
        while self._waiting_bytes >= ENTRY_BYTES or len(self._waiting) >= ENTRY_OUTPUTS:
            self._changed.clear()
            self._check()
            await self._changed.wait()
        self._check()
        self._waiting.append(tensors)
        self._waiting_bytes += nbytes
        self._writer.wants(self)

    def progress(self, fraction: float | None, message: str) -> None:
        """Tell how far the task is: `fraction` from 0 to 1, as far as it is known."""
        self._progress = json.dumps({"fraction": fraction, "message": message[:500]}).encode()
        if self._tells_progress():
            self._writer.wants(self)
        elif self._timer is None:
            left_s = max(0.0, self._progress_at + PROGRESS_S - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left_s, self._progress_is_due)

    def _progress_is_due(self) -> None:
        self._timer = None
        self._writer.wants(self)

    def _tells_progress(self) -> bool:
        is_due = self._is_flushed or time.monotonic() >= self._progress_at + PROGRESS_S
        return self._progress is not None and is_due

    async def flush(self) -> None:
        """Return once all that was taken is written; raises as `output` does."""
        self._is_flushed = True
        while not self.is_empty or self._under_way:
            self._changed.clear()
            self._check()
            self._writer.wants(self)
            await self._changed.wait()
        self._check()

    def close(self) -> None:
        """Write nothing more of what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting, self._waiting_bytes, self._progress = [], 0, None

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def take(self) -> LogEntry | None:
        """The next entry, all of whose events go together; None: there is none. `written` follows."""
        request = self._request
        if self.error is not None or self._under_way or not (self._waiting or self._tells_progress()):
            return None
        outputs, nbytes = self.outputs, self.nbytes
        if self._waiting:
            event, count, data = "output", len(self._waiting), encode_outputs(self._waiting)
            outputs, nbytes = outputs + count, nbytes + self._waiting_bytes
            self._waiting, self._waiting_bytes = [], 0
        else:
            assert self._progress is not None
            event, count, data = "progress", 1, self._progress
            self._progress, self._progress_at = None, time.monotonic()
        self._under_way = True
        entry = LogEntry(
            field=request.claim.field,
            task_id=request.task_id,
            started_at=round(self._started_at, 6),
            first=self._next,
            events=count,
            event=event,
            at=round(self._writer.now(), 6),
            outputs=outputs,
            nbytes=nbytes,
            data=data,
        )
        self._next += count
        return entry

    def written(self, entry: LogEntry, verdict: Appended) -> None:
        """What became of an entry."""
        self._under_way = False
        if verdict is Appended.WRITTEN:
            self.outputs, self.nbytes = entry.outputs, entry.nbytes
        elif verdict is Appended.LOST:
            self.fail(ClaimLostError())
        elif verdict is Appended.OUTPUTS_LOST:
            self.fail(OutputsLostError())
        else:
            self.fail(InternalError("the task's log cannot be written: a key of another type lies there"))
        self._changed.set()

    def fail(self, error: SamphireError) -> None:
        """Nothing more is written."""
        self.error = error
        self.close()
        self._stop(error)


class LogWriter:
    """Writes the logs of a lane's tasks, a batch after the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanting: dict[TaskLog, None] = {}
        self._some = asyncio.Event()

    def now(self) -> float:
        """The time by the broker's clock, in s since 1970."""
        return self._store.clock.now()

    def wants(self, log: TaskLog) -> None:
        """A log has something to write."""
        self._wanting[log] = None
        self._some.set()

    async def run(self) -> None:
        """Write what is wanted, for ever."""
        while True:
            await self._some.wait()
            self._some.clear()
            while taken := self._take():
                entries = [entry for _, entry in taken]
                verdicts = await persist(lambda entries=entries: self._store.append(entries))  # type: ignore[misc]
                for (log, entry), verdict in zip(taken, verdicts, strict=True):
                    log.written(entry, verdict)
                    if not log.is_empty:
                        self._wanting[log] = None

    def _take(self) -> list[tuple[TaskLog, LogEntry]]:
        taken: list[tuple[TaskLog, LogEntry]] = []
        nbytes = 0
        while self._wanting and len(taken) < CALL_ENTRIES and nbytes < CALL_BYTES:
            log = next(iter(self._wanting))
            del self._wanting[log]
            entry = log.take()
            if entry is not None:
                taken.append((log, entry))
                nbytes += len(entry.data)
        return taken
