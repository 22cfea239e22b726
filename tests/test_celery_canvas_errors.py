"""What becomes of a canvas when a step of it fails, or is not understood."""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery import Celery, chain, chord, signature
from celery.exceptions import ChordError
from celery.result import AsyncResult

from tests.stacks import Up, eventually, standing_still
from tests.support.names import KEYS
from tests.test_celery import (  # noqa: F401
    FROM_PARENT,
    INFER,
    TIMEOUT_S,
    Infer,
    app,
    foreign,
    infer,
    pytestmark,
    tensor,
    values,
)


def test_a_failed_step_fails_the_chain(infer: Infer, stack: Up) -> None:
    """Whoever waits for its end is told, the steps after it never run, the letter is of the step that failed."""
    bad = infer({"name": "input_fp32", "from": "nope"})
    sent = chain(infer(tensor(1)), bad, infer(*FROM_PARENT), infer(*FROM_PARENT)).apply_async()
    with pytest.raises(Exception, match="the task before has the outputs 'output_fp32', from asks for 'nope'"):
        sent.get(timeout=TIMEOUT_S)
    with stack.redis() as client:
        assert client.exists(KEYS.dead_prefix + sent.parent.parent.id)
        assert not client.exists(KEYS.dead_prefix + sent.id)


def test_a_failed_part_fails_the_chord(infer: Infer, app: Celery) -> None:
    """As a ChordError, with the part's error in it."""
    sent = chord([infer(tensor(1)), infer(tensor(-1) | {"name": "x"}, model="picky")], infer(*FROM_PARENT))
    with pytest.raises(Exception, match="negative") as caught:
        sent.apply_async().get(timeout=TIMEOUT_S)
    assert isinstance(caught.value, ChordError) or type(caught.value).__name__ == "ModelFaultError"


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (FROM_PARENT, "there is none: use it in a chain"),
        ([{"name": "input_fp32", "part": 1}], "part goes with from"),
        ([tensor(1) | {"from": "output_fp32"}], "there is none"),
    ],
)
def test_a_from_without_a_parent(infer: Infer, inputs: list[dict[str, Any]], text: str) -> None:
    """Says what it needs."""
    with pytest.raises(Exception, match=text):
        infer(*inputs).apply_async().get(timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"name": "input_fp32", "from": "output_fp32", "data": [1]}, "exactly one of data, raw, ref and from"),
        ({"name": "input_fp32", "from": "output_fp32", "part": 2}, "of a single task's result"),
        ({"name": "input_fp32", "from": "output_fp32", "datatype": "INT32"}, "expected INT32"),
        ({"name": "input_fp32", "from": "output_fp32", "shape": [7]}, r"expected FP32\[7\]"),
        ({"name": "input_int32", "from": "output_fp32"}, "expected INT32, given FP32"),
    ],
)
def test_a_from_that_does_not_fit(infer: Infer, step: dict[str, Any], text: str) -> None:
    """Says what was expected and what came."""
    with pytest.raises(Exception, match=text):
        chain(infer(tensor(1)), infer(step)).apply_async().get(timeout=TIMEOUT_S)


def test_a_parent_that_is_no_inference(infer: Infer, app: Celery, foreign: str) -> None:
    """Says what a result must look like; a step that takes nothing of it does not mind."""
    other = signature("foreign.total", args=({"outputs": []},), app=app).set(queue=foreign)
    with pytest.raises(Exception, match="an object with outputs"):
        chain(other, infer(*FROM_PARENT)).apply_async().get(timeout=TIMEOUT_S)
    assert values(chain(other, infer(tensor(8))).apply_async().get(timeout=TIMEOUT_S)) == [8]


def test_a_canvas_that_celery_does_not_understand(infer: Infer, app: Celery) -> None:
    """Is a failure of that task, and of no other."""
    sent = app.send_task(INFER, kwargs=dict(infer(tensor(1)).kwargs), queue="inference", chain=[{"no": "task"}])
    with pytest.raises(Exception, match="the canvas of the task is not understood"):
        sent.get(timeout=TIMEOUT_S)
    assert values(infer(tensor(1)).apply_async().get(timeout=TIMEOUT_S)) == [1]


def test_large_tensors_go_on_as_claim_checks(infer: Infer) -> None:
    """A plain producer's megabytes reach the next step without a large message."""
    import numpy as np

    from samphire.wire.tensors import array_to_bytes

    big = np.arange(200_000, dtype=np.float32).reshape(1, -1)
    _, shape, data = array_to_bytes("x", big)
    import base64

    first = {"name": "input_fp32", "datatype": "FP32", "shape": shape, "raw": base64.b64encode(data).decode()}
    answer = chain(infer(first), infer(*FROM_PARENT), infer(*FROM_PARENT)).apply_async().get(timeout=TIMEOUT_S)
    assert base64.b64decode(answer["outputs"][0]["raw"]) == data


