"""Expiry, delays, limits, and Celery's control commands."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord
from celery.exceptions import ChordError, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from tests.stacks import ENDS_S, Up, bound, clean_environment, eventually
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.test_celery import (  # noqa: F401
    FROM_PARENT,
    INFER,
    TIMEOUT_S,
    Infer,
    app,
    infer,
    pytestmark,
    tensor,
    values,
)


def test_expired_tasks_are_not_run(infer: Infer, stack: Up) -> None:
    """REVOKED, as by any worker; no dead letter."""
    sent = infer(tensor(1)).apply_async(expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(TaskRevokedError, match="expired"):
        sent.get(timeout=TIMEOUT_S)
    assert sent.state == "REVOKED"
    with stack.redis() as client:
        assert not client.exists(KEYS.dead_prefix + sent.id)
    assert infer(tensor(1)).apply_async(expires=60).get(timeout=TIMEOUT_S)


@pytest.mark.parametrize("how", ["countdown", "eta"])
def test_delayed_tasks_wait_in_the_store(infer: Infer, app: Celery, stack: Up, how: str) -> None:
    """Not before their time, and meanwhile in nobody's memory."""

    def send(seconds: float) -> Any:
        eta = datetime.fromtimestamp(time.time() + seconds, UTC)
        return infer(tensor(1)).apply_async(**({"countdown": seconds} if how == "countdown" else {"eta": eta}))

    waits = send(600)
    with stack.redis() as client:
        eventually(lambda: client.zscore(KEYS.scheduled, waits.id), 5, "the schedule")
        assert client.hexists(KEYS.scheduled_messages, waits.id)
    assert waits.state == "PENDING"
    app.control.revoke(waits.id)
    at = time.time() + 1
    assert values(send(1).get(timeout=TIMEOUT_S)) == [1]
    assert time.time() >= at - 0.1


def test_a_countdown_that_expires_first(infer: Infer) -> None:
    """Ends as expired when its time comes."""
    sent = infer(tensor(1)).apply_async(countdown=1, expires=0.5)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=TIMEOUT_S)


@pytest.mark.parametrize("priority", [0, 3, 6, 9])
def test_priorities(infer: Infer, priority: int) -> None:
    """Every one of Celery's is served."""
    assert values(infer(tensor(1)).apply_async(priority=priority).get(timeout=TIMEOUT_S)) == [1]


def test_time_limits(infer: Infer) -> None:
    """Give the request up after so many seconds; a soft one too; enough of it harms nobody."""
    slow = infer({"name": "seconds", "datatype": "FP32", "shape": [1, 1], "data": [2]}, model="slow")
    with pytest.raises(TimeLimitExceeded):
        slow.apply_async(time_limit=0.5).get(timeout=TIMEOUT_S)
    with pytest.raises(Exception, match=r"0\.5") as caught:
        slow.apply_async(soft_time_limit=0.5).get(timeout=TIMEOUT_S)
    assert type(caught.value).__name__ == "SoftTimeLimitExceeded"
    assert slow.apply_async(time_limit=20).get(timeout=TIMEOUT_S)


def test_ignored_results_are_not_stored(infer: Infer, app: Celery, stack: Up) -> None:
    """Neither success nor failure; links run all the same."""
    sent = infer(tensor(1)).apply_async(ignore_result=True)
    marker = infer(tensor(2)).apply_async()
    marker.get(timeout=TIMEOUT_S)
    with stack.redis() as client:
        eventually(lambda: not client.exists(KEYS.meta_prefix + sent.id), 10, "no result")
        assert sum(client.hlen(key) for key in client.scan_iter("samphire:worker:*:inflight")) == 0
        failed = infer(tensor(1) | {"name": "nope"}).apply_async(ignore_result=True)
        eventually(lambda: client.exists(KEYS.dead_prefix + failed.id), 10, "the dead letter")
        assert not client.exists(KEYS.meta_prefix + failed.id)


