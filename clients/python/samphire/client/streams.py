"""The outputs of a task that streams: one after the other, or all of them joined."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from samphire.client.events import TaskEvent
from samphire.client.following import LOOK_S, Following
from samphire.client.results import TERMINAL, InferResult, streamed_array
from samphire.client.session import Session
from samphire.client.waiter import Look
from samphire.errors import InvalidInputError, ResultExpiredError, StreamDiffersError
from samphire.wire.outputs import StreamedTensor, decode_outputs
from samphire.wire.positions import ATTEMPTS, BEGINNING, Place, parse_position

Resume = Literal["restart", "skip"]


class Outputs:
    """The outputs of a task, as `AsyncTask.stream` gives them.

    Args:
        session, task_id, after, look: as for `Following`.
        resume: what happens where outputs begin anew.
    """

    def __init__(self, session: Session, task_id: str, after: str | None, look: Look, resume: Resume) -> None:
        if resume not in get_args(Resume):
            raise InvalidInputError(f"expected resume as 'restart' or 'skip', given {resume!r}")
        self._session = session
        self._task_id = task_id
        self._following = Following(session, task_id, after, look, all_events=False)
        self._skips = resume == "skip"
        self._after = None if after is None else parse_position(task_id, after)[1]
        had_outputs = self._after is not None and self._after.attempt > 0 and self._after.seq > 1
        self._attempt = self._after.major if self._after is not None and had_outputs else None
        """Whose outputs were given out last."""
        self._first_attempt = self._attempt
        self._digests: dict[int, bytes] = {}
        """Of the outputs that were given out, by their number."""
        self._given_out = 0
        """How far outputs were given out, by their numbers."""
        self._are_known = True
        """Whether the outputs before the position were all in the log."""

    async def events(self) -> AsyncGenerator[TaskEvent, None]:
        """Outputs, restarts and gaps, until the task has succeeded; raises what it has ended with otherwise."""
        if self._skips and self._after is not None:
            await self._read_digests(self._after)
        end: TaskEvent | None = None
        async with contextlib.aclosing(self._following.events()) as events:
            async for event in events:
                end = event if event.kind in TERMINAL else None  # else another run has begun
                if event.kind == "output":
                    for told in self._with_restart(event):
                        yield told
                elif event.kind == "gap":
                    if event.begins_anew:
                        self._attempt, self._digests, self._given_out = None, {}, 0
                    yield event
        if end is not None:
            await self._check_end(end)

    def _with_restart(self, event: TaskEvent) -> Iterator[TaskEvent]:
        major = event.run * ATTEMPTS + event.attempt
        if self._attempt is not None and self._attempt != major and not self._skips:
            yield replace(event, kind="restarted", outputs={}, index=None, begins_anew=True)
        self._attempt = major
        if not self._skips:
            yield event
            return
        digest = _digest(event.outputs)
        assert event.index is not None
        if event.index in self._digests:
            if self._digests[event.index] != digest:
                raise StreamDiffersError(
                    f"task {self._task_id} began anew, and its output {event.index} is not what it was: its model does "
                    "not give out the same again; use resume='restart'"
                )
            return
        if event.index < self._given_out or (self._attempt != self._first_attempt and not self._are_known):
            raise StreamDiffersError(
                f"task {self._task_id} began anew, and its output {event.index} cannot be compared: what was given out "
                "before is not in the log any more; use resume='restart'"
            )
        self._note(event.index, digest)
        yield event

    def _note(self, index: int, digest: bytes) -> None:
        self._digests[index] = digest
        self._given_out = max(self._given_out, index + 1)

    async def _read_digests(self, after: Place) -> None:
        """What the attempt has given out before the position, to know it again."""
        at = Place(after.major, 0)
        self._are_known = after.seq <= 1
        while at < after:
            _, entries = await self._session.logs.read(self._task_id, at)
            if not entries:
                return
            first = entries[0]
            self._are_known |= first.place.major == after.major and first.place.seq == first.events
            for entry in entries:
                if entry.event == "output" and entry.place.major == after.major:
                    outputs = decode_outputs(entry.fields[b"d"])
                    first_index, first_seq = int(entry.fields[b"o"]) - len(outputs), entry.place.seq - len(outputs) + 1
                    for number, tensors in enumerate(outputs):
                        if first_seq + number <= after.seq:
                            self._note(first_index + number, await self._digest_of(tensors))
                at = entry.place

    async def _digest_of(self, tensors: list[StreamedTensor]) -> bytes:
        arrays = {tensor.name: await streamed_array(tensor, self._session.logs.blob) for tensor in tensors}
        return _digest(arrays)

    async def _check_end(self, end: TaskEvent) -> None:
        """Raise what the task has ended with, unless it has succeeded, and that with all that was given out."""
        if end.kind != "succeeded":
            await self._session.result(self._task_id, LOOK_S, "now")  # raises what it has ended with
            raise ResultExpiredError(f"task {self._task_id} has {end.kind}, and was run again since")
        if self._skips and end.output_count is not None and self._given_out > end.output_count:
            raise StreamDiffersError(
                f"task {self._task_id} began anew and has ended with {end.output_count} outputs, after "
                f"{self._given_out} of the attempt before: its model does not give out the same again; use "
                "resume='restart'"
            )


def _digest(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    text = repr([(name, array.dtype.str, array.shape) for name, array in arrays.items()])
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for array in arrays.values():
        digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return digest.digest()


async def last_progress(session: Session, task_id: str) -> TaskEvent | None:
    """The last progress in a task's log, as far as that is looked at."""
    found = await session.logs.last_of(task_id, "progress")
    return None if found is None else Following(session, task_id, None, "often").event_of(*found)


async def with_outputs(session: Session, result: InferResult) -> InferResult:
    """A result with the outputs of its stream, joined as where a result collects them.

    Raises:
        ResultExpiredError: the log has not all of them any more.
    """
    _, bounds = await session.logs.bounds(result.task_id)
    outputs: list[list[StreamedTensor]] = []
    at = Place(bounds[1].place.major, 0) if bounds else BEGINNING
    while bounds and at < bounds[1].place:
        _, entries = await session.logs.read(result.task_id, at)
        if not entries:
            break
        for entry in entries:
            at = entry.place
            if entry.event == "output":
                outputs += decode_outputs(entry.fields[b"d"])
    if len(outputs) != result.output_count:
        raise ResultExpiredError(
            f"task {result.task_id} has given out {result.output_count} outputs, of which its log has {len(outputs)} "
            "any more: submit with collect=True to keep all, or read them with stream()"
        )
    parts: dict[str, list[NDArray[Any]]] = {}
    for tensors in outputs:
        for tensor in tensors:
            array = await streamed_array(tensor, session.logs.blob)
            parts.setdefault(tensor.name, []).append(array.reshape(1) if array.ndim == 0 else array)
    try:
        joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    except ValueError as error:
        raise InvalidInputError(
            f"the outputs of task {result.task_id} cannot be joined: read them with stream(): {error}"
        ) from error
    return replace(result, outputs=joined)
