"""What a backend developer finds in the SDK beyond submit and result, against the real stack."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from samphire import (
    Client,
    EndpointTimeoutError,
    InvalidInputError,
    ModelSignature,
    ProtocolError,
    ResultDeletedError,
    ResultTimeoutError,
    Step,
    Task,
    TaskCancelledError,
    TaskExpiredError,
    TensorSpec,
    UnknownModelError,
    UnknownTaskError,
)
from samphire.client.results import Status
from samphire.wire import keys
from tests.stacks import Up, Valkey, eventually, standing_still
from tests.support.names import KEYS

TIMEOUT_S = 30


def fp32(*values: float) -> dict[str, NDArray[Any]]:
    return {"input_fp32": np.array([values], np.float32)}


def slow(seconds: float) -> dict[str, NDArray[Any]]:
    return {"seconds": np.array([[seconds]], np.float32)}


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "text"),
    [
        ("nope", fp32(1), {}, UnknownModelError, "no model 'nope'; there are .*'digits', .*'identity'"),
        ("digits", {"image": np.zeros((1, 7, 7), np.float32)}, {}, InvalidInputError, r"expected shape \[rows, 8, 8\]"),
        ("digits", {"image": np.zeros((1, 8, 8))}, {}, InvalidInputError, "expected FP32, given FP64"),
        ("digits", {}, {}, InvalidInputError, "missing 'image'"),
        ("digits", {"picture": np.zeros(1)}, {}, InvalidInputError, "missing 'image'"),
        ("digits", {"image": np.zeros((65, 8, 8), np.float32)}, {}, InvalidInputError, "at most 64 rows"),
        ("identity", fp32(1), {"outputs": ["nope"]}, InvalidInputError, "asked for 'nope'"),
        ("identity", fp32(1), {"outputs": "output_fp32"}, InvalidInputError, "a list of names"),
        ("identity", {"input_fp32": [[1], [1, 2]]}, {}, InvalidInputError, "numpy makes none of"),
        (7, fp32(1), {}, InvalidInputError, "expected the model's name as text"),
        ("identity", fp32(1), {"outputs": 7}, InvalidInputError, "a list of names"),
        ("identity", fp32(1), {"priority": "urgent"}, InvalidInputError, "high, normal, low"),
        ("identity", fp32(1), {"priority": []}, InvalidInputError, "high, normal, low"),
        ("identity", fp32(1), {"delay_s": True}, InvalidInputError, "delay_s"),
        ("identity", fp32(1), {"delay_s": -1}, InvalidInputError, "delay_s"),
        ("identity", fp32(1), {"delay_s": float("nan")}, InvalidInputError, "delay_s"),
        ("identity", fp32(1), {"deadline_s": 0}, InvalidInputError, "deadline_s"),
        ("identity", fp32(1), {"delay_s": 5, "deadline_s": 2}, InvalidInputError, "comes before the start"),
        ("identity", fp32(1), {"eta": datetime(2030, 1, 1)}, InvalidInputError, "time zone"),
        ("identity", fp32(1), {"eta": datetime.now(UTC), "delay_s": 1}, InvalidInputError, "given both"),
    ],
)
def test_what_cannot_succeed_is_not_queued(
    client: Client, stack: Up, model: str, inputs: Any, options: Any, error: type[Exception], text: str
) -> None:
    """The error is raised by `submit`, and the broker has nothing of it."""
    with stack.redis() as redis:
        letters = redis.zcard(KEYS.dead)
        with pytest.raises(error, match=text):
            client.submit(model, inputs, **options)
        with pytest.raises(error, match=text):
            outputs = {"outputs": options.pop("outputs")} if "outputs" in options else {}
            client.chain(Step(model, inputs, **outputs), **options)
        assert redis.zcard(KEYS.dead) == letters
        assert all(redis.llen(key) == 0 for key in keys.queue_lists(keys.queue_name("nope")))


@pytest.mark.parametrize("use", ["submit", "map", "client", "chain"])
def test_an_unknown_option_is_an_error(client: Client, stack: Up, use: str) -> None:
    """Python's own, which names it."""
    uses: dict[str, Any] = {
        "submit": lambda: client.submit("identity", fp32(1), urgency=1),
        "map": lambda: list(client.map("identity", [fp32(1)], urgency=1)),
        "client": lambda: Client(stack.broker_url, urgency=1),
        "chain": lambda: client.chain(Step("identity", fp32(1)), urgency=1),
    }
    with pytest.raises(TypeError, match="urgency"):
        uses[use]()