@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_compressed_chains(infer: Infer, compression: str) -> None:
    """The header is honoured."""
    sent = chain(infer(tensor(1)), infer(*FROM_PARENT)).apply_async(compression=compression)
    assert values(sent.get(timeout=TIMEOUT_S)) == [1]


def test_a_beat_schedule(stack: Up, tmp_path: Path) -> None:
    """A real celery beat sends inferences, which are answered."""
    program = f"""
from celery import Celery
app = Celery("beaten", broker={stack.broker_url!r}, backend={stack.broker_url!r})
tensor = {tensor(4)!r}
app.conf.beat_schedule = {{"often": {{
    "task": {INFER!r}, "schedule": 0.3, "kwargs": {{"model_name": "identity", "inputs": [tensor]}},
    "options": {{"queue": "inference", "headers": {{"beaten": "yes"}}, "task_id": "beaten-by-test"}},
}}}}
"""
    (tmp_path / "beaten.py").write_text(program)
    command = [sys.executable, "-m", "celery", "-A", "beaten", "beat", "--schedule", str(tmp_path / "schedule")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            bound(command), cwd=tmp_path, env=clean_environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        with plain_celery(stack.broker_url) as reader:
            answer = AsyncResult("beaten-by-test", app=reader).get(timeout=TIMEOUT_S)
        assert values(answer) == [4]
    finally:
        process.terminate()
        process.wait(20)


def test_inspect(infer: Infer, app: Celery, stack: Up) -> None:
    """Ping, active, reserved, registered, stats and query_task tell the truth."""
    seconds = {"name": "seconds", "datatype": "FP32", "shape": [1, 1], "data": [55]}
    # The model works on one request at a time, and these may not share a micro-batch.
    running = [infer(seconds, model="slow", parameters={"micro_batch": False}).apply_async() for _ in range(2)]
    inspect = app.control.inspect(timeout=1)
    eventually(lambda: any(task.state == "STARTED" for task in running), 10, "a start")
    (active,) = [tasks for name, tasks in inspect.active().items() if name.startswith("worker1@")]
    ids = {task.id for task in running}
    shown = [task for task in active if task["id"] in ids]
    assert shown and shown[0]["name"] == INFER
    assert shown[0]["kwargs"] == "slow: seconds FP32[1, 1]"
    assert shown[0]["time_start"] <= time.time()
    queried = {name: answer for node in inspect.query_task(*ids).values() for name, answer in node.items()}
    assert queried[shown[0]["id"]][0] == "active"
    reserved = {task["id"] for node in inspect.reserved().values() for task in node}
    assert not reserved & {task["id"] for task in active}
    names = [name for name in inspect.ping() if name.startswith("worker1@")]
    assert len(names) == 1
    assert inspect.registered()[names[0]] == [INFER]
    assert inspect.stats()[names[0]]["total"][INFER] > 0
    app.control.revoke(list(ids))
    for task in running:
        with pytest.raises(TaskRevokedError):
            task.get(timeout=TIMEOUT_S)
    assert all(task["id"] not in ids for node in inspect.active().values() for task in node)


def test_revoke_a_scheduled_task(infer: Infer, app: Celery, stack: Up) -> None:
    """REVOKED at once, and nothing of it is left."""
    sent = infer(tensor(1)).apply_async(countdown=60)
    with stack.redis() as client:
        eventually(lambda: client.zscore(KEYS.scheduled, sent.id), 5, "the schedule")
        app.control.revoke(sent.id)
        with pytest.raises(TaskRevokedError):
            sent.get(timeout=TIMEOUT_S)
        eventually(lambda: client.zscore(KEYS.cancelled, sent.id) is None, 10, "the end of its message")
        assert client.zscore(KEYS.scheduled, sent.id) is None


def test_revoke_a_queued_task(infer: Infer, app: Celery, stack: Up) -> None:
    """It does not run when its turn comes; a chain's later steps are told."""
    seconds = {"name": "seconds", "datatype": "FP32", "shape": [1, 1], "data": [1]}
    ahead = [infer(seconds, model="slow", parameters={"micro_batch": False}).apply_async() for _ in range(8)]
    sent = chain(infer(seconds, model="slow"), infer({"name": "input_fp32", "from": "slept"})).apply_async()
    app.control.revoke(sent.parent.id)
    with pytest.raises(TaskRevokedError):
        sent.parent.get(timeout=TIMEOUT_S)
    for task in ahead:
        task.get(timeout=TIMEOUT_S)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=TIMEOUT_S)
    with stack.redis() as client:
        eventually(lambda: client.zscore(KEYS.cancelled, sent.parent.id) is None, 10, "the end of its message")


