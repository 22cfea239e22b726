"""Counting the parts of a chord that have ended, by Celery's own backend.

Celery counts them in Redis, and the last one needs the stored results of all. So a task that belongs to a chord
pushes, with its end, a message `samphire.chord_part`; whoever claims it lets Celery's backend do its work (it
recognises a part that it has seen), at least once. What the backend would store meanwhile, as the failure of a chord's
body, goes through the store (`CountingBackend`): no end is written over.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from celery import Celery
from celery.app.task import Context

from samphire.errors import BrokerUnavailableError, InvalidInputError
from samphire.wire.contract import UNKNOWN_CHORD, ChordPart
from samphire_broker.store import OtherEnd
from samphire_workers.intake.who_waits import checked_stream
from samphire_workers.settlement.celery_threads import (
    COUNTING_THREAD,
    CheckedTransport,
    OwnThreadBackend,
    in_thread,
    make_app,
)
from samphire_workers.settlement.next_steps import FEW_STEPS, check_nesting, check_steps, count_steps

logger = logging.getLogger(__name__)


EndOther = Callable[[OtherEnd, Mapping[str, Any]], Awaitable[None]]


class _Here(threading.local):
    """What the thread that counts works on, one part after the other."""

    end_other: Callable[[OtherEnd, Mapping[str, Any]], None]
    """Ends a task that nobody holds, by the arguments that it would have had."""
    body: Mapping[str, Any] = {}
    """The signature of the chord's body."""
    stream = ""
    """Event stream of the client whose chord is counted."""
    app: Celery
    """Of this thread alone."""


_here = _Here()


class CountingBackend(OwnThreadBackend):
    """Celery's Redis backend, which counts chords, but ends tasks through the store."""

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=None, request=request)
        is_body = _options_of(_here.body).get("task_id") == task_id
        kwargs = _here.body.get("kwargs") if is_body else None
        _here.end_other(self._other_end(task_id, state, meta, _here.stream), kwargs if isinstance(kwargs, dict) else {})
        return result


class Chords:
    """Counts parts of chords in threads of its own, one at a time in each; large bodies hold up no others."""

    def __init__(self, conf: Any) -> None:
        self._conf = conf
        # Celery looks its application up by thread: nothing here may go through the worker's own.
        self._small, self._large = (
            ThreadPoolExecutor(1, name, initializer=self._make_app)
            for name in (COUNTING_THREAD, f"{COUNTING_THREAD}-large")
        )

    def close(self) -> None:
        """End the threads."""
        for thread in (self._small, self._large):
            thread.shutdown(wait=False, cancel_futures=True)

    async def return_part(self, part: ChordPart, end_other: EndOther) -> None:
        """Count a part of a chord; the last one sends the chord's body, or ends it.

        Args:
            part: the part that has ended.
            end_other: ends a task that nobody holds, unless it has ended; repeated until the broker has answered. It
                gets the arguments that the task would have had.

        Raises:
            InvalidInputError: nobody knows the chord's body, or it is not one that Celery understands, or it has too
                many steps, or is nested too deep.
            BrokerUnavailableError, BrokerMemoryFullError: it may be done again.
        """
        loop = asyncio.get_running_loop()

        def end(other: OtherEnd, kwargs: Mapping[str, Any]) -> None:
            asyncio.run_coroutine_threadsafe(_awaited(end_other, other, kwargs), loop).result()

        count = _steps_of(part.request.chord)
        thread = self._small if count <= FEW_STEPS else self._large
        await in_thread(thread, self._return_part, part, count, end)

    # -- in the thread ------------------------------------------------------------------------------

    def _make_app(self) -> None:
        _here.app = make_app(self._conf, "samphire.chord", CheckedTransport, CountingBackend)

    def _return_part(
        self, part: ChordPart, count: int, end_other: Callable[[OtherEnd, Mapping[str, Any]], None]
    ) -> None:
        _here.end_other, _here.stream, _here.body = end_other, _stream_of(part), part.request.chord
        backend = _here.app.backend
        try:
            check_steps(count)
            check_nesting([part.request.chord, _options_of(part.request.chord).get("link_error")])
        except InvalidInputError as error:
            if isinstance(body_id := _options_of(part.request.chord).get("task_id"), str):
                backend.store_result(body_id, error, "FAILURE")
            raise
        result = part.result
        if part.state != "SUCCESS":
            result = backend.exception_to_python(result)
        request = _PartRequest(msgspec.to_builtins(part.request), backend)
        _warn_if_forgotten(backend, part.request.group)
        backend.on_chord_part_return(request, part.state, result)
        if request.is_lost():
            raise InvalidInputError(
                f"the body of chord {part.request.group} is not known, since none of its parts is understood: who "
                "waits for it is not told"
            )
        if _is_unfinished(backend, part.request.group):
            # A worker that was lost had taken the body on, or a reply was: Celery lets it be taken on again some
            # seconds later, and nobody else will.
            raise BrokerUnavailableError(f"the body of chord {part.request.group} is still taken on by another")


