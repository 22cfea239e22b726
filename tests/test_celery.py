"""A plain Celery application that knows nothing of Samphire: only Redis, as broker and as result backend."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signature
from celery.exceptions import ChordError, TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from tests.stacks import ENDS_S, Up, bound, clean_environment, eventually, standing_still
from tests.support.names import KEYS
from tests.support.plain import plain_celery

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

TIMEOUT_S = 30
INFER = "samphire.infer"
FROM_PARENT = [{"name": "input_fp32", "from": "output_fp32"}]

FOREIGN_APP = """
from celery import Celery
import os
app = Celery("foreign", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.task_default_queue = os.environ["QUEUE"]
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_hijack_root_logger = False

@app.task(name="foreign.pixels")
def pixels(value):
    tensor = {"name": "prepared", "datatype": "FP32", "shape": [1, 2], "data": [value, value]}
    return {"outputs": [tensor]}

@app.task(name="foreign.total")
def total(answer):
    answers = answer if isinstance(answer, list) else [answer]
    return sum(sum(tensor["data"]) for one in answers for tensor in one["outputs"])

@app.task(name="foreign.note")
def note(answer, key):
    app.backend.client.rpush(key, "called")

@app.task(name="foreign.failed")
def failed(*args, **kwargs):
    import json
    args, key = list(args), kwargs["key"]
    error = app.AsyncResult(args[0]).result
    told = {"args": args, "class": type(error).__name__, "text": str(error)}
    app.backend.client.rpush(key, json.dumps(told))
"""


def tensor(*values: float) -> dict[str, Any]:
    return {"name": "input_fp32", "datatype": "FP32", "shape": [1, len(values)], "data": list(values)}


def values(answer: dict[str, Any]) -> list[float]:
    data: list[float] = answer["outputs"][0]["data"]
    return data


@pytest.fixture
def app(stack: Up) -> Iterator[Celery]:
    """The plain application."""
    with plain_celery(stack.broker_url) as app:
        yield app


Infer = Callable[..., Any]


@pytest.fixture
def infer(app: Celery) -> Infer:
    """A signature of an inference."""

    def make(*inputs: dict[str, Any], model: str = "identity", queue: str = "inference", **kwargs: Any) -> Any:
        arguments = {"model_name": model, "inputs": list(inputs), **kwargs}
        return signature(INFER, kwargs=arguments, app=app).set(queue=queue)

    return make


@pytest.fixture(scope="module")
def foreign(stack: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stock Celery worker with tasks of its own; the name of its queue."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "foreign.py").write_text(FOREIGN_APP)
    queue = "foreign"
    command = [sys.executable, "-m", "celery", "-A", "foreign", "worker", "--pool", "solo", "--queues", queue]
    command += ["--without-gossip", "--without-mingle", "--hostname", "foreign@%h", "--loglevel", "WARNING"]
    environment = clean_environment() | {"BROKER": stack.broker_url, "QUEUE": queue, "PYTHONWARNINGS": "ignore"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            bound(command), cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with plain_celery(stack.broker_url) as probe:
            eventually(lambda: probe.control.ping(["foreign@" + _host()], timeout=0.5), 30, "the foreign worker")
        yield queue
    finally:
        process.terminate()
        process.wait(20)


def _host() -> str:
    import socket

    return socket.gethostname()


# -- canvas -------------------------------------------------------------------------------------------


def test_a_chain_hands_results_on(infer: Infer) -> None:
    """Each step takes an output of the one before; the parents are there too, as in Celery."""
    sent = chain(infer(tensor(1, 2)), infer(*FROM_PARENT), infer(*FROM_PARENT)).apply_async()
    assert values(sent.get(timeout=TIMEOUT_S)) == [1, 2]
    assert sent.parent.successful() and sent.parent.parent.successful()
    assert [child.id for child in sent.parent.children] == [sent.id]


def test_a_chain_by_operator_and_from_one_model_to_another(infer: Infer) -> None:
    """The digits model's probabilities go through the identity model."""
    image = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": [0.5] * 64}
    sent = (infer(image, model="digits") | infer({"name": "input_fp32", "from": "probabilities"})).apply_async()
    answer = sent.get(timeout=TIMEOUT_S)
    assert answer["model_name"] == "identity"
    assert sum(values(answer)) == pytest.approx(1, abs=1e-4)


def test_a_group(infer: Infer) -> None:
    """Its members' results, in order."""
    sent = group(infer(tensor(n)) for n in range(20)).apply_async()
    assert [values(answer) for answer in sent.get(timeout=TIMEOUT_S)] == [[n] for n in range(20)]


def test_a_chord_joins_its_parts(infer: Infer) -> None:
    """Along the first dimension, or one of them by its position."""
    sent = chord([infer(tensor(n, -n)) for n in range(5)], infer(*FROM_PARENT)).apply_async()
    answer = sent.get(timeout=TIMEOUT_S)
    assert answer["outputs"][0]["shape"] == [5, 2]
    assert values(answer) == [0, 0, 1, -1, 2, -2, 3, -3, 4, -4]
    third = {"name": "input_fp32", "from": "output_fp32", "part": 3}
    sent = chord([infer(tensor(n)) for n in range(5)], infer(third)).apply_async()
    assert values(sent.get(timeout=TIMEOUT_S)) == [3]


def test_groups_within_chains_and_chains_within_chords(infer: Infer) -> None:
    """Celery's own nesting rules hold."""
    fan = chain(infer(tensor(2)), group(infer(*FROM_PARENT), infer(*FROM_PARENT)), infer(*FROM_PARENT))
    assert fan.apply_async().get(timeout=TIMEOUT_S)["outputs"][0]["shape"] == [2, 1]
    header = [chain(infer(tensor(n)), infer(*FROM_PARENT)) for n in range(3)]
    assert values(chord(header, infer(*FROM_PARENT)).apply_async().get(timeout=TIMEOUT_S)) == [0, 1, 2]
    nested = chain(
        infer(tensor(1)),
        group(infer(*FROM_PARENT), chain(infer(*FROM_PARENT), infer(*FROM_PARENT))),
        infer(*FROM_PARENT),
        infer(*FROM_PARENT),
    )
    assert values(nested.apply_async().get(timeout=TIMEOUT_S)) == [1, 1]


def test_foreign_tasks_before_and_after(infer: Infer, app: Celery, foreign: str) -> None:
    """In chains and chords, with a stock worker serving the others."""
    prepared = {"name": "input_fp32", "from": "prepared"}
    before = signature("foreign.pixels", args=(3,), app=app).set(queue=foreign)
    after = signature("foreign.total", app=app).set(queue=foreign)
    assert chain(before, infer(prepared), after).apply_async().get(timeout=TIMEOUT_S) == 6
    assert chord([infer(tensor(1)), infer(tensor(2))], after).apply_async().get(timeout=TIMEOUT_S) == 3
    header = [infer(tensor(4)), signature("foreign.pixels", args=(5,), app=app).set(queue=foreign)]
    assert chord(header, after).apply_async().get(timeout=TIMEOUT_S) == 14


def test_links_are_called(infer: Infer, app: Celery, foreign: str, stack: Up) -> None:
    """`link` after a success, `link_error` after a failure, and never the other."""
    with stack.redis() as client:
        keys_used = [f"test:note:{n}" for n in range(4)]
        client.delete(*keys_used)
        good, bad, late, never = (
            signature("foreign.note", kwargs={"key": key}, app=app).set(queue=foreign) for key in keys_used
        )
        infer(tensor(1)).apply_async(link=[good, late], link_error=never).get(timeout=TIMEOUT_S)
        sent = infer(tensor(-1) | {"name": "x"}, model="picky").apply_async(link=never, link_error=bad)
        with pytest.raises(Exception, match="negative"):
            sent.get(timeout=TIMEOUT_S)
        for key in (keys_used[0], keys_used[1], keys_used[2]):
            eventually(lambda key=key: client.llen(key) == 1, TIMEOUT_S, f"the call of {key}")
        assert client.llen(keys_used[3]) == 0
        client.delete(*keys_used)


def test_an_errback_gets_the_id_of_the_task_that_failed(infer: Infer, app: Celery, foreign: str, stack: Up) -> None:
    """And nothing else, as of any errback that the worker does not know; by it, it finds the error."""
    with stack.redis() as client:
        client.delete(key := "test:errback")
        errback = signature("foreign.failed", kwargs={"key": key}, app=app).set(queue=foreign)
        negative = infer(tensor(-1) | {"name": "x"}, model="picky")
        for sent in (
            lambda: negative.apply_async(link_error=errback),
            lambda: chain(negative, infer(*FROM_PARENT)).on_error(errback).apply_async().parent,
        ):
            failed = sent()
            told = json.loads(eventually(lambda: client.lpop(key), TIMEOUT_S, "the call of the errback"))
            assert told["args"] == [failed.id]
            assert told["class"] == "ModelFaultError" and "negative" in told["text"]
        client.delete(key)


def test_an_errbacks_own_arguments_stand_behind_the_id(infer: Infer, app: Celery, stack: Up) -> None:
    """Unless it is immutable: then there is nothing else. Read from the queue as a consumer does."""
    note = signature("unknown.failed", args=("mine",), app=app).set(queue="errbacks")
    alone = signature("unknown.failed", args=("mine",), app=app, immutable=True).set(queue="errbacks")
    sent = infer(tensor(-1) | {"name": "x"}, model="picky").apply_async(link_error=[note, alone])
    with app.connection_for_read() as connection, connection.SimpleQueue("errbacks") as waiting:
        messages = [waiting.get(timeout=TIMEOUT_S) for _ in range(2)]
        for message in messages:
            message.ack()
    assert sorted(len(message.payload[0]) for message in messages) == [1, 2]
    assert all(message.payload[0] in (["mine"], [sent.id, "mine"]) for message in messages)


def routed(app: Celery, step: Any) -> Any:
    """The function of docs/celery.md."""
    return step.set(queue=app.amqp.router.route({}, step.task, step.args, step.kwargs)["queue"].name)


@pytest.mark.parametrize("setting", ["task_routes", "task_default_queue"])
def test_the_routes_of_an_application_hold_for_steps_that_carry_them(
    infer: Infer, app: Celery, foreign: str, setting: str
) -> None:
    """After an inference, in a chord's body, and as a link."""
    app.conf[setting] = {"foreign.*": {"queue": foreign}} if setting == "task_routes" else foreign
    total = routed(app, signature("foreign.total", app=app))
    assert total.options["queue"] == foreign
    assert chain(infer(tensor(1)), total).apply_async().get(timeout=TIMEOUT_S) == 1
    assert chord([infer(tensor(1)), infer(tensor(2))], total).apply_async().get(timeout=TIMEOUT_S) == 3
    linked = total.clone().set(task_id=f"linked-{time.time()}")
    infer(tensor(4)).apply_async(link=linked)
    assert AsyncResult(linked.options["task_id"], app=app).get(timeout=TIMEOUT_S) == 4


def test_a_step_without_a_queue_goes_to_celerys_own(infer: Infer, app: Celery, foreign: str, stack: Up) -> None:
    """Whatever the application's settings say: they are not in the message, and Samphire's workers have others."""
    app.conf.task_routes = {"foreign.*": {"queue": foreign}}
    sent = chain(infer(tensor(1)), signature("foreign.total", app=app)).apply_async()
    assert values(sent.parent.get(timeout=TIMEOUT_S)) == [1]
    with stack.redis() as client:
        (message,) = (one for one in client.lrange("celery", 0, -1) if sent.id.encode() in one)
        client.lrem("celery", 1, message)


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


# -- when -----------------------------------------------------------------------------------------------


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


# -- control --------------------------------------------------------------------------------------------


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


# -- control commands that a lane cannot carry out ---------------------------------------------------------


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
