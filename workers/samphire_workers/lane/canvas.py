"""Celery's canvas: what a task that has ended owes to others, found out by Celery's own code.

A chain's next step, callbacks, errbacks, groups: Celery's tracer runs with the known outcome in the place of
a task's body. What it would send is captured instead (`CapturingTransport`), and what it would store too
(`CapturingBackend`), so that all of it is committed together with the task's own end.

The parts of a chord are the exception: Celery counts them in Redis, and the last one needs the stored results
of all. So a task that belongs to a chord pushes, with its end, a message `samphire.chord_part`; whoever claims
it lets Celery's backend do its work (it recognises a part that it has seen), at least once. What the backend would
store meanwhile, as the failure of a chord's body, goes through the store (`CountingBackend`): no end is written over.

Producers name the queues of next steps, and workers push with rights that producers lack: a queue whose name
is that of a key with state is refused.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.backends.redis import RedisBackend
from celery.canvas import Signature
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis
from redis.exceptions import RedisError

from samphire import keys
from samphire.connection import translate
from samphire.contract import (
    CHORD_PART_TASK,
    INFER_TASK,
    UNKNOWN_CHORD,
    CanvasStart,
    ChordMember,
    ChordPart,
    InferResponse,
)
from samphire.envelope import encode_task, new_task_id
from samphire.errors import BrokerUnavailableError, InvalidInputError, SamphireError, error_from_name
from samphire_broker.store import OtherEnd
from samphire_workers.lane.faults import is_shortage, our_error
from samphire_workers.lane.outcome import Steps
from samphire_workers.lane.request import Request

logger = logging.getLogger(__name__)

T = TypeVar("T")

CAPTURING_THREAD, COUNTING_THREAD = "samphire-canvas", "samphire-chord"

_STATES = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "cancelled"}


@dataclass
class _Outbox:
    """What Celery would have sent and stored for the task that is looked at now."""

    task_id: str = ""
    pushes: list[tuple[str, str]] = field(default_factory=list)
    others: list[OtherEnd] = field(default_factory=list)
    children: list[Any] = field(default_factory=list)


class _Here(threading.local):
    """What the thread that looks at canvases, one task after the other, works on."""

    outbox = _Outbox()
    end_other: Callable[[OtherEnd], None]
    """Ends a task that nobody holds; of the thread that counts chords."""
    stream = ""
    """Event stream of the client whose chord is counted."""


_here = _Here()


class _CheckedChannel(kombu_redis.Channel):
    """Pushes to queues, and to no other key."""

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if not keys.may_be_queue(queue):
            raise InvalidInputError(f"expected the name of a queue for a next step, given {queue[:200]!r}")
        self._push(queue, message, **kwargs)

    def _push(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        super()._put(queue, message, **kwargs)  # type: ignore[no-untyped-call]

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **kwargs: Any) -> None:
        raise InvalidInputError(f"a next step cannot go to the fanout exchange {exchange[:200]!r}")


class _CapturingChannel(_CheckedChannel):
    """Declares and looks up as ever, but keeps what would be pushed."""

    def _push(self, queue: str, message: dict[str, Any], **_kwargs: Any) -> None:
        priority = self._get_message_priority(message, reverse=False)  # type: ignore[no-untyped-call]
        key = self._q_for_pri(queue, priority)  # type: ignore[no-untyped-call]
        _here.outbox.pushes.append((key, msgspec.json.encode(message).decode()))


class CheckedTransport(kombu_redis.Transport):
    """kombu's Redis transport, which pushes to queues only."""

    Channel = _CheckedChannel


class CapturingTransport(kombu_redis.Transport):
    """kombu's Redis transport without the last step."""

    Channel = _CapturingChannel


class _OwnThreadBackend(RedisBackend):  # type: ignore[misc]
    """Celery's Redis backend, of whose results nobody unsubscribes but the threads here.

    A result does when it is collected, which happens in any thread: while the broker is away that blocks for many
    seconds, in the lane's thread as well.
    """

    def remove_pending_result(self, result: Any) -> Any:
        if (threading.current_thread().name or "").startswith((CAPTURING_THREAD, COUNTING_THREAD)):
            return super().remove_pending_result(result)
        return result