def test_a_revoked_part_fails_its_chord(infer: Infer, app: Celery, stack: Up) -> None:
    """Nobody waits for ever."""
    part = f"part-{time.time()}"
    later = infer(tensor(1)).set(countdown=60, task_id=part)
    sent = chord([infer(tensor(1)), later], infer(*FROM_PARENT)).apply_async()
    with stack.redis() as client:
        eventually(lambda: client.zscore(KEYS.scheduled, part), 10, "the schedule")
    app.control.revoke(part)
    with pytest.raises((ChordError, TaskRevokedError)):
        sent.get(timeout=TIMEOUT_S)


def test_revoke_somebody_elses_task(app: Celery, stack: Up) -> None:
    """Its state is its own worker's business."""
    (reply,) = app.control.revoke("somebody-else's", reply=True, timeout=2, destination=_samphire_workers(app))
    assert "marked" in str(reply)
    assert AsyncResult("somebody-else's", app=app).state == "PENDING"
    assert app.control.revoke([1, "a"], reply=True, timeout=2, destination=_samphire_workers(app))
    with stack.redis() as client:
        client.delete(KEYS.cancelled)


def test_revoke_an_ended_task(infer: Infer, app: Celery) -> None:
    """Changes nothing."""
    sent = infer(tensor(1)).apply_async()
    sent.get(timeout=TIMEOUT_S)
    (reply,) = [r for r in app.control.revoke(sent.id, reply=True, timeout=2) if next(iter(r)).startswith("worker1@")]
    assert "SUCCESS" in str(reply)
    assert sent.state == "SUCCESS"


@pytest.mark.parametrize("queue", ["inference", "inference.digits", "training"])
def test_the_stock_consumer_is_kept_off_the_lanes_queues(app: Celery, queue: str, stack: Up) -> None:
    """`add_consumer` is refused, and so is `-Q` at start, each with the reason."""
    replies = app.control.add_consumer(queue, reply=True, timeout=2, destination=_samphire_workers(app))
    assert "belongs to Samphire's lanes" in str(replies)
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "samphire_workers.app",
        "worker",
        "-Q",
        f"samphire.control,{queue}",
    ]
    ended = subprocess.run(
        command,
        env=clean_environment() | {"SAMPHIRE_BROKER_URL": stack.broker_url, "SAMPHIRE_TRITON_URLS": stack.triton_grpc},
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )
    assert ended.returncode != 0
    assert f"the queue '{queue}' belongs to Samphire's lanes" in ended.stdout + ended.stderr


def _samphire_workers(app: Celery) -> list[str]:
    return [name for name in app.control.inspect(timeout=1).ping() if name.startswith("worker1@")]


def test_a_chain_waits_for_a_retry(app: Celery, infer: Infer) -> None:
    """The next step begins once, with the answer of the attempt that succeeded."""
    number = {"name": "task", "datatype": "INT64", "shape": [1, 1], "data": [time.time_ns()]}
    failures = {"name": "failures", "datatype": "INT64", "shape": [1, 1], "data": [1]}
    first = infer(number, failures, model="flaky", backoff={"base_s": 0.3})
    last = chain(first, infer({"name": "input_int64", "from": "asked"})).apply_async()
    assert last.get(timeout=TIMEOUT_S)["outputs"][0]["data"] == [2]
    assert last.parent.state == "SUCCESS"