class _PartRequest(Context):  # type: ignore[misc]
    """What Celery's backend reads of a part of a chord, which may not know the chord's body itself.

    The body stands in the message of each part; of one whose message was not understood it is known from another, whose
    counting has left it behind. Celery's backend asks for it once it has counted the part, so the last to be counted
    finds what the others have left.
    """

    def __init__(self, fields: dict[str, Any], backend: Any) -> None:
        self._client = backend.client
        self._chord = fields.pop("chord")
        super().__init__(fields)
        self._body_key, self._size_key = (backend.get_key_for_group(self.group, suffix) for suffix in (".b", ".s"))
        if self._chord != UNKNOWN_CHORD:
            self._client.set(self._body_key, msgspec.json.encode(self._chord), ex=backend.chord_expires)

    @property
    def chord(self) -> Any:
        """The signature of the chord's body."""
        if self._chord == UNKNOWN_CHORD and (known := self._client.get(self._body_key)) is not None:
            self._chord = msgspec.json.decode(known)
        return {**self._chord, "options": dict(self._chord.get("options") or {})}  # Celery writes into them

    def is_lost(self) -> bool:
        """Whether the chord has ended without its body, since nobody knows it."""
        return self._chord == UNKNOWN_CHORD and not self._client.exists(self._size_key)


def _warn_if_forgotten(backend: Any, group: str) -> None:
    """Say that a chord's counters are gone: its producer has let them expire before its parts had ended."""
    if not backend.client.exists(*(backend.get_key_for_group(group, suffix) for suffix in (".s", ".c"))):
        logger.warning(
            "the counters of chord %s are gone: its body is not run. Set result_chord_expires in the application that "
            "sends it to longer than its parts may wait",
            group,
            extra={"action": "chord_forgotten"},
        )


async def _awaited(end_other: EndOther, other: OtherEnd, kwargs: Mapping[str, Any]) -> None:
    await end_other(other, kwargs)


def _stream_of(part: ChordPart) -> str:
    """Event stream of the client that waits for a chord's body; empty where none is named."""
    headers = _options_of(part.request.chord).get("headers")
    return checked_stream(headers.get("samphire_stream")) if isinstance(headers, dict) else ""


def _options_of(chord: Mapping[str, Any]) -> dict[str, Any]:
    options = chord.get("options")
    return options if isinstance(options, dict) else {}


def _steps_of(chord: dict[str, Any]) -> int:
    """Steps that the last part sends: the chord's body, or once a part has failed the body's errbacks."""
    return max(count_steps(chord), count_steps(_options_of(chord).get("link_error")))


def _is_unfinished(backend: Any, group: str) -> bool:
    """Whether all parts of a chord are there and its body was not sent (see `on_chord_part_return`)."""
    client = backend.client
    parts, difference, size, claim = (backend.get_key_for_group(group, suffix) for suffix in (".j", ".t", ".s", ".c"))
    expected = client.get(size)
    if expected is None:
        return False
    count = client.zcard(parts) if backend._chord_zset else client.llen(parts)
    whole: bool = count == int(expected) + int(client.get(difference) or 0)
    return whole and client.get(claim) != b"done"
