"""Handles of tasks that were submitted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from samphire.client.results import TERMINAL, InferResult, Status
from samphire.client.session import Session
from samphire.client.waiter import LOOK_MAX_S, LOOK_MIN_S, Look
from samphire.errors import BrokerMemoryFullError, BrokerUnavailableError, ResultTimeoutError, UnknownTaskError

CANCEL_AGAIN_S = 1.0
"""Between two requests to cancel a task that has not been answered."""


@dataclass(frozen=True)
class TaskEvent:
    """A state that a task was seen in."""

    task_id: str
    status: Status
    at: float
    """When it was seen, in s since 1970."""


class AsyncTask:
    """A handle of one submitted task."""

    def __init__(self, session: Session, task_id: str, look: Look) -> None:
        self._session = session
        self._look: Look = look
        self.id = task_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    async def status(self) -> Status:
        """The task's state; a task that nobody knows counts as queued, as in Celery."""
        self._session.check_usable()
        return await self._session.waiter.status(self.id)

    async def result(self, timeout_s: float | None = None, *, delete: bool = False) -> InferResult:
        """Wait for the result.

        Args:
            timeout_s: how long; for ever by default.
            delete: the result is deleted once it was read; a later read raises `ResultDeletedError`. Should the
                broker go away meanwhile, it stays until its lifetime is over.

        Raises:
            ResultTimeoutError: it did not come within `timeout_s`; the task goes on.
            ResultExpiredError: the task has ended, and its result's lifetime is over.
            SamphireError: what the task ended with.
        """
        look = self._look
        if isinstance(look, int):
            self._look = "now"  # its end may have been told to the first who asked
        result = await self._session.result(self.id, timeout_s, look)
        if delete:
            # The caller must not lose the result because nobody hears that it may go: then it goes with its lifetime.
            with contextlib.suppress(BrokerUnavailableError, BrokerMemoryFullError):
                await self._session.publisher.request(self._session.broker.keys.deletes, self.id)
        return result

    async def cancel(self, timeout_s: float = 5.0) -> bool:
        """End the task, whether it is queued, scheduled or running; whether it has ended so.

        A running request is cancelled at Triton when every member of its micro-batch is; otherwise its answer is
        dropped. The error of `result` says which it was. A task that has ended before is left as it is: then the
        answer is False.

        Raises:
            UnknownTaskError: it is nowhere; nothing was changed. Where thousands of messages are queued nobody looks
                for it, and an id is believed.
            ResultTimeoutError: the task has not ended within `timeout_s`; the request stands.
        """
        session = self._session
        session.check_usable()
        request = f"{session.stream} {self.id}"
        await session.publisher.request(session.broker.keys.cancels, request)
        asked_at, interval_s = time.monotonic(), LOOK_MIN_S
        try:
            async with asyncio.timeout(timeout_s):
                while (status := await self.status()) not in TERMINAL:
                    is_stored = status not in ("queued", "scheduled")
                    answer = "" if is_stored else await session.waiter.cancel_answer(self.id)
                    if answer == "unknown":
                        raise UnknownTaskError(f"no task {self.id} is queued, scheduled, running or ended")
                    if answer in TERMINAL:  # before, and its result has expired
                        return answer == "cancelled"
                    if time.monotonic() - asked_at >= CANCEL_AGAIN_S:  # the worker that took it up may have died
                        await session.publisher.request(session.broker.keys.cancels, request)
                        asked_at = time.monotonic()
                    await asyncio.sleep(interval_s)
                    interval_s = min(interval_s * 1.2, LOOK_MAX_S)
        except TimeoutError as error:
            message = f"task {self.id} has not ended within {timeout_s} s of its cancellation; the request stands"
            raise ResultTimeoutError(message) from error
        return status == "cancelled"

    async def events(self, after: Status | None = None) -> AsyncIterator[TaskEvent]:
        """The task's states as they are seen, until it has ended; a state that passes between two looks is not seen.

        Args:
            after: begin once the task is seen in another state than this one, the last that the caller knows.
        """
        last, interval_s = after, LOOK_MIN_S
        while True:
            status = await self.status()
            if status != last:
                last, interval_s = status, LOOK_MIN_S
                yield TaskEvent(self.id, status, time.time())
            if status in TERMINAL:
                return
            await asyncio.sleep(interval_s)
            interval_s = min(interval_s * 1.2, LOOK_MAX_S)
