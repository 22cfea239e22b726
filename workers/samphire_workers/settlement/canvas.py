"""Celery's canvas: what a task that has ended owes to others, found out by Celery's own code.

A chain's next step, callbacks, errbacks, groups: Celery's tracer runs with the known outcome in the place of
a task's body. What it would send is captured instead (`CapturingTransport`), and what it would store too
(`CapturingBackend`), so that all of it is committed together with the task's own end.

The parts of a chord are the exception (see `chords`): a task that belongs to one pushes a message with its end.

Celery needs most of a millisecond for each step that it sends, so what has many of them has a thread of its own, and
there is a most (see `next_steps`).
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.canvas import Signature
from celery.exceptions import TaskRevokedError
from kombu.transport import redis as kombu_redis

from samphire.errors import InvalidInputError, SamphireError, error_from_name
from samphire.wire import keys
from samphire.wire.contract import CHORD_PART_TASK, INFER_TASK, CanvasStart, ChordMember, ChordPart
from samphire.wire.envelope import encode_task
from samphire_broker.store import OtherEnd, Webhook
from samphire_workers.intake.request import Request
from samphire_workers.intake.who_waits import checked_stream
from samphire_workers.settlement.celery_threads import (
    CAPTURING_THREAD,
    LARGE_CANVAS_THREAD,
    CheckedChannel,
    OwnThreadBackend,
    in_thread,
    make_app,
)
from samphire_workers.settlement.chords import Chords
from samphire_workers.settlement.next_steps import (
    FEW_STEPS,
    NEXT_STEPS_MAX_BYTES,
    check_nesting,
    check_steps,
    count_steps,
)
from samphire_workers.settlement.outcome import NextSteps

WebhooksOf = Callable[[OtherEnd, Mapping[str, Any]], tuple[Webhook, ...]]
"""What tells of the end of a task that nobody runs, by the arguments that it would have had."""


def _none_of(_end: OtherEnd, _kwargs: Mapping[str, Any]) -> tuple[Webhook, ...]:
    return ()


@dataclass
class _Captured:
    """What Celery would have sent and stored for the task that is looked at now."""

    task_id: str = ""
    pushes: list[tuple[str, str]] = field(default_factory=list)
    nbytes: int = 0
    others: list[OtherEnd] = field(default_factory=list)
    children: list[Any] = field(default_factory=list)
    webhooks_of: WebhooksOf = _none_of

    def push(self, key: str, message: str) -> None:
        """Keep a message, within bounds: one that was not counted before (a result of 256 KiB for each of many) too.

        Raises:
            InvalidInputError: it is too much.
        """
        self.pushes.append((key, message))
        self.nbytes += len(message)
        check_steps(len(self.pushes) - 1)  # one more is the part of a chord
        if self.nbytes > NEXT_STEPS_MAX_BYTES:
            raise InvalidInputError(
                f"expected at most {NEXT_STEPS_MAX_BYTES >> 20} MiB of next steps of one task, given more in "
                f"{len(self.pushes)} of them: send fewer, or smaller arguments and results"
            )


class _Here(threading.local):
    """What the thread that looks at canvases, one task after the other, works on."""

    captured = _Captured()


_here = _Here()


class _CapturingChannel(CheckedChannel):
    """Declares and looks up as ever, but keeps what would be pushed."""

    def _push(self, queue: str, message: dict[str, Any], **_kwargs: Any) -> None:
        priority = self._get_message_priority(message, reverse=False)  # type: ignore[no-untyped-call]
        key = self._q_for_pri(queue, priority)  # type: ignore[no-untyped-call]
        _here.captured.push(key, msgspec.json.encode(message).decode())


class CapturingTransport(kombu_redis.Transport):
    """kombu's Redis transport without the last step."""

    Channel = _CapturingChannel


class CapturingBackend(OwnThreadBackend):
    """Celery's Redis backend, whose results are kept instead of stored."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Subscribe to nothing: who sends a next step here does not wait for it."""

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=None, request=request)
        if task_id == _here.captured.task_id:
            _here.captured.children = meta.get("children") or []
            return result
        headers = getattr(request, "headers", None) or {}
        stream = checked_stream(headers.get("samphire_stream"))
        end = self._other_end(task_id, state, meta, stream)
        kwargs = getattr(request, "kwargs", None)
        told = _here.captured.webhooks_of(end, kwargs if isinstance(kwargs, dict) else {})
        _here.captured.others.append(end._replace(webhooks=told))
        return result

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_kwargs: Any) -> None:
        """Push a message that will return the part, once the task's end is committed."""
        if not request.id or not request.group:
            return
        names = ("id", "group", "group_index", "chord", "root_id", "parent_id")
        member = msgspec.convert({name: getattr(request, name, None) for name in names}, ChordMember)
        part = ChordPart(member, state, self.encode_result(result, state))
        message = encode_task(CHORD_PART_TASK, str(uuid.uuid4()), part, keys.INTAKE, 0)
        _here.captured.pushes.append((keys.INTAKE, message.decode()))


