"""Celery's control commands, as a lane carries them out; those that it cannot are refused with the reason.

Celery's own read sets of requests that a lane does not fill, and that would change while they are read, and some would
answer "ok" and do nothing. Importing this module puts these in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from celery.worker import state as worker_state
from celery.worker.control import Panel, control_command, inspect_command, nok, ok

from samphire.wire import keys
from samphire.wire.contract import is_task_id
from samphire.wire.envelope import describe
from samphire_broker.queues import declared, refuse_queue
from samphire_workers import bootstep
from samphire_workers.intake.request import Request
from samphire_workers.lane.lane import Lane, ScheduledTask

SHOWN_MAX = 1000
"""Most tasks that one answer lists."""

_add_consumer = Panel.data["add_consumer"]
_cancel_consumer = Panel.data["cancel_consumer"]
_active_queues = Panel.data["active_queues"]
_enable_events = Panel.data["enable_events"]
_disable_events = Panel.data["disable_events"]


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
    return [request for lane in bootstep.serving for request in lane.ask(_held) or () if request.task_id]


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


async def _scheduled(lane: Lane) -> list[ScheduledTask]:
    return await lane.scheduled(SHOWN_MAX)


@inspect_command(alias="dump_schedule")  # type: ignore[untyped-decorator]
def scheduled(state: Any, **_: Any) -> list[dict[str, Any]]:
    """List of the tasks that wait for their time, the earliest first; they are every worker's."""
    shown = []
    for lane in bootstep.serving:
        for task in lane.ask(_scheduled) or ():
            queue, priority = keys.split_list(task.list_key)
            request = {
                "id": task.task_id,
                "name": task.name,
                "args": [],
                "kwargs": task.described,
                "type": task.name,
                "hostname": state.hostname,
                "time_start": None,
                "acknowledged": False,
                "delivery_info": {"exchange": "", "routing_key": queue, "priority": priority, "redelivered": False},
                "worker_pid": None,
            }
            eta = datetime.fromtimestamp(task.due_s, UTC).isoformat()
            shown.append({"eta": eta, "priority": priority, "request": request})
    return shown


@inspect_command()  # type: ignore[untyped-decorator]
def active_queues(state: Any) -> list[dict[str, Any]]:
    """List the task queues that the worker consumes from: its own, and those of its lane."""
    own: list[dict[str, Any]] = _active_queues(state)
    queues = sorted({name for lane in bootstep.serving for name in lane.ask(_queues) or ()})
    return own + [declared(name).as_dict(recurse=True) for name in queues[:SHOWN_MAX]]  # type: ignore[no-untyped-call]


async def _queues(lane: Lane) -> list[str]:
    return lane.queues()


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
    ids = {name for name in named if is_task_id(name)}
    worker_state.revoked.update(ids)
    verdicts: dict[str, str] | None = None
    for lane in bootstep.serving:
        verdicts = lane.ask(lambda lane: lane.cancel(sorted(ids)))
    if verdicts is None:
        return nok("the lane does not answer: the broker may be away; revoke again")
    told = ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items())
    return ok(f"tasks {told or 'none'}")


@control_command(  # type: ignore[untyped-decorator]
    variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]"
)
def terminate(state: Any, signal: Any, task_id: Any, **_: Any) -> Any:
    """Terminate task by task id (or list of ids): as `revoke`, since a lane has no process for a task."""
    return revoke(state, task_id, terminate=True)


@control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("rate_limit", str)], signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>"
)
def rate_limit(state: Any, task_name: str, rate_limit: Any, **_: Any) -> Any:
    """Tell worker(s) to modify the rate limit for a task by type; refused."""
    return nok(
        "a lane has no rate limits: it goes as fast as the models answer. Submit more slowly, or give a model less "
        "weight (SAMPHIRE_QUEUE_WEIGHTS)"
    )


@control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("soft", float), ("hard", float)], signature="<task_name> <soft_secs> [hard_secs]"
)
def time_limit(state: Any, task_name: str | None = None, hard: Any = None, soft: Any = None, **_: Any) -> Any:
    """Tell worker(s) to modify the time limit for task by type; refused."""
    return nok(
        "a lane takes time limits from each task (time_limit, soft_time_limit of apply_async), and one for all from "
        "SAMPHIRE_TRITON_TIMEOUT_S"
    )


@control_command(  # type: ignore[untyped-decorator]
    args=[("headers", dict), ("terminate", bool), ("signal", str)], signature="[key1=value1 [key2=value2 [...]]]"
)
def revoke_by_stamped_headers(state: Any, headers: Any, **_: Any) -> Any:
    """Revoke tasks by stamped headers; refused."""
    return nok("a lane does not know tasks by their stamps: revoke them by their ids")


def _no_pool(state: Any, *_args: Any, **_: Any) -> Any:
    return nok(
        "a lane has no pool: start more workers, or fewer (SAMPHIRE_INFLIGHT_MAX says how many tasks each holds)"
    )


for _name, _signature in (("pool_grow", "[N=1]"), ("pool_shrink", "[N=1]"), ("autoscale", "[max [min]]")):
    control_command(name=_name, signature=_signature, help="Change the size of the pool; refused.")(_no_pool)


@control_command(args=[("queue", str)], signature="<queue>")  # type: ignore[untyped-decorator]
def cancel_consumer(state: Any, queue: str, **_: Any) -> Any:
    """Tell worker(s) to stop consuming from task queue by name; refused for those of the lanes."""
    if refuse_queue(queue):
        return nok(
            f"the queue {queue!r} belongs to the lanes of all workers: to take nothing from it here, end the worker"
        )
    return _cancel_consumer(state, queue)


@control_command()  # type: ignore[untyped-decorator]
def enable_events(state: Any) -> Any:
    """Tell worker(s) to send task-related events."""
    for lane in bootstep.serving:
        lane.ask(_send_events)
    return _enable_events(state)


@control_command()  # type: ignore[untyped-decorator]
def disable_events(state: Any) -> Any:
    """Tell worker(s) to stop sending task-related events."""
    for lane in bootstep.serving:
        lane.ask(_send_no_events)
    return _disable_events(state)


async def _send_events(lane: Lane) -> None:
    lane.send_events(True)


async def _send_no_events(lane: Lane) -> None:
    lane.send_events(False)


@control_command(  # type: ignore[untyped-decorator]
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)
def add_consumer(state: Any, queue: str, **options: Any) -> Any:
    """Tell worker(s) to consume from task queue by name; never from one of the lanes."""
    reason = refuse_queue(queue)
    return nok(reason) if reason else _add_consumer(state, queue, **options)
