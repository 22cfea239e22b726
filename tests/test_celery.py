"""A plain Celery application that knows nothing of Samphire: only Redis, as broker and as result backend."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group, signature
from celery.result import AsyncResult

from tests.stacks import Up, bound, clean_environment, eventually
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
