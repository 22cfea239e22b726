"""Celery's canvas: what a task that has ended owes to others, found out by Celery's own code.

A chain's next step, callbacks, errbacks, groups: Celery's tracer runs with the known outcome in the place of
a task's body. What it would send is captured instead (`CapturingTransport`), and what it would store too
(`CapturingBackend`), so that all of it is committed together with the task's own end.

The parts of a chord are the exception: Celery counts them in Redis, and the last one needs the stored results
of all. So a task that belongs to a chord pushes, with its end, a message `samphire.chord_part`; whoever claims
it lets Celery's backend do its work (it recognises a part that it has seen), at least once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
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
from samphire.contract import CHORD_PART_TASK, INFER_TASK, CanvasStart, ChordPart, InferResponse
from samphire.envelope import encode_task, new_task_id
from samphire.errors import BrokerUnavailableError, InvalidInputError, SamphireError, error_from_name
from samphire_broker.store import OtherEnd
from samphire_workers.lane.outcome import Steps
from samphire_workers.lane.request import Request

T = TypeVar("T")

CAPTURING_THREAD = "samphire-canvas"

_STATES = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "cancelled"}


@dataclass
class _Outbox:
    """What Celery would have sent and stored for the task that is looked at now."""

    task_id: str = ""
    pushes: list[tuple[str, str]] = field(default_factory=list)
    others: list[OtherEnd] = field(default_factory=list)
    children: list[Any] = field(default_factory=list)


_outbox = _Outbox()
"""Of the one thread that looks at canvases, one task after the other."""


class _CapturingChannel(kombu_redis.Channel):
    """Declares and looks up as ever, but keeps what would be pushed."""

    def _put(self, queue: str, message: dict[str, Any], **_kwargs: Any) -> None:
        priority = self._get_message_priority(message, reverse=False)  # type: ignore[no-untyped-call]
        key = self._q_for_pri(queue, priority)  # type: ignore[no-untyped-call]
        _outbox.pushes.append((key, msgspec.json.encode(message).decode()))


class CapturingTransport(kombu_redis.Transport):
    """kombu's Redis transport without the last step."""

    Channel = _CapturingChannel


class CapturingBackend(RedisBackend):  # type: ignore[misc]
    """Celery's Redis backend, whose results are kept instead of stored."""

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **_kwargs: Any
    ) -> Any:
        meta = self._get_result_meta(result=result, state=state, traceback=None, request=request)
        if task_id == _outbox.task_id:
            _outbox.children = meta.get("children") or []
            return result
        headers = getattr(request, "headers", None) or {}
        meta["task_id"] = task_id
        stream = str(headers.get("samphire_stream") or "")
        _outbox.others.append(OtherEnd(task_id, _STATES.get(state, "failed"), self.encode(meta), stream))
        return result

    def on_chord_part_return(self, request: Any, state: str, result: Any, **_kwargs: Any) -> None:
        """Push a message that will return the part, once the task's end is committed."""
        if not request.id or not request.group:
            return
        names = ("id", "group", "group_index", "chord", "root_id", "parent_id")
        part = ChordPart(
            {name: getattr(request, name, None) for name in names},
            state,
            self.encode_result(result, state),
        )
        message = encode_task(CHORD_PART_TASK, new_task_id(), part, keys.INTAKE, 0)
        _outbox.pushes.append((keys.INTAKE, message.decode()))