SIGNATURE = ModelSignature("m", ("1",), {"x": TensorSpec("x", "FP32", (2,))}, {"y": TensorSpec("y", "FP32", (2,))}, 0)


def test_without_a_catalogue_nothing_is_refused(valkey: Valkey) -> None:
    """No worker has told anything: the task waits for one."""
    with Client(valkey.url) as client:
        assert client.signature("m") is None
        task = client.submit("m", {"whatever": np.zeros(3)})
        assert task.status() == "queued"
        valkey.client.hset(KEYS.catalogue, "other", b"")  # not all models: this one may be among the others
        assert client.submit("m", {"whatever": np.zeros(3)}).id
    assert valkey.client.llen(keys.queue_list("inference.m", 3)) == 2


def test_a_model_that_has_changed_is_looked_up_again(valkey: Valkey) -> None:
    """What was known of it is no reason to refuse; and what a client need not know, it may skip."""
    valkey.client.hset(KEYS.catalogue, mapping={"m": msgspec.json.encode(SIGNATURE), keys.CATALOGUE_COMPLETE: "1"})
    with Client(valkey.url) as client, Client(valkey.url, validate=False) as careless:
        assert client.signature("m") == SIGNATURE
        with pytest.raises(InvalidInputError):
            client.submit("m", {"x": np.zeros(3, np.float32)})
        with pytest.raises(UnknownModelError):
            client.submit("gone", {})
        wider = dataclasses.replace(SIGNATURE, inputs={"x": TensorSpec("x", "FP32", (3,))})
        valkey.client.hset(KEYS.catalogue, "m", msgspec.json.encode(wider))
        assert client.submit("m", {"x": np.zeros(3, np.float32)}).status() == "queued"
        assert careless.submit("gone", {"x": np.zeros(1)}).status() == "queued"


@pytest.mark.parametrize("how", ["delay_s", "eta"])
def test_a_scheduled_submit(client: Client, how: str) -> None:
    """Is scheduled, then runs, not before its time."""

    def submit(delay_s: float) -> Task:
        if how == "eta":
            return client.submit("identity", fp32(7), eta=datetime.now(UTC) + timedelta(seconds=delay_s))
        return client.submit("identity", fp32(7), delay_s=delay_s)

    waits = submit(600)
    eventually(lambda: waits.status() == "scheduled", 5, "the schedule")
    assert waits.cancel() is True
    began = time.time()
    assert submit(1).result(TIMEOUT_S).outputs["output_fp32"].tolist() == [[7]]
    assert time.time() - began >= 0.95


def test_deadlines(client: Client) -> None:
    """Over before the start: expired; over while it runs: given up; not over: no matter."""
    ahead = [client.submit("slow", slow(0.6), parameters={"micro_batch": False}) for _ in range(3)]
    late = client.submit("slow", slow(0), deadline_s=0.3, priority="low")
    with pytest.raises((TaskExpiredError, EndpointTimeoutError)):
        late.result(TIMEOUT_S)
    for task in ahead:
        task.result(TIMEOUT_S)
    for deadline_s in (0.5, 2.0, 8.0):  # until the machine is not too busy to start it in time
        with pytest.raises((TaskExpiredError, EndpointTimeoutError), match=r"deadline|expired") as ended:
            client.submit("slow", slow(4 * deadline_s), deadline_s=deadline_s).result(TIMEOUT_S)
        if ended.type is EndpointTimeoutError:
            break
    assert ended.type is EndpointTimeoutError
    assert client.submit("identity", fp32(1), deadline_s=20).result(TIMEOUT_S)