def _not_of_a_canvas(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith(CAPTURING_THREAD)


# The tracer logs results with all their numbers, and each failure once more with a traceback of this module.
logging.getLogger("celery.app.trace").addFilter(_not_of_a_canvas)


class Canvas:
    """Runs Celery's canvas code in threads of its own: in one the small canvases, in another those with many steps."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._small = _CanvasThread(app.conf, hostname, CAPTURING_THREAD)
        self._large = _CanvasThread(app.conf, hostname, LARGE_CANVAS_THREAD)
        self.chords = Chords(app.conf)
        """Counts their parts, in another thread."""

    @property
    def webhooks_of(self) -> WebhooksOf:
        """Makes the webhooks of steps that never come; set by who knows the endpoints, before any is looked at."""
        return self._small.webhooks_of

    @webhooks_of.setter
    def webhooks_of(self, webhooks_of: WebhooksOf) -> None:
        self._small.webhooks_of = self._large.webhooks_of = webhooks_of

    def close(self) -> None:
        """End the threads."""
        self._small.close()
        self._large.close()
        self.chords.close()

    async def after_success(self, request: Request, answer: object) -> NextSteps:
        """What a task that succeeded owes to others.

        Raises:
            InvalidInputError: its canvas is not understood by Celery, may not be sent, or has too many steps.
            BrokerUnavailableError, BrokerMemoryFullError: nothing was found out; it may be asked again.
        """
        canvas = request.canvas or {}
        sent = [canvas.get("callbacks"), (canvas.get("chain") or [])[-1:]]
        return await self._of(sent).run("after", request, msgspec.to_builtins(answer))

    async def after_failure(self, request: Request, error: SamphireError) -> NextSteps:
        """What a task that failed owes to others; raises as `after_success` does."""
        canvas = request.canvas or {}
        thread = self._of(canvas.get("errbacks"), told=len(canvas.get("chain") or []))
        # A fresh exception: Celery clears the frames of the traceback, which are alive here.
        fresh = error_from_name(type(error).__name__, str(error))
        return await thread.run("after", request, fresh)

    async def after_revocation(self, request: Request, reason: str) -> NextSteps:
        """What a task that was cancelled or has expired owes to others; raises as `after_success` does."""
        thread = self._of(None, told=len((request.canvas or {}).get("chain") or []))
        return await thread.run("revoke", request, reason)

    async def start(self, task_id: str, canvas: CanvasStart) -> NextSteps:
        """The first tasks of a canvas whose last one has the given id; raises as `after_success` does."""
        return await self._of(canvas.signature).run("start", task_id, canvas)

    def _of(self, sent: object, told: int = 0) -> _CanvasThread:
        """The thread for steps that are sent, as JSON, and so many that are told that they will not be."""
        count = count_steps(sent)
        check_steps(count)
        check_nesting(sent)
        return self._small if count + told <= FEW_STEPS else self._large


class _CanvasThread:
    """A thread with Celery's code and an application of its own, which looks at one task after the other."""

    def __init__(self, conf: Any, hostname: str, name: str) -> None:
        self._conf = conf
        self._hostname = hostname
        self.webhooks_of: WebhooksOf = _none_of
        self._outcome: Any = None
        self._trace: Callable[..., Any] | None = None
        self._capturing: Celery | None = None
        # Celery looks its application up by thread: nothing here may go through the worker's own.
        self._thread = ThreadPoolExecutor(1, name, initializer=self._make_tracer)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, what: Literal["after", "revoke", "start"], *args: Any) -> NextSteps:
        """Find out what is to be sent and stored; raises as `Canvas.after_success` does."""
        works: dict[str, Callable[..., NextSteps]] = {
            "after": self._after,
            "revoke": self._revoke,
            "start": self._start,
        }
        return await in_thread(self._thread, works[what], *args)

    # -- in the thread ------------------------------------------------------------------------------

    def _make_tracer(self) -> None:
        capturing = make_app(self._conf, "samphire.canvas", CapturingTransport, CapturingBackend)

        def outcome(*_args: Any, **_kwargs: Any) -> Any:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            return self._outcome

        capturing.task(name=INFER_TASK, shared=False)(outcome)
        self._trace = build_tracer(INFER_TASK, capturing.tasks[INFER_TASK], app=capturing, hostname=self._hostname)
        # Unknown again, an inference as errback is sent like any task instead of being called on the spot.
        capturing.tasks.unregister(INFER_TASK)
        self._capturing = capturing

    def _start(self, task_id: str, canvas: CanvasStart) -> NextSteps:
        _here.captured = _Captured(webhooks_of=self.webhooks_of)
        signature = Signature.from_dict(canvas.signature, app=self._capturing)
        result = signature.apply_async(task_id=task_id)
        if result.id != task_id:
            raise InvalidInputError(f"expected a canvas that ends with the task {task_id}, given one with {result.id}")
        return NextSteps(tuple(_here.captured.pushes), tuple(_here.captured.others), [])

    def _begin(self, request: Request) -> dict[str, Any]:
        _here.captured = _Captured(request.task_id, webhooks_of=self.webhooks_of)
        queue, priority = keys.split_list(request.claim.list_key)
        delivery = {"exchange": "", "routing_key": queue, "priority": priority, "redelivered": False}
        return {**(request.canvas or {}), "delivery_info": delivery, "hostname": self._hostname}

    def _after(self, request: Request, outcome: Any) -> NextSteps:
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

    def _revoke(self, request: Request, reason: str) -> NextSteps:
        assert self._capturing is not None
        celery_request = Context(self._begin(request))
        backend = self._capturing.backend
        backend.mark_as_revoked(request.task_id, reason, celery_request)
        # A chain's later steps never come: who waits for them is told.
        backend._fail_chain(celery_request.chain, TaskRevokedError(reason), state="REVOKED")
        return _steps()


def _steps() -> NextSteps:
    return NextSteps(tuple(_here.captured.pushes), tuple(_here.captured.others), _here.captured.children)
