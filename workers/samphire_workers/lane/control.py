"""Celery's control commands, answered by the lane: `inspect active`, `reserved`, `query_task`, and `revoke`.

Celery's own read sets of requests that a lane does not fill, and that would change while they are read.
Importing this module puts these in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery.worker import state as worker_state
from celery.worker.control import Panel, control_command, inspect_command, nok, ok

from samphire.envelope import describe
from samphire_broker.queues import refuse_queue
from samphire_workers.lane import step
from samphire_workers.lane.lane import Lane
from samphire_workers.lane.request import Request

ID_MAX_CHARACTERS = 255
SHOWN_MAX = 1000
"""Most tasks that one answer lists."""

_add_consumer = Panel.data["add_consumer"]


def info(request: Request, hostname: str) -> dict[str, Any]:
    """A task as Celery's `Request.info` shows it, without the numbers."""
    headers = request.envelope.headers if request.envelope else None
    return {
        "id": request.task_id,
        "name": headers.task if headers else None,
        "args": [],
        "kwargs": describe(request.infer) if request.infer else "",
        "type": headers.task if headers else None,
        "hostname": hostname,
        "time_start": request.started_at,
        "acknowledged": False,
        "delivery_info": {"exchange": "", "routing_key": request.claim.list_key, "redelivered": bool(request.attempts)},
        "worker_pid": None,
    }


async def _held(lane: Lane) -> list[Request]:
    return lane.requests()


def _requests() -> list[Request]:
    return [request for lane in step.serving for request in lane.ask(_held) or () if request.task_id]


def _shown(requests: Iterable[Request], hostname: str) -> list[dict[str, Any]]:
    return [info(request, hostname) for request in requests][:SHOWN_MAX]


@inspect_command(alias="dump_active")  # type: ignore[untyped-decorator]
def active(state: Any, safe: bool = False, **_: Any) -> list[dict[str, Any]]:
    """List of tasks currently being executed."""
    return _shown((request for request in _requests() if request.started_at), state.hostname)


@inspect_command(alias="dump_reserved")  # type: ignore[untyped-decorator]
def reserved(state: Any, **_: Any) -> list[dict[str, Any]]:
    """List of tasks that are claimed and not yet executed."""
    return _shown((request for request in _requests() if not request.started_at), state.hostname)


@inspect_command(variadic="ids", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def query_task(state: Any, ids: Any, **_: Any) -> dict[str, Any]:
    """Query for task information by id."""
    wanted = {ids} if isinstance(ids, str) else set(ids or ())
    return {
        request.task_id: ("active" if request.started_at else "reserved", info(request, state.hostname))
        for request in _requests()
        if request.task_id in wanted
    }


@control_command(variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any) -> Any:
    """Revoke task by task id (or list of ids); one that is running is cancelled, with `terminate` or without."""
    named = [task_id] if isinstance(task_id, str) else list(task_id or ())
    ids = {name for name in named if isinstance(name, str) and 1 <= len(name) <= ID_MAX_CHARACTERS}
    worker_state.revoked.update(ids)
    verdicts: dict[str, str] | None = None
    for lane in step.serving:
        verdicts = lane.ask(lambda lane: lane.cancel(sorted(ids)))
    if verdicts is None:
        return nok("the lane does not answer: the broker may be away; revoke again")
    told = ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())
    return ok(f"tasks {told or 'none'}")


@control_command(  # type: ignore[untyped-decorator]
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)
def add_consumer(state: Any, queue: str, **options: Any) -> Any:
    """Tell worker(s) to consume from task queue by name; never from one of the lanes."""
    reason = refuse_queue(queue)
    return nok(reason) if reason else _add_consumer(state, queue, **options)
