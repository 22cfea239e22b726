"""Handles of tasks that were submitted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Literal, overload

from samphire.client.detail import TaskDetail, detail_of
from samphire.client.events import TaskEvent
from samphire.client.following import Following
from samphire.client.results import TERMINAL, InferResult, Status
from samphire.client.session import Session
from samphire.client.streams import Outputs, Resume, last_progress, with_outputs
from samphire.client.waiter import LOOK_MAX_S, LOOK_MIN_S, Look
from samphire.errors import BrokerMemoryFullError, BrokerUnavailableError, ResultTimeoutError, UnknownTaskError

CANCEL_AGAIN_S = 1.0
"""Between two requests to cancel a task that has not been answered."""


class AsyncTask:
    """A handle of one submitted task."""

    def __init__(self, session: Session, task_id: str, look: Look) -> None:
        self._session = session
        self._look: Look = look
        self.id = task_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @overload
    async def status(self, *, detail: Literal[False] = False) -> Status: ...

    @overload
    async def status(self, *, detail: Literal[True]) -> TaskDetail: ...

    async def status(self, *, detail: bool = False) -> Status | TaskDetail:
        """The task's state; a task that nobody knows counts as queued, as in Celery.

        Args:
            detail: tell why it is not done too: its place in the queue, what its model lacks, who holds it.
        """
        self._session.check_usable()
        if detail:
            return await detail_of(self._session, self.id)
        return await self._session.waiter.status(self.id)

    async def result(self, timeout_s: float | None = None, *, delete: bool = False) -> InferResult:
        """Wait for the result; the outputs of a model that streams are joined along their first dimension.

        Args:
            timeout_s: how long; for ever by default.
            delete: the result is deleted once it was read; a later read raises `ResultDeletedError`. Should the
                broker go away meanwhile, it stays until its lifetime is over.

        Raises:
            ResultTimeoutError: it did not come within `timeout_s`; the task goes on.
            ResultExpiredError: the task has ended, and its result's lifetime is over; or the log has not all outputs of
                a stream any more, and it was submitted without `collect`.
            SamphireError: what the task ended with.
        """
        look = self._take_look()
        result = await self._session.result(self.id, timeout_s, look)
        if result.output_count and not result.outputs:
            result = await with_outputs(self._session, result)
        if delete:
            # The caller must not lose the result because nobody hears that it may go: then it goes with its lifetime.
            with contextlib.suppress(BrokerUnavailableError, BrokerMemoryFullError):
                await self._session.publisher.request(self._session.broker.keys.deletes, self.id)
        return result

    def _take_look(self) -> Look:
        look = self._look
        if isinstance(look, int):
            self._look = "now"  # its end may have been told to the first who asked
        return look

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

    async def progress(self) -> TaskEvent | None:
        """The last `progress` that the task has told, if its model tells any and the log has it yet."""
        self._session.check_usable()
        return await last_progress(self._session, self.id)

    async def events(self, after: str | None = None) -> AsyncGenerator[TaskEvent, None]:
        """What happens to the task, as it happens, until it has ended; the last event is its end.

        A task that neither streams nor is followed has no log: then the first event is a `snapshot` of its state, and
        from there on nothing is left out. What a log has no more is told by a `gap`. A reader that was cut off goes on
        after the position of the last event that it has handled, here or in another process.

        Args:
            after: `position` of the last event that the caller knows; None: the beginning.

        Raises:
            InvalidInputError: `after` is no position of this task's.
            UnknownTaskError: nobody knows the task of a position any more.
            BrokerUnavailableError: the broker is away for long; go on after the last position.
        """
        self._session.check_usable()
        following = Following(self._session, self.id, after, self._take_look())
        async with contextlib.aclosing(following.events()) as events:
            async for event in events:
                yield event

    async def stream(self, after: str | None = None, *, resume: Resume = "restart") -> AsyncGenerator[TaskEvent, None]:
        """The outputs of a model that streams, as they come; ends when the task has succeeded.

        Of the events of the task it gives every `output`, `restarted` where outputs begin anew in another attempt, and
        `gap` where some are not there any more; `begins_anew` tells that what came before is void.

        Args:
            after: as for `events`.
            resume: "skip": of an attempt that begins anew what was given out already is left out, once it is seen to be
                the same; for models that are deterministic.

        Raises:
            StreamDiffersError: with "skip", another attempt has other outputs.
            SamphireError: what the task has ended with, or as `events`.
        """
        self._session.check_usable()
        outputs = Outputs(self._session, self.id, after, self._take_look(), resume)
        async with contextlib.aclosing(outputs.events()) as events:
            async for event in events:
                yield event