@pytest.mark.parametrize(
    "queue",
    [
        "samphire:cancelled",
        "samphire:worker:x:started",
        "samphire:sub:cancels",
        "celery-task-meta-x",
        "_kombu.binding.x",
    ],
)
def test_a_next_step_cannot_go_to_a_key_with_state(infer: Infer, stack: Up, queue: str) -> None:
    """A worker has rights that a producer may lack, and does not lend them."""
    with stack.redis() as client:
        before = client.exists(queue)
        sent = chain(infer(tensor(1)), infer(*FROM_PARENT, queue=queue)).apply_async()
        with pytest.raises(Exception, match=r"expected the name of a queue for a next step|WRONGTYPE"):
            sent.parent.get(timeout=TIMEOUT_S)
        part = chord([infer(tensor(1)), infer(tensor(2))], infer(*FROM_PARENT, queue=queue)).apply_async()
        with pytest.raises(Exception, match=r"expected the name of a queue|WRONGTYPE"):
            part.get(timeout=TIMEOUT_S)
        assert client.exists(queue) == before
    assert values(infer(tensor(1)).apply_async().get(timeout=TIMEOUT_S)) == [1]


@pytest.mark.parametrize("group_index", ["abc", [1], {"a": 1}])
def test_a_junk_place_in_a_chord(infer: Infer, app: Celery, stack: Up, group_index: Any) -> None:
    """Is that task's failure, or a dead letter; nothing is repeated for ever."""
    member = infer(tensor(1))
    body = infer(*FROM_PARENT)
    sent = app.send_task(
        INFER,
        kwargs=dict(member.kwargs),
        queue="inference",
        group_id="junk-group",
        group_index=group_index,
        chord=dict(body),
    )
    with pytest.raises(Exception, match="canvas of the task is not understood"):
        sent.get(timeout=TIMEOUT_S)
    _nothing_in_flight(stack)


def test_wrong_arguments_are_told_to_the_whole_canvas(infer: Infer, app: Celery, foreign: str, stack: Up) -> None:
    """Also such that make the message no inference at all."""
    wrong = infer(tensor(1), typo=1)
    later = infer(*FROM_PARENT).set(task_id=f"later-{time.time()}")
    with stack.redis() as client:
        key = "test:note:wrong"
        client.delete(key)
        note = signature("foreign.note", kwargs={"key": key}, app=app).set(queue=foreign)
        wrong.apply_async(link_error=note)
        eventually(lambda: client.llen(key) == 1, TIMEOUT_S, "the call of link_error")
        client.delete(key)
    chain(wrong, later).apply_async()
    with pytest.raises(Exception, match="typo"):
        AsyncResult(later.options["task_id"], app=app).get(timeout=TIMEOUT_S)
    with pytest.raises(Exception, match="typo"):
        chord([infer(tensor(1)), wrong], infer(*FROM_PARENT)).apply_async().get(timeout=TIMEOUT_S)


def test_an_inference_as_errback(infer: Infer, app: Celery) -> None:
    """A fallback model is sent like any other task."""
    fallback = infer(tensor(5)).set(task_id=f"fallback-{time.time()}")
    infer(tensor(-1) | {"name": "x"}, model="picky").apply_async(link_error=fallback)
    assert values(AsyncResult(fallback.options["task_id"], app=app).get(timeout=TIMEOUT_S)) == [5]


def test_a_chord_whose_last_part_met_a_lost_worker(infer: Infer, app: Celery, stack: Up) -> None:
    """It had taken the body on, and died: the body is sent all the same, once its claim has lapsed."""
    with stack.redis() as client:
        with standing_still(stack.ready["pids"]["worker"][0]):
            sent = chord([infer(tensor(1)), infer(tensor(2))], infer(*FROM_PARENT)).apply_async()
            group_id = sent.parent.id
            client.set(f"celery-taskset-meta-{group_id}.c", "the lost worker's")
        eventually(lambda: client.zcard(f"celery-taskset-meta-{group_id}.j") == 2, 10, "both parts")
        assert not sent.ready()
        client.expire(f"celery-taskset-meta-{group_id}.c", 1)
        assert values(sent.get(timeout=TIMEOUT_S)) == [1, 2]
        assert client.get(f"celery-taskset-meta-{group_id}.c") == b"done"


def test_a_stored_exit_is_no_exit(app: Celery, stack: Up, client: Any) -> None:
    """What another task's stored exception says is not done to the worker."""
    from samphire.wire.contract import CHORD_PART_TASK, ChordMember, ChordPart
    from samphire.wire.envelope import encode_task

    before = stack.ready["pids"]["worker"]
    for module, name in (("builtins", "SystemExit"), ("asyncio.exceptions", "CancelledError")):
        stored = {"exc_type": name, "exc_module": module, "exc_message": ["7"]}
        body = {"task": INFER, "args": [], "kwargs": {}, "options": {}, "subtask_type": None, "immutable": False}
        part = ChordPart(ChordMember("exit", f"exit-{name}", body, 0), "FAILURE", stored)
        with stack.redis() as redis:
            redis.lpush("inference", encode_task(CHORD_PART_TASK, f"exit-{name}", part, "inference", 0))
    _nothing_in_flight(stack)
    assert stack.ready["pids"]["worker"] == before


def _nothing_in_flight(stack: Up) -> None:
    with stack.redis() as client:

        def empty() -> bool:
            held = sum(client.hlen(key) for key in client.scan_iter("samphire:worker:*:inflight"))
            return held == 0 and client.llen("inference") == 0

        eventually(empty, 20, "the end of everything in flight")
