"""Following one task: its log from a position on, with a word on what is not there any more, until its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import get_args

from samphire.client.events import STATUS_AFTER, EventKind, TaskEvent
from samphire.client.log_reader import Bounds, Entry, Follower
from samphire.client.results import TERMINAL, InferResult, Status, streamed_array
from samphire.client.session import Session
from samphire.client.waiter import Look
from samphire.errors import (
    BrokerRightError,
    ProtocolError,
    ResultExpiredError,
    SamphireError,
    UnknownTaskError,
)
from samphire.wire.outputs import decode_outputs
from samphire.wire.positions import ATTEMPTS, BEGINNING, Place, parse_position

LOOK_S = 5.0
"""A reader that hears nothing looks after this long."""


class Following:
    """One reader of one task's log.

    Args:
        session: of the client.
        task_id: whose log.
        after: position to begin after; None: the beginning.
        look: how its end is looked for.
        all_events: a task without a log is to get one; else it has one only once it streams.

    Raises:
        InvalidInputError: `after` is no position of this task's.
    """

    def __init__(
        self, session: Session, task_id: str, after: str | None, look: Look, *, all_events: bool = True
    ) -> None:
        self._session = session
        self._all_events = all_events
        self._logs = session.logs
        self._task_id = task_id
        self._look = look
        self._epoch = ""
        """That positions are of now."""
        self._place = BEGINNING
        """Of the last event that was given out, or from which on the next one is looked for."""
        self._last_position = after
        """Position of the last event that was given out, or that the caller knows; None after a gap that voids it."""
        self._has_ended = False
        """The last entry that was read is an end."""
        self._is_over = False
        self._snapshot_of: Status | None = None
        """The state that was told since there was no log."""
        self._ending: asyncio.Future[InferResult]
        """Its end, as the client hears of it."""
        self._wake: Callable[[object], None]
        if after is not None:
            self._epoch, self._place = parse_position(task_id, after)

    async def events(self) -> AsyncGenerator[TaskEvent, None]:
        """The events, as `AsyncTask.events` says."""
        follower = self._logs.follow(self._task_id)
        self._wake = lambda _: follower.heard.set()
        self._expect(self._look)
        try:
            async for event in self._opened():
                yield event
            while not self._is_over:
                async for event in self._page(follower):
                    yield event
        finally:
            self._logs.forget(self._task_id, follower)
            self._expect_no_more()

    def _expect(self, look: Look) -> None:
        self._ending = self._session.waiter.expect(self._task_id, look)
        self._ending.add_done_callback(self._wake)

    def _expect_no_more(self) -> None:
        self._ending.remove_done_callback(self._wake)
        self._session.waiter.forget([self._task_id])

    async def _page(self, follower: Follower) -> AsyncGenerator[TaskEvent, None]:
        """What is there to read; where there is nothing, wait until there may be, or see that it is over."""
        follower.heard.clear()
        has_result = self._ending.done()  # before the log is read: what has ended it is in the log then
        epoch, entries = self._epoch, follower.take(self._epoch, self._place)
        if not entries:
            epoch, entries = await self._logs.read(self._task_id, self._place)
        if epoch != self._epoch:
            async for event in self._in_another_epoch(epoch):
                yield event
        elif entries:
            for entry in entries:
                async for event in self._events_in(entry):
                    yield event
            self._has_ended = entries[-1].event in TERMINAL  # another run may have begun: it is read again
        else:
            self._is_over = self._has_ended or has_result
            nothing = self._waited(follower.heard) if not self._is_over else self._end_elsewhere()
            async for event in nothing:
                yield event

    # -- where the log begins -----------------------------------------------------------------------

    async def _opened(self) -> AsyncGenerator[TaskEvent, None]:
        """What a reader has to know before the first event."""
        epoch, bounds = await self._logs.bounds(self._task_id)
        if self._last_position is None:
            self._epoch = epoch
            if bounds is None and self._all_events:
                yield await self._snapshot()
        elif bounds is None and self._place.attempt == 0 and self._place.seq <= 1:  # of a task that had no log
            self._has_ended = self._place.seq == 1 and await self._status() in TERMINAL
            self._epoch, self._place, self._last_position = epoch, BEGINNING, None
            if not self._has_ended:
                await self._ask_for_log()
        elif bounds is None and await self._status() == "queued":
            raise UnknownTaskError(f"no task {self._task_id} is queued, scheduled, running or ended, and it has no log")
        elif epoch == self._epoch:
            async for event in self._seen_to_be_there(bounds):
                yield event
            is_last = bounds is not None and self._place == bounds[1].place
            self._has_ended = is_last and bounds is not None and bounds[1].event in TERMINAL

    async def _seen_to_be_there(self, bounds: Bounds) -> AsyncGenerator[TaskEvent, None]:
        """A gap where the log is gone, or was rolled back behind what was read of it."""
        if self._last_position is None:
            return
        if bounds is None:
            yield await self._gone(self._last_position)
        elif self._place > bounds[1].place:
            yield await self._begun_anew(self._last_position, *bounds)

    async def _in_another_epoch(self, epoch: str) -> AsyncGenerator[TaskEvent, None]:
        """The broker was restarted, and may have lost what was read: it may stand for something else by now."""
        self._epoch, told = epoch, self._last_position
        if told is None:
            self._place = BEGINNING
            return
        _, bounds = await self._logs.bounds(self._task_id)
        yield await (self._gone(told) if bounds is None else self._begun_anew(told, *bounds))

    async def _begun_anew(self, requested: str, first: Entry, last: Entry) -> TaskEvent:
        self._place, self._last_position = BEGINNING, None
        event = await self._gap(requested, first, last, begins_anew=True)
        self._place = first.before  # what is missing before the first is told already
        return event

    async def _gone(self, requested: str) -> TaskEvent:
        """The log is not there: a gap, and from there on what is written yet."""
        status = await self._status()
        self._place, self._last_position = BEGINNING, None
        if status not in TERMINAL:
            await self._ask_for_log()
        return self._made("gap", BEGINNING, status, requested=requested, begins_anew=True)

    async def _snapshot(self) -> TaskEvent:
        status = await self._status()
        if status not in TERMINAL:
            await self._ask_for_log()
        self._snapshot_of = status
        return self._made("snapshot", Place(ATTEMPTS, 0), status)

    async def _ask_for_log(self) -> None:
        if not self._all_events:
            return
        with contextlib.suppress(BrokerRightError):  # its end is seen all the same
            await self._logs.request_follow(self._task_id)

    async def _gap(self, requested: str | None, first: Entry, last: Entry, *, begins_anew: bool) -> TaskEvent:
        begin = Place(first.place.major, first.place.seq - first.events + 1)
        return self._made(
            "gap",
            self._place,
            await self._status(),
            requested=requested,
            earliest=begin.position(self._task_id, self._epoch),
            latest=last.place.position(self._task_id, self._epoch),
            begins_anew=begins_anew,
        )

    async def _waited(self, heard: asyncio.Event) -> AsyncGenerator[TaskEvent, None]:
        """Wait until there may be something to read; what is found where nothing is heard for long."""
        try:
            async with asyncio.timeout(LOOK_S):
                await heard.wait()
        except TimeoutError:
            _, bounds = await self._logs.bounds(self._task_id)
            async for event in self._seen_to_be_there(bounds):
                yield event

    # -- from entries to events ---------------------------------------------------------------------

    async def _events_in(self, entry: Entry) -> AsyncGenerator[TaskEvent, None]:
        if entry.before > self._place:  # what stood between is not there any more
            _, bounds = await self._logs.bounds(self._task_id)
            yield await self._gap(self._last_position, entry, bounds[1] if bounds else entry, begins_anew=False)
        if entry.event == "output":
            async for event in self._outputs_in(entry):
                yield event
        else:
            self._place = entry.place
            event = self._event_of(entry)
            self._last_position = event.position
            if event.kind == "snapshot" and event.status == self._snapshot_of:
                return  # it was told before there was a log
            if event.kind == "redriven":  # the end of the run before is not that of this one
                self._expect_no_more()
                self._expect("often")
            yield event

    async def _outputs_in(self, entry: Entry) -> AsyncGenerator[TaskEvent, None]:
        outputs = decode_outputs(entry.fields[b"d"])
        first_index = int(entry.fields[b"o"]) - len(outputs)
        for number, tensors in enumerate(outputs):
            place = Place(entry.place.major, entry.place.seq - len(outputs) + number + 1)
            if place <= self._place:
                continue
            arrays = {tensor.name: await streamed_array(tensor, self._logs.blob) for tensor in tensors}
            self._place = place
            event = self._made("output", place, "running", at=entry.at, outputs=arrays, index=first_index + number)
            self._last_position = event.position
            yield event

    def event_of(self, epoch: str, entry: Entry) -> TaskEvent:
        """The event of an entry that is no output."""
        self._epoch = epoch
        return self._event_of(entry)

    def _event_of(self, entry: Entry) -> TaskEvent:
        fields, kind = entry.fields, entry.event
        if kind not in get_args(EventKind):
            raise ProtocolError(f"an entry of the log of task {self._task_id} is of an unknown kind: {kind[:50]!r}")
        status = STATUS_AFTER.get(kind, "running")
        event = self._made(kind, entry.place, status, at=entry.at)  # type: ignore[arg-type]
        if kind == "snapshot":
            return replace(event, status=fields.get(b"s", b"running").decode())  # type: ignore[arg-type]
        if kind == "progress":
            told = json.loads(fields[b"d"])
            return replace(event, fraction=told.get("fraction"), message=str(told.get("message", "")))
        if b"w" in fields:
            return replace(event, message=str(json.loads(fields[b"w"]).get("error", "")))
        if kind in TERMINAL:
            return replace(event, output_count=int(fields.get(b"o", 0)), output_bytes=int(fields.get(b"b", 0)))
        return event

    async def _end_elsewhere(self) -> AsyncGenerator[TaskEvent, None]:
        """The end of a task whose log does not tell it: it had none, or it is gone."""
        if self._has_ended:
            return
        error = self._ending.exception()
        if error is not None and not isinstance(error, SamphireError):
            raise error
        status = await self._status()
        if status not in TERMINAL:
            raise error or ResultExpiredError(f"task {self._task_id} has ended, and how is not known any more")
        _, bounds = await self._logs.bounds(self._task_id)
        async for event in self._seen_to_be_there(bounds):
            yield event
        major = self._place.major or ATTEMPTS
        yield self._made(status, Place(major, self._place.seq + 1), status)  # type: ignore[arg-type]

    async def _status(self) -> Status:
        return await self._session.waiter.status(self._task_id)

    def _made(
        self, kind: EventKind, place: Place, status: Status, at: float | None = None, **more: object
    ) -> TaskEvent:
        return TaskEvent(
            self._task_id,
            kind,
            status,
            self._session.clock.now() if at is None else at,
            place.position(self._task_id, self._epoch),
            place.run,
            place.attempt,
            place.seq,
            **more,  # type: ignore[arg-type]
        )