def test_a_chord_waits_for_a_retry_and_is_told_of_a_dead_letter(app: Celery, infer: Infer) -> None:
    """Neither comes early."""

    def flaky(failures: int) -> Any:
        tensors = [
            {"name": name, "datatype": "INT64", "shape": [1, 1], "data": [value]}
            for name, value in (("task", time.time_ns()), ("failures", failures))
        ]
        return infer(*tensors, model="flaky", backoff={"base_s": 0.3}, max_attempts=2)

    body = infer({"name": "input_int64", "from": "asked"})
    asked = chord([flaky(0), flaky(1)])(body).get(timeout=TIMEOUT_S)["outputs"][0]["data"]
    assert sorted(asked) == [1, 2]
    with pytest.raises(Exception, match="not yet"):
        chord([flaky(0), flaky(9)])(body).get(timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("command", "arguments", "reason"),
    [
        ("rate_limit", {"task_name": INFER, "rate_limit": "1/m"}, "has no rate limits"),
        ("time_limit", {"task_name": INFER, "soft": 1, "hard": 2}, "time_limit, soft_time_limit of apply_async"),
        ("cancel_consumer", {"queue": "inference"}, "belongs to the lanes"),
        ("cancel_consumer", {"queue": "inference.identity"}, "belongs to the lanes"),
        ("revoke_by_stamped_headers", {"headers": {"batch": "7"}}, "revoke them by their ids"),
        ("pool_grow", {"n": 2}, "has no pool"),
        ("pool_shrink", {"n": 1}, "has no pool"),
        ("autoscale", {"max": 4, "min": 1}, "has no pool"),
    ],
)
def test_a_command_that_would_do_nothing_is_refused(
    app: Celery, stack: Up, command: str, arguments: dict[str, Any], reason: str
) -> None:
    """With the reason, and what to do instead; never "ok"."""
    mine = [name for name in app.control.inspect(timeout=2).ping() if name.startswith("worker1@")]
    replies = app.control.broadcast(command, arguments=arguments, reply=True, timeout=5, limit=1, destination=mine)
    assert len(replies) == 1
    (answer,) = replies[0].values()
    assert "ok" not in answer and reason in answer["error"]


def test_inspect_scheduled_and_active_queues(app: Celery, infer: Infer) -> None:
    """What waits for its time, and the queues that lanes serve."""
    sent = infer(tensor(1)).apply_async(countdown=60)
    mine = [name for name in app.control.inspect(timeout=2).ping() if name.startswith("worker1@")]
    inspect = app.control.inspect(mine, timeout=3)

    def shown() -> Any:
        (tasks,) = (inspect.scheduled() or {"": []}).values()
        return next((task for task in tasks if task["request"]["id"] == sent.id), None)

    task = eventually(shown, 20, "the scheduled task")
    assert task["request"]["name"] == INFER and "identity: input_fp32 FP32[1, 1]" in task["request"]["kwargs"]
    assert 0 < (datetime.fromisoformat(task["eta"]) - datetime.now(UTC)).total_seconds() <= 60
    (queues,) = inspect.active_queues().values()
    assert {"samphire.control", "inference", "inference.identity"} <= {queue["name"] for queue in queues}
    sent.revoke()
    eventually(lambda: shown() is None, 20, "the end of the scheduled task")


def test_terminate_reaches_the_lane(app: Celery, infer: Infer) -> None:
    """As revoke does."""
    sent = infer(tensor(1)).apply_async(countdown=60)
    eventually(lambda: app.control.inspect(timeout=3).scheduled(), 20, "an answer")
    app.control.terminate(sent.id)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=TIMEOUT_S)