class CapturingBackend(_OwnThreadBackend):
    """Celery's Redis backend, whose results are kept instead of stored."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to nothing: who sends a next step here does not wait for it."""

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=None, request=request)
        if task_id == _here.outbox.task_id:
            _here.outbox.children = meta.get("children") or []
            return result
        headers = getattr(request, "headers", None) or {}
        meta["task_id"] = task_id
        stream = str(headers.get("samphire_stream") or "")
        _here.outbox.others.append(OtherEnd(task_id, _STATES.get(state, "failed"), self.encode(meta), stream))
        return result

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_kwargs: Any) -> None:
        """Push a message that will return the part, once the task's end is committed."""
        if not request.id or not request.group:
            return
        names = ("id", "group", "group_index", "chord", "root_id", "parent_id")
        member = msgspec.convert({name: getattr(request, name, None) for name in names}, ChordMember)
        part = ChordPart(member, state, self.encode_result(result, state))
        message = encode_task(CHORD_PART_TASK, new_task_id(), part, keys.INTAKE, 0)
        _here.outbox.pushes.append((keys.INTAKE, message.decode()))


class CountingBackend(_OwnThreadBackend):
    """Celery's Redis backend, which counts chords, but ends tasks through the store."""

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=None, request=request)
        meta["task_id"] = task_id
        _here.end_other(OtherEnd(task_id, _STATES.get(state, "failed"), self.encode(meta), _here.stream))
        return result