def test_an_expired_task_says_so(client: Client, stack: Up) -> None:
    """Nobody could start it in time: the worker stood still until its deadline had passed."""
    (pid,) = stack.ready["pids"]["worker"]
    with standing_still(pid):
        task = client.submit("identity", fp32(1), deadline_s=0.3)
        time.sleep(0.5)  # the deadline passes
        assert task.status() == "queued"
    with pytest.raises(TaskExpiredError):
        task.result(TIMEOUT_S)
    assert task.status() == "expired"


def test_cancel(client: Client) -> None:
    """Scheduled, queued and running tasks end, and say which it was; an ended one stays as it is."""
    scheduled = client.submit("identity", fp32(1), delay_s=60)
    assert scheduled.cancel() is True
    assert scheduled.status() == "cancelled"
    with pytest.raises(TaskCancelledError):
        scheduled.result(TIMEOUT_S)
    assert scheduled.cancel() is True  # it has ended so
    running = client.submit("slow", slow(55), parameters={"micro_batch": False})
    queued = [client.submit("slow", slow(0.1), parameters={"micro_batch": False}) for _ in range(8)]
    eventually(lambda: running.status() == "running", 10, "the start")
    assert queued[-1].cancel() is True
    with pytest.raises(TaskCancelledError, match="before it ran"):
        queued[-1].result(TIMEOUT_S)
    assert running.cancel() is True
    with pytest.raises(TaskCancelledError, match="while it ran"):
        running.result(TIMEOUT_S)
    for task in queued[:-1]:  # they would wait for 55 s if Triton went on with what was cancelled
        assert task.result(40).outputs["slept"].tolist() == [[pytest.approx(0.1)]]
    assert queued[0].cancel() is False
    assert queued[0].status() == "succeeded"


def test_a_chain_that_has_begun_can_be_cancelled(client: Client, stack: Up) -> None:
    """Its last step is no message yet: nobody may say that there is no such task."""
    first = Step("slow", slow(10), parameters={"micro_batch": False})
    task = client.chain(first, Step("identity", {"input_fp32": first["slept"]}))
    with stack.redis() as server:

        def under_way() -> list[bytes]:
            return [
                message
                for key in server.scan_iter("samphire:worker:*:inflight")
                for message in server.hvals(key)
                if b"samphire.infer" in message
            ]

        def has_begun() -> bool:
            messages = under_way()  # first of all the message that starts the chain, which knows the task
            return bool(messages) and not any(task.id.encode() in message for message in messages)

        eventually(has_begun, 10, "the first step")
        assert task.cancel() is True
        with pytest.raises(TaskCancelledError):
            task.result(TIMEOUT_S)
        eventually(lambda: not under_way(), TIMEOUT_S, "the end of the first step")
    assert task.status() == "cancelled"


def test_a_cancel_of_what_is_no_task_says_so(client: Client, stack: Up) -> None:
    """And changes nothing; tasks that nobody has started yet are found wherever they are."""
    unknown = client.task("00000000-0000-0000-0000-000000000000")
    with pytest.raises(UnknownTaskError, match="no task 00000000"):
        unknown.cancel()
    with stack.redis() as server:
        assert not server.exists(KEYS.meta_prefix + unknown.id)
        assert server.zscore(KEYS.cancelled, unknown.id) is None
    (worker,) = stack.ready["pids"]["worker"]
    with standing_still(worker):
        queued = [client.submit("identity", fp32(1), priority=priority) for priority in ("high", "normal", "low")]
        with stack.redis() as server:
            for task in queued:
                server.rpush(KEYS.cancels, f" {task.id}")
    for task in queued:  # whatever the worker takes up first
        with contextlib.suppress(TaskCancelledError):
            task.result(TIMEOUT_S)
    with stack.redis() as server:
        eventually(lambda: not server.exists(KEYS.cancels), 10, "the answers")
        assert all(server.get(KEYS.answer_prefix + task.id) != b"unknown" for task in queued)


