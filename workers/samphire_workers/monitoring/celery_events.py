"""Celery task events for Flower and other monitors, sent beside the lane and never in its way.

Monitors saturate at a few thousand events a second, so the rate is capped: of a busy lane's successes a
sample is shown, each with all of its events. Failures are always sent, and so is the end of whatever a monitor has
seen begin: of tasks whose sending their producer has told, and of those that were started before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError
from msgspec import UNSET, UnsetType

from samphire.errors import SamphireError
from samphire.wire.timings import Timings
from samphire_workers.monitoring.observers import Observer, TaskSeen
from samphire_workers.monitoring.sent import End, SentTasks

logger = logging.getLogger(__name__)

FLUSH_S = 0.25
EVENTS_A_TASK = 3
LATE_ENDS_A_FLUSH = 500
"""Ends of tasks whose sending was told, beyond the cap: 2,000 a second."""
PROGRESS_S = 1.0
BUFFER_MAX = 20_000
"""Events kept while the broker is away; later ones are dropped, for a monitor's sake nothing waits. Ends have as much
room again."""


class CeleryEvents(Observer):
    """Task events through Celery's own EventDispatcher, from a thread of their own."""

    def __init__(self, app: Celery, hostname: str, events_per_s: int) -> None:
        self._app = app
        self._hostname = hostname
        self._rate = events_per_s
        self._tokens = float(events_per_s)
        self._refilled = time.monotonic()
        self._shown: set[str] = set()
        """Claims whose events are sent."""
        self._progress_at: dict[str, float] = {}
        """When their last progress was told."""
        self._buffer: list[tuple[str, dict[str, Any]]] = []
        self._dispatcher: Any = None
        self._sent = SentTasks(app)
        self.enabled = True

    def started(self, tasks: Sequence[TaskSeen]) -> None:
        """These begin to run: shown if the cap allows."""
        for task in tasks:
            worker_state.total_count[task.name] += 1  # what `inspect stats` tells
            if not self._may_show() and not task.attempts:  # what a lost worker had started was shown, perhaps
                continue
            self._shown.add(task.claim)
            self._received(task)
            self._add("task-started", task.task_id)

    def progress(self, task: TaskSeen, fraction: float | None, message: str) -> None:
        """A running task tells how far it is: shown in the place of its result, each at most once a second."""
        now = time.monotonic()
        if task.claim in self._shown and now - self._progress_at.get(task.claim, 0.0) >= PROGRESS_S:
            self._progress_at[task.claim] = now
            told = " ".join([*([f"{fraction:.0%}"] if fraction is not None else []), message])
            # A state of its own would hide a later retry or cancellation: Celery puts unknown states above these.
            self._add("task-started", task.task_id, result=told)

    def succeeded(self, tasks: Sequence[TaskSeen], timings: Sequence[Timings | UnsetType]) -> None:
        """These have their answers: where the time of each went is shown in the place of its result."""
        now = time.time()
        for task, times in zip(tasks, timings, strict=True):
            runtime = now - (task.started_at or now)
            if self._was_shown(task):
                told = "" if times is UNSET else str(times)
                self._add("task-succeeded", task.task_id, last=True, result=told, runtime=runtime)
            elif self.enabled:
                self._sent.ended(task.task_id, End(now, runtime, times))

    def dropped(self, task: TaskSeen) -> None:
        """A task is not this worker's any more: it goes back to its queue, and whoever ends it is to tell its end."""
        if self._was_shown(task):
            self._add("task-sent", task.task_id, name=task.name, queue=task.list_key)

    def released(self, task: TaskSeen) -> None:
        """A task goes back to its queue: whoever ends it is to tell its end."""
        self.dropped(task)

    def failed(self, task: TaskSeen, error: SamphireError, reason: str) -> None:
        """A task ends as a dead letter: always shown."""
        self._went_wrong("task-failed", task, error)

    def retried(self, task: TaskSeen, error: SamphireError) -> None:
        """An attempt failed; the task will be tried again: always shown."""
        self._went_wrong("task-retried", task, error)

    def revoked(self, task: TaskSeen, expired: bool) -> None:
        """A task was cancelled, or has expired: always shown."""
        if not self._was_shown(task):
            self._received(task)
        terminated = task.started_at is not None
        self._add("task-revoked", task.task_id, last=True, terminated=terminated, signum=None, expired=expired)

    def cancelled(self, task_id: str) -> None:
        """A task is cancelled whose message lies in a queue: always shown."""
        self._add("task-revoked", task_id, last=True, terminated=False, signum=None, expired=False)

    async def run(self) -> None:
        """Send what there is every quarter of a second, for ever."""
        try:
            self._sent.listen()
            with ThreadPoolExecutor(1, thread_name_prefix="samphire-events") as thread:
                while True:
                    await asyncio.sleep(FLUSH_S)
                    for task_id, end in self._sent.take(LATE_ENDS_A_FLUSH):
                        told = "" if end.timings is UNSET else str(end.timings)
                        self._add(
                            "task-succeeded", task_id, last=True, timestamp=end.at, result=told, runtime=end.runtime_s
                        )
                    if self._buffer:
                        await self._flush(thread)
        except RuntimeError as error:
            logger.warning(
                "no task events are sent any more, so Flower shows none of this worker; tasks go on: %s",
                error,
                extra={"action": "events_failed"},
            )
        finally:
            self._sent.stop()
            self._close()

    async def _flush(self, thread: ThreadPoolExecutor) -> None:
        buffer, self._buffer = self._buffer, []
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._send, buffer)
        except RuntimeError as error:  # no thread to be had: a monitor is not worth a lane
            logger.warning(
                "task events were not sent, so Flower does not show some tasks; they go on: %s",
                error,
                extra={"action": "events_failed"},
            )

    def _went_wrong(self, kind: str, task: TaskSeen, error: SamphireError) -> None:
        if not task.task_id:
            return
        if not self._was_shown(task):
            self._received(task)
        self._add(
            kind, task.task_id, last=True, exception=f"{type(error).__name__}({str(error)[:500]!r})", traceback=""
        )

    def _was_shown(self, task: TaskSeen) -> bool:
        """Whether a task's earlier events were sent; this is its last."""
        shown = task.claim in self._shown
        self._shown.discard(task.claim)
        self._progress_at.pop(task.claim, None)
        if shown:
            self._sent.shown(task.task_id)
        return shown

    def _may_show(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._rate, self._tokens + (now - self._refilled) * self._rate)
        self._refilled = now
        if self._tokens < EVENTS_A_TASK:
            return False
        self._tokens -= EVENTS_A_TASK
        return True

    def _received(self, task: TaskSeen) -> None:
        headers = task.headers
        self._add(
            "task-received",
            task.task_id,
            name=task.name,
            args="()",
            kwargs=task.described(),
            root_id=headers.root_id if headers else None,
            parent_id=headers.parent_id if headers else None,
            retries=task.attempts,
            eta=headers.eta if headers else None,
            expires=headers.expires if headers else None,
        )

    def _add(self, kind: str, task_id: str, *, last: bool = False, **fields: Any) -> None:
        if self.enabled and len(self._buffer) < BUFFER_MAX * (2 if last else 1):
            self._buffer.append((kind, {"uuid": task_id, "timestamp": time.time(), **fields}))

    def _send(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        try:
            if self._dispatcher is None:
                self._dispatcher = self._app.events.Dispatcher(
                    self._app.connection_for_write(),
                    hostname=self._hostname,
                    buffer_group={"task"},
                    buffer_limit=1000,
                )
            for kind, fields in events:
                if kind == "task-sent":  # in a batch, as the others go, other workers would not hear it
                    self._dispatcher.flush(errors=False)
                    self._dispatcher.publish(kind, fields, self._dispatcher.producer)
                else:
                    self._dispatcher.send(kind, **fields)
            self._dispatcher.flush(errors=False)
        except (OperationalError, OSError) as error:
            logger.warning(
                "task events were not sent, so Flower does not show some tasks; they go on: %s",
                error,
                extra={"action": "events_failed"},
            )
            self._close()

    def _close(self) -> None:
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            with contextlib.suppress(Exception):
                dispatcher.close()
                dispatcher.connection.release()