def _not_of_a_canvas(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith(CAPTURING_THREAD)


# The tracer logs results with all their numbers, and each failure once more with a traceback of this module.
logging.getLogger("celery.app.trace").addFilter(_not_of_a_canvas)


class Canvas:
    """Runs Celery's canvas code in threads of its own, one task at a time."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._conf = app.conf
        self._hostname = hostname
        self._outcome: Any = None
        self._trace: Callable[..., Any] | None = None
        self._capturing: Celery | None = None
        self._counting: Celery | None = None
        # Celery looks its application up by thread: nothing here may go through the worker's own.
        self._captures = ThreadPoolExecutor(1, CAPTURING_THREAD, initializer=self._make_tracer)
        self._parts = ThreadPoolExecutor(1, COUNTING_THREAD, initializer=self._make_counting)

    def close(self) -> None:
        """End the threads."""
        self._captures.shutdown(wait=False, cancel_futures=True)
        self._parts.shutdown(wait=False, cancel_futures=True)

    async def after_success(self, request: Request, answer: InferResponse) -> Steps:
        """What a task that succeeded owes to others.

        Raises:
            InvalidInputError: its canvas is not one that Celery understands, or that may be sent.
            BrokerUnavailableError, BrokerMemoryFullError: nothing was found out; it may be asked again.
        """
        return await _in_thread(self._captures, self._run, request, msgspec.to_builtins(answer))

    async def after_failure(self, request: Request, error: SamphireError) -> Steps:
        """What a task that failed owes to others; raises as `after_success` does."""
        # A fresh exception: Celery clears the frames of the traceback, which are alive here.
        fresh = error_from_name(type(error).__name__, str(error))
        return await _in_thread(self._captures, self._run, request, fresh)

    async def after_revocation(self, request: Request, reason: str) -> Steps:
        """What a task that was cancelled or has expired owes to others; raises as `after_success` does."""
        return await _in_thread(self._captures, self._revoke, request, reason)

    async def start(self, task_id: str, canvas: CanvasStart) -> Steps:
        """The first tasks of a canvas whose last one has the given id; raises as `after_success` does."""
        return await _in_thread(self._captures, self._start, task_id, canvas)

    async def return_part(self, part: ChordPart, end_other: Callable[[OtherEnd], Awaitable[None]]) -> None:
        """Count a part of a chord; the last one sends the chord's body, or ends it. Raises as `after_success` does.

        Args:
            part: the part that has ended.
            end_other: ends a task that nobody holds, unless it has ended; repeated until the broker has answered.
        """
        loop = asyncio.get_running_loop()

        def end(other: OtherEnd) -> None:
            asyncio.run_coroutine_threadsafe(_awaited(end_other, other), loop).result()

        await _in_thread(self._parts, self._return_part, part, end)

    # -- in the threads -----------------------------------------------------------------------------

    def _make_app(self, name: str, transport: type, backend: str) -> Celery:
        conf = self._conf
        made = Celery(name, set_as_current=False)
        made.conf.update(
            broker_url=conf.broker_url,
            broker_transport=f"{__name__}:{transport.__name__}",
            broker_transport_options=conf.broker_transport_options,
            result_backend=backend,
            result_expires=conf.result_expires,
            result_chord_expires=conf.result_chord_expires,
            task_routes=conf.task_routes,
            task_serializer="json",
            result_serializer="json",
            accept_content=["json"],
        )
        made.finalize()
        made.set_current()
        return made

    def _make_counting(self) -> None:
        backend = f"{__name__}:{CountingBackend.__name__}+{self._conf.result_backend}"
        self._counting = self._make_app("samphire.chord", CheckedTransport, backend)

    def _make_tracer(self) -> None:
        backend = f"{__name__}:{CapturingBackend.__name__}+{self._conf.result_backend}"
        capturing = self._make_app("samphire.canvas", CapturingTransport, backend)

        def outcome(*_args: Any, **_kwargs: Any) -> Any:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            return self._outcome

        capturing.task(name=INFER_TASK, shared=False)(outcome)
        self._trace = build_tracer(INFER_TASK, capturing.tasks[INFER_TASK], app=capturing, hostname=self._hostname)
        # Unknown again, an inference as errback is sent like any task instead of being called on the spot.
        capturing.tasks.unregister(INFER_TASK)
        self._capturing = capturing

    def _start(self, task_id: str, canvas: CanvasStart) -> Steps:
        _here.outbox = _Outbox()
        signature = Signature.from_dict(canvas.signature, app=self._capturing)
        result = signature.apply_async(task_id=task_id)
        if result.id != task_id:
            raise InvalidInputError(f"expected a canvas that ends with the task {task_id}, given one with {result.id}")
        return tuple(_here.outbox.pushes), tuple(_here.outbox.others), []

    def _begin(self, request: Request) -> dict[str, Any]:
        _here.outbox = _Outbox(request.task_id)
        queue, priority = keys.split_list(request.claim.list_key)
        delivery = {"exchange": "", "routing_key": queue, "priority": priority, "redelivered": False}
        return {**(request.canvas or {}), "delivery_info": delivery, "hostname": self._hostname}

    def _run(self, request: Request, outcome: Any) -> Steps:
        assert self._trace is not None
        celery_request = self._begin(request)
        self._outcome = outcome
        try:
            traced = self._trace(request.task_id, (), {}, celery_request)
        finally:
            self._outcome = None
        if isinstance(traced.retval, ExceptionInfo) and traced.retval.internal:  # the tracer itself failed
            wrapped = traced.retval.exception
            raise getattr(wrapped, "exc", wrapped)
        failed = traced.info is not None
        if failed and not isinstance(outcome, Exception):  # it could not send, which Celery calls the task's failure
            raise traced.info.retval
        return _steps()

    def _revoke(self, request: Request, reason: str) -> Steps:
        assert self._capturing is not None
        celery_request = Context(self._begin(request))
        backend = self._capturing.backend
        backend.mark_as_revoked(request.task_id, reason, celery_request)
        # A chain's later steps never come: who waits for them is told.
        backend._fail_chain(celery_request.chain, TaskRevokedError(reason), state="REVOKED")
        return _steps()

    def _return_part(self, part: ChordPart, end_other: Callable[[OtherEnd], None]) -> None:
        assert self._counting is not None
        _here.end_other, _here.stream = end_other, _stream_of(part)
        backend = self._counting.backend
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


async def _awaited(end_other: Callable[[OtherEnd], Awaitable[None]], other: OtherEnd) -> None:
    await end_other(other)


def _stream_of(part: ChordPart) -> str:
    """Event stream of the client that waits for a chord's body; empty where none is named."""
    chord = part.request.chord
    options = chord.get("options") if isinstance(chord, dict) else None
    headers = options.get("headers") if isinstance(options, dict) else None
    stream = headers.get("samphire_stream") if isinstance(headers, dict) else None
    return stream if isinstance(stream, str) else ""


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


def _steps() -> Steps:
    return tuple(_here.outbox.pushes), tuple(_here.outbox.others), _here.outbox.children


async def _in_thread(thread: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
    """Run `work`; whatever it raises, a stored SystemExit too, is one task's error and never the worker's."""

    def run() -> tuple[T | None, BaseException | None]:
        try:
            return work(*args), None
        except BaseException as error:  # noqa: BLE001
            return None, error

    try:
        result, error = await asyncio.get_running_loop().run_in_executor(thread, run)
    except RuntimeError as no_thread:
        raise our_error(no_thread) from no_thread
    if error is None:
        return result  # type: ignore[return-value]
    raise _translated(error) from error


def _translated(error: BaseException) -> SamphireError:
    if isinstance(error, SamphireError):
        return error
    if is_shortage(error):
        return our_error(error)
    cause = error.__cause__ if isinstance(error, OperationalError) else error
    if isinstance(cause, RedisError | OSError):
        known = translate(cause)
        if known.retryable:
            return known
    elif isinstance(error, OperationalError):
        return BrokerUnavailableError(f"the next steps were not found out: {error}")
    return InvalidInputError(f"the canvas of the task is not understood: {error!r}")