def together(client: Client, stack: Up, **first: Any) -> tuple[Task, Task]:
    """Two tasks of 4 s in one micro-batch, under way."""
    (worker,) = stack.ready["pids"]["worker"]
    while True:
        # A worker claims more than one task at once only of a model that was quick of late: ask until it was.
        client.submit("slow", slow(0)).result(TIMEOUT_S)
        with standing_still(worker):
            tasks = client.submit("slow", slow(4.0), **first), client.submit("slow", slow(4.0), deadline_s=60)
        eventually(lambda: "running" in [task.status() for task in tasks], 10, "a start")  # noqa: B023
        if {task.status() for task in tasks} == {"running"}:
            return tasks
        for task in tasks:
            task.cancel()


def test_a_cancelled_member_leaves_its_micro_batch_alone(client: Client, stack: Up) -> None:
    """Its answer is dropped, the others' are not; Triton is told only when nobody waits any more."""
    first, second = together(client, stack)
    assert first.cancel() is True
    assert second.status() == "running"
    assert second.result(TIMEOUT_S).outputs["slept"].tolist() == [[4.0]]
    assert first.status() == "cancelled"


def test_members_of_a_micro_batch_expire_alone(client: Client, stack: Up) -> None:
    """The batch has the time of its longest member; a shorter one is told when its own is over."""
    short, long = together(client, stack, deadline_s=2)
    with pytest.raises(EndpointTimeoutError, match="deadline"):
        short.result(TIMEOUT_S)
    assert long.status() in ("running", "succeeded")
    assert long.result(TIMEOUT_S).outputs["slept"].tolist() == [[4.0]]


def test_a_cancelled_chain_does_not_begin(client: Client) -> None:
    """Not one of its steps."""
    first = Step("identity", fp32(1))
    task = client.chain(first, Step("identity", {"input_fp32": first["output_fp32"]}), delay_s=60)
    eventually(lambda: task.status() == "scheduled", 10, "the schedule")
    assert task.cancel() is True
    with pytest.raises(TaskCancelledError):
        task.result(TIMEOUT_S)


def test_a_cancel_without_a_worker_stands(valkey: Valkey) -> None:
    """The caller is told that nobody has taken it up yet."""
    with Client(valkey.url) as client:
        task = client.submit("m", {"x": np.zeros(1)})
        with pytest.raises(ResultTimeoutError, match="the request stands"):
            task.cancel(timeout_s=0.3)
        assert task.id.encode() in valkey.client.lindex(KEYS.cancels, 0)


def test_events(client: Client) -> None:
    """The states as they come, to the end; also from another client, and from where one left off."""

    def states(task: Task, cancel_at: Status | None = None) -> list[Status]:
        """All of them, each once; in one of them it is cancelled."""
        seen: list[Status] = []
        for event in task.events():
            if event.status == cancel_at and cancel_at not in seen:
                assert task.cancel() is True
            if [event.status] != seen[-1:]:
                seen.append(event.status)
        return seen

    assert states(client.submit("identity", fp32(1), delay_s=600), "scheduled")[-2:] == ["scheduled", "cancelled"]
    assert states(client.submit("slow", slow(55)), "running")[-2:] == ["running", "cancelled"]
    task = client.submit("identity", fp32(1))
    assert states(task)[-1] == "succeeded"
    ended = list(client.task(task.id).events())
    assert [(event.kind, event.status) for event in ended][-1] == ("succeeded", "succeeded")
    assert list(client.task(task.id).events(after=ended[-1].position)) == []