def _not_of_a_canvas(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith(CAPTURING_THREAD)


# The tracer logs results with all their numbers, and each failure once more with a traceback of this module.
logging.getLogger("celery.app.trace").addFilter(_not_of_a_canvas)


class Canvas:
    """Runs Celery's canvas code in threads of its own, one task at a time."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._outcome: Any = None
        self._trace: Callable[..., Any] | None = None
        self._capturing: Celery | None = None
        # Celery looks its application up by thread; of what is captured nothing may go through the worker's own.
        self._captures = ThreadPoolExecutor(1, CAPTURING_THREAD, initializer=self._make_tracer)
        self._parts = ThreadPoolExecutor(1, "samphire-chord", initializer=app.set_current)

    def close(self) -> None:
        """End the threads."""
        self._captures.shutdown(wait=False, cancel_futures=True)
        self._parts.shutdown(wait=False, cancel_futures=True)

    async def after_success(self, request: Request, answer: InferResponse) -> Steps:
        """What a task that succeeded owes to others.

        Raises:
            InvalidInputError: its canvas is not one that Celery understands.
            BrokerUnavailableError: nothing was found out.
        """
        return await self._in_thread(self._captures, self._run, request, msgspec.to_builtins(answer))

    async def after_failure(self, request: Request, error: SamphireError) -> Steps:
        """What a task that failed owes to others; raises as `after_success` does."""
        # A fresh exception: Celery clears the frames of the traceback, which are alive here.
        fresh = error_from_name(type(error).__name__, str(error))
        return await self._in_thread(self._captures, self._run, request, fresh)

    async def after_revocation(self, request: Request, reason: str) -> Steps:
        """What a task that was cancelled or has expired owes to others; raises as `after_success` does."""
        return await self._in_thread(self._captures, self._revoke, request, reason)

    async def start(self, task_id: str, canvas: CanvasStart) -> Steps:
        """The first tasks of a canvas whose last one has the given id; raises as `after_success` does."""
        return await self._in_thread(self._captures, self._start, task_id, canvas)

    async def return_part(self, part: ChordPart) -> None:
        """Count a part of a chord; the last one sends the chord's body. Raises as `after_success` does."""
        await self._in_thread(self._parts, self._return_part, part)

    async def _in_thread(self, thread: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work, *args)
        except (OperationalError, RedisError, OSError) as error:
            raise BrokerUnavailableError(f"the next steps were not found out: {error}") from error
        except SamphireError:
            raise
        except Exception as error:
            raise InvalidInputError(f"the canvas of the task is not understood: {error!r}") from error

    # -- in the thread ------------------------------------------------------------------------------

    def _make_tracer(self) -> None:
        conf = self._app.conf
        capturing = Celery("samphire.canvas", set_as_current=False)
        capturing.conf.update(
            broker_url=conf.broker_url,
            broker_transport=f"{__name__}:CapturingTransport",
            broker_transport_options=conf.broker_transport_options,
            result_backend=f"{__name__}:CapturingBackend+{conf.result_backend}",
            result_expires=conf.result_expires,
            task_routes=conf.task_routes,
            task_serializer="json",
            result_serializer="json",
            accept_content=["json"],
        )

        def outcome(*_args: Any, **_kwargs: Any) -> Any:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            return self._outcome

        capturing.task(name=INFER_TASK, shared=False)(outcome)
        capturing.finalize()
        capturing.set_current()
        self._capturing = capturing
        self._trace = build_tracer(INFER_TASK, capturing.tasks[INFER_TASK], app=capturing, hostname=self._hostname)

    def _start(self, task_id: str, canvas: CanvasStart) -> Steps:
        global _outbox
        _outbox = _Outbox()
        signature = Signature.from_dict(canvas.signature, app=self._capturing)
        result = signature.apply_async(task_id=task_id)
        if result.id != task_id:
            raise InvalidInputError(f"expected a canvas that ends with the task {task_id}, given one with {result.id}")
        pushes, others, _ = _steps()
        return pushes, others, []

    def _begin(self, request: Request) -> dict[str, Any]:
        global _outbox
        _outbox = _Outbox(request.task_id)
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
        error = getattr(traced.retval, "exception", None)
        if traced.info is None and isinstance(error, Exception):  # the tracer itself failed, and says it so
            raise error
        return _steps()

    def _revoke(self, request: Request, reason: str) -> Steps:
        assert self._capturing is not None
        celery_request = Context(self._begin(request))
        backend = self._capturing.backend
        backend.mark_as_revoked(request.task_id, reason, celery_request)
        # A chain's later steps never come: who waits for them is told.
        backend._fail_chain(celery_request.chain, TaskRevokedError(reason), state="REVOKED")
        return _steps()

    def _return_part(self, part: ChordPart) -> None:
        backend = self._app.backend
        result = part.result
        if part.state != "SUCCESS":
            result = backend.exception_to_python(result)
        backend.on_chord_part_return(Context(part.request), part.state, result)


def _steps() -> Steps:
    return tuple(_outbox.pushes), tuple(_outbox.others), _outbox.children