def test_delete_on_read(client: Client, stack: Up) -> None:
    """The second read is a clear error, claim checks are gone, the state stays."""
    big = np.arange(50_000, dtype=np.float32).reshape(1, -1)
    for inputs in (fp32(1), {"input_fp32": big}):
        task = client.submit("identity", inputs)
        assert task.result(TIMEOUT_S, delete=True)

        def deleted(task: Any = task) -> bool:
            try:
                task.result(TIMEOUT_S)
            except ResultDeletedError:
                return True
            except ProtocolError:  # read between the deletion of claim check and result, as it seemed
                return False
            return False

        eventually(deleted, 10, "the deletion")
        assert task.status() == "succeeded"
        with stack.redis() as redis:
            assert not list(redis.scan_iter(f"{KEYS.own(keys.RESULT_BLOB_PREFIX)}:{task.id}:*"))


@pytest.mark.parametrize("stored", [b'{"status":"SUCCESS","task_id":"x","result":{"total":3}}', b"junk", b"[1]"])
def test_an_id_of_another_kind(client: Client, stack: Up, stored: bytes) -> None:
    """Somebody else's task is not taken for an inference."""
    with stack.redis() as redis:
        redis.set((KEYS.meta_prefix + "another"), stored, ex=30)
        with pytest.raises(ProtocolError):
            client.task("another").result(TIMEOUT_S)
        redis.delete(KEYS.meta_prefix + "another")


@pytest.mark.parametrize("task_id", [None, 7, "", "x" * 300])
def test_what_is_no_id(client: Client, task_id: Any) -> None:
    """Is refused."""
    with pytest.raises(InvalidInputError, match="expected a task id"):
        client.task(task_id)


def test_map_reads_ahead_no_further_than_its_window(client: Client) -> None:
    """In tasks and in bytes, and tells how far it is."""
    told: list[tuple[int, int | None]] = []
    for options, most in (({"window": 8}, 8), ({"window_bytes": 4 * 2**20}, 12)):
        read, ahead, yielded = itertools.count(), 0, 0
        last = 0
        told.clear()

        def batches(read: Iterator[int] = read) -> Iterator[dict[str, NDArray[Any]]]:
            nonlocal last
            for _ in range(40):
                last = next(read) + 1
                yield {"input_fp32": np.zeros((1, 100_000), np.float32)}  # 400 KB in, 400 KB out

        for _ in client.map("identity", batches(), progress=lambda n, of: told.append((n, of)), **options):  # type: ignore[call-overload]
            ahead = max(ahead, last - yielded)
            yielded += 1
        assert yielded == 40
        assert ahead <= most
        assert told == [(n, None) for n in range(1, 41)]
    list(client.map("identity", [fp32(n) for n in range(5)], progress=lambda n, of: told.append((n, of))))
    assert told[-1] == (5, 5)


def test_lists_of_python_numbers(client: Client) -> None:
    """They become what the model takes, in a chain as well; what it cannot take is said."""
    task = client.submit("identity", {"input_fp32": [[0.1, 2]]})
    assert task.result(TIMEOUT_S).outputs["output_fp32"].tolist() == np.array([[0.1, 2]], np.float32).tolist()
    chained = client.chain(Step("identity", {"input_fp32": [[0.5]]}), Step("identity", {"input_fp32": [[1.5]]}))
    assert chained.result(TIMEOUT_S).outputs["output_fp32"].tolist() == [[1.5]]
    with pytest.raises(InvalidInputError, match="out of range for FP32"):
        client.submit("identity", {"input_fp32": [[1e39]]})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"version": 99}, "has the versions 1"),
        ({"version": 2.5}, "expected a version number"),
        ({"version": "latest"}, "expected a version number"),
        ({"parameters": {"x": object()}}, "expected a boolean, number or string"),
    ],
)
def test_options_of_the_model_are_checked(client: Client, options: Any, text: str) -> None:
    """By submit and in a chain."""
    with pytest.raises(InvalidInputError, match=text):
        client.submit("identity", fp32(1), **options)
    with pytest.raises(InvalidInputError, match=text):
        client.chain(Step("identity", fp32(1)), Step("identity", fp32(1), **options))
