"""The main job by plain Celery producers, and what cannot be served."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from celery import Celery
from celery.result import AsyncResult

from samphire import (
    Client,
    InvalidInputError,
    ModelFaultError,
    PayloadTooLargeError,
    SamphireError,
)
from samphire.wire import keys
from tests.stacks import Up, eventually
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.test_main_job import TIMEOUT_S, array, fp32


@pytest.fixture
def plain(stack: Up) -> Iterator[Celery]:
    """A Celery application that knows nothing of Samphire."""
    with plain_celery(stack.broker_url) as app:
        yield app


def send(app: Celery, queue: str = "inference", **kwargs: Any) -> AsyncResult:
    return app.send_task("samphire.infer", kwargs=kwargs, queue=queue)


def test_a_plain_celery_producer(plain: Celery) -> None:
    """`send_task` and `AsyncResult.get`: JSON lists in, JSON lists out."""
    sent = send(plain, model_name="identity", inputs=[fp32(1, 2, 3.5)])
    answer = sent.get(timeout=TIMEOUT_S)
    assert sent.state == "SUCCESS"
    assert answer["model_name"] == "identity"
    assert answer["outputs"] == [{"name": "output_fp32", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3.5]}]


def test_a_plain_producer_may_send_bytes_and_name_the_models_queue(plain: Celery) -> None:
    """Raw in, raw out; NaN can only travel so."""
    x = np.array([[1, np.nan]], dtype=np.float32)
    raw = base64.b64encode(x.tobytes()).decode()
    tensor = {"name": "input_fp32", "datatype": "FP32", "shape": [1, 2], "raw": raw}
    answer = send(plain, "inference.identity", model_name="identity", inputs=[tensor]).get(timeout=TIMEOUT_S)
    assert answer["outputs"][0]["raw"] == raw


def test_celery_still_answers(plain: Celery) -> None:
    """The worker is a real Celery worker: ping, registered tasks, queues."""
    inspect = plain.control.inspect(timeout=TIMEOUT_S, limit=1)  # one answer: there is one worker
    (name,) = inspect.ping()
    assert inspect.registered()[name] == ["samphire.infer"]
    queues = [queue["name"] for queue in inspect.active_queues()[name]]
    assert queues[:2] == ["samphire.control", "inference"] and "inference.identity" in queues


def test_task_events_reach_a_monitor(plain: Celery, client: Client) -> None:
    """received, started, succeeded and failed, with arguments that hold no numbers of the tensors."""
    seen: list[dict[str, Any]] = []
    with plain.connection() as connection:
        receiver = plain.events.Receiver(connection, handlers={"*": seen.append})
        monitor = threading.Thread(target=receiver.capture, kwargs={"limit": None, "timeout": None})
        monitor.start()
        try:
            eventually(lambda: seen, 30, "a heartbeat: from now on nothing is missed")
            task = client.submit("identity", {"input_fp32": array(1.0)})
            task.result(TIMEOUT_S)
            failed = client.submit("picky", {"x": array(-1.0)})
            with pytest.raises(ModelFaultError):
                failed.result(TIMEOUT_S)
            eventually(lambda: "task-failed" in {event["type"] for event in seen}, 30, "task-failed")
        finally:
            receiver.should_stop = True
            monitor.join(30)
    kinds = [event["type"] for event in seen if event.get("uuid") == task.id]
    assert kinds == ["task-received", "task-started", "task-succeeded"]
    (received,) = [event for event in seen if event.get("uuid") == task.id and event["type"] == "task-received"]
    assert received["name"] == "samphire.infer"
    assert received["kwargs"] == "identity: input_fp32 FP32[1, 1]"
    (succeeded,) = [event for event in seen if event.get("uuid") == task.id and event["type"] == "task-succeeded"]
    assert succeeded["result"] == str(task.result().timings)
    assert ", Triton " in succeeded["result"] and "; attempt 1, worker worker" in succeeded["result"]
    (failure,) = [event for event in seen if event.get("uuid") == failed.id and event["type"] == "task-failed"]
    assert "negative" in failure["exception"]


def fails(app: Celery, expected: str, text: str, **kwargs: Any) -> None:
    sent = send(app, **kwargs)
    with pytest.raises(Exception, match=text) as caught:
        sent.get(timeout=TIMEOUT_S)
    assert type(caught.value).__name__ == expected
    with Client(str(app.conf.broker_url)) as client, pytest.raises(SamphireError, match=text) as again:
        client.task(sent.id).result(TIMEOUT_S)
    assert type(again.value).__name__ == expected


@pytest.mark.parametrize(
    ("expected", "text", "kwargs"),
    [
        ("UnknownModelError", "no model 'nosuch'", {"model_name": "nosuch", "inputs": []}),
        ("InvalidInputError", "expected a model name", {"model_name": "../digits", "inputs": []}),
        ("InvalidInputError", "expected a tenant name", {"model_name": "digits", "inputs": [], "tenant": "a@b"}),
        ("UnknownModelError", "versions 1, 2", {"model_name": "digits", "inputs": [], "model_version": "9"}),
        ("InvalidInputError", "missing 'image'", {"model_name": "digits", "inputs": []}),
        ("InvalidInputError", "at least one input", {"model_name": "identity", "inputs": []}),
        ("InvalidInputError", "has the inputs .*given 'nope'", {"model_name": "identity", "inputs": [fp32(1, name="nope")]}),
        ("InvalidInputError", "expected FP32, given INT32", {"model_name": "identity", "inputs": [fp32(1, datatype="INT32")]}),
        ("InvalidInputError", "given twice", {"model_name": "identity", "inputs": [fp32(1), fp32(2)]}),
        ("InvalidInputError", r"expected shape \[rows, -1\]", {"model_name": "identity", "inputs": [fp32(1, shape=[1])]}),
        ("InvalidInputError", "at least 1 row", {"model_name": "identity", "inputs": [fp32(shape=[0, 4])]}),
        ("InvalidInputError", "at most 64 rows", {"model_name": "identity", "inputs": [fp32(*[0] * 65, shape=[65, 1])]}),
        ("InvalidInputError", "4 elements, given 3", {"model_name": "identity", "inputs": [fp32(1, 2, 3, shape=[1, 4])]}),
        ("InvalidInputError", "shape .* takes 4000000 bytes", {"model_name": "identity", "inputs": [fp32(1, shape=[1, 10**6])]}),
        ("InvalidInputError", "exactly one of data, raw, ref and from", {"model_name": "identity", "inputs": [fp32(1, data=None)]}),
        ("InvalidInputError", "exactly one of", {"model_name": "identity", "inputs": [fp32(1, raw="AACAPw==")]}),
        ("InvalidInputError", "not base64", {"model_name": "identity", "inputs": [fp32(1, data=None, raw="####")]}),
        ("InvalidInputError", "takes 4 bytes, given 3", {"model_name": "identity", "inputs": [fp32(1, data=None, raw="AACA")]}),
        ("InvalidInputError", "unknown field", {"model_name": "identity", "inputs": [fp32(1)], "surprise": 1}),
        ("InvalidInputError", "contract version 1, given 2", {"model_name": "identity", "inputs": [fp32(1)], "contract": 2}),
        ("InvalidInputError", "asked for 'nope'", {"model_name": "identity", "inputs": [fp32(1)], "outputs": [{"name": "nope"}]}),
        ("InvalidInputError", "parameter 'x'", {"model_name": "identity", "inputs": [fp32(1)], "parameters": {"x": [1]}}),
        ("InvalidInputError", "parameter 'x'", {"model_name": "identity", "inputs": [fp32(1)], "parameters": {"x": 2**70}}),
        ("ModelFaultError", "negative", {"model_name": "picky", "inputs": [fp32(-1, name="x")]}),
    ],
)  # fmt: skip
def test_bad_requests_of_plain_producers(
    plain: Celery, stack: Up, expected: str, text: str, kwargs: dict[str, Any]
) -> None:
    """A clear error to whoever waits, of the same class for Celery and the SDK; the worker goes on."""
    fails(plain, expected, text, **kwargs)
    assert send(plain, model_name="identity", inputs=[fp32(1)]).get(timeout=TIMEOUT_S)


def put_blob(stack: Up, data: bytes, **changed: Any) -> dict[str, Any]:
    key = f"{keys.result_blobs_of('')}{hashlib.sha256(data).hexdigest()[:8]}:0"
    with stack.redis() as redis:
        redis.set(KEYS.own(key), data, ex=60)
    return {"key": key, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("have another sha256", {"sha256": "0" * 64}),
        ("expected 5 bytes behind .*, found 4", {"size": 5}),
        ("has expired or never was", {"key": f"{keys.result_blobs_of('')}none:0"}),
        ("expected a ref to one of the task's own", {"key": "celery-task-meta-secret"}),
        ("size of at least 0", {"size": -1}),
        ("below 2", {"size": 10**30}),
    ],
)
def test_claim_checks_that_do_not_hold(plain: Celery, stack: Up, text: str, changed: dict[str, Any]) -> None:
    """Gone, altered, lying, or pointing at what is none of the producer's business."""
    ref = put_blob(stack, b"\0\0\x80\x3f", **changed)
    fails(plain, "InvalidInputError", text, model_name="identity", inputs=[fp32(1, data=None, ref=ref)])


def test_a_claim_check_over_the_limit_is_refused_unread(plain: Celery, stack: Up) -> None:
    """A 100 MB tensor, as the request says, is never fetched."""
    ref = put_blob(stack, b"\0\0\x80\x3f", size=100_000_000)
    tensor = fp32(1, shape=[1, 25_000_000], data=None, ref=ref)
    fails(plain, "PayloadTooLargeError", "at most 16777216 bytes", model_name="identity", inputs=[tensor])


def test_a_tensor_of_100_mb_is_refused_by_the_sdk(client: Client, stack: Up) -> None:
    """At submit, with nothing queued."""
    with pytest.raises(PayloadTooLargeError, match="'input_fp32' alone has 100000000"):
        client.submit("identity", {"input_fp32": np.zeros((1, 25_000_000), np.float32)})


def dead_letter(stack: Up, message: bytes) -> dict[bytes, bytes]:
    """The letter with exactly these bytes."""

    def find() -> dict[bytes, bytes] | None:
        with stack.redis() as redis:
            for letter in redis.zrange(KEYS.dead, 0, -1, desc=True):
                if redis.hget(KEYS.dead_prefix + letter.decode(), "message") == message:
                    found: dict[bytes, bytes] = redis.hgetall(KEYS.dead_prefix + letter.decode())
                    return found
        return None

    found: dict[bytes, bytes] = eventually(find, 20, "the dead letter")
    return found


def message(task_id: str = "", task: str = "samphire.infer", body: str = "", **headers: Any) -> bytes:
    task_id = task_id or os.urandom(8).hex()
    whole = {
        "body": body or '[[], {"model_name": "identity", "inputs": []}, {}]',
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"id": task_id, "task": task, **headers},
        "properties": {"correlation_id": task_id},
    }
    return json.dumps(whole).encode()


@pytest.mark.parametrize("queue", ["inference", "inference.identity", "inference.picky@someone"])
@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"\x00\xff not a message", b"InvalidInputError"),
        (b"[" * 20_000, b"InvalidInputError"),
        (message(task="other.task"), b"given 'other.task'"),
        (message(body="[" * 20_000), b"not an inference request"),
        (message(eta="tomorrow"), b"expected eta as a time in ISO 8601"),
        (message(expires="2030-13-01T00:00:00"), b"expected expires as a time in ISO 8601"),
    ],
    ids=["bytes", "nested", "other task", "nested body", "eta", "expires"],
)
def test_what_cannot_be_served_becomes_a_dead_letter(
    stack: Up, client: Client, queue: str, raw: bytes, error: bytes
) -> None:
    """With its bytes as they were and the reason; the worker goes on."""
    raw += b" " * (1 + len(queue))  # the same bytes once a queue
    with stack.redis() as redis:
        redis.lpush(queue, raw)
    letter = dead_letter(stack, raw)
    assert letter[b"reason"] == b"invalid_input"
    assert letter[b"queue"] == queue.encode()
    assert error in letter[b"error"]
    client.submit("identity", {"input_fp32": array(1.0)}).result(TIMEOUT_S)


NESTED = "[" * 600 + "]" * 600


HUGE = "9" * 4000


@pytest.mark.parametrize(
    "tensor",
    [
        '"data": [1e999], "shape": [1, 1]',
        f'"data": [{HUGE}{HUGE}], "shape": [1, 1]',
        f'"data": {NESTED}, "shape": [1, 1]',
        f'"data": [1], "shape": [1, {HUGE}{HUGE}]',
        f'"raw": "AACAPw==", "shape": [{HUGE}, {HUGE}]',
        f'"ref": {{"key": "sub:blob:x", "size": {HUGE}{HUGE}, "sha256": ""}}, "shape": [1, 1]',
        '"data": {"a": 1}, "shape": [1, 1]',
        '"data": null, "shape": [1, 1]',
    ],
    ids=["endless", "huge", "nested", "huge dimension", "huge shape", "huge ref", "object", "null"],
)
def test_no_message_wedges_the_lane(stack: Up, client: Client, tensor: str) -> None:
    """Numbers and nestings that make Python itself stumble fail their own task, and no other."""
    task_id = os.urandom(8).hex()
    tensor = f'{{"name": "input_fp32", "datatype": "FP32", {tensor}}}'
    body = (
        f'[[], {{"model_name": "identity", "inputs": [{tensor}, {tensor.replace("input_fp32", "input_fp64")}]}}, {{}}]'
    )
    with stack.redis() as redis:
        redis.lpush("inference.identity", message(task_id, body=body))
    neighbours = [client.submit("identity", {"input_fp32": array(float(i))}) for i in range(20)]
    with pytest.raises(InvalidInputError):
        client.task(task_id).result(TIMEOUT_S)
    for i, task in enumerate(neighbours):
        assert task.result(TIMEOUT_S).outputs["output_fp32"].tolist() == [[float(i)]]
    assert "the lane failed" not in stack.worker_log()


def test_hostile_names_and_wake_ups_harm_nothing(stack: Up, client: Client) -> None:
    """Names that are no queues are ignored, and no other application's list is touched."""
    with stack.redis() as redis:
        redis.sadd(KEYS.queues, b"\xff\xfe", "celery", "inference.x\x06\x16y")
        redis.lpush("celery", "somebody else's")
        redis.lpush(b"inference.m\x06\x16x", "x")
        for payload in (b"\xff", b"celery", b"inference.m\x06\x16x", b"", b"inference.nosuch"):
            redis.publish(KEYS.wake_channel, payload)
        for look in range(2):  # a queue of which the worker hears by its name alone
            queue, task_id = f"inference.identity@look{look}", os.urandom(8).hex()
            redis.lpush(queue, message(task_id))
            redis.sadd(KEYS.queues, queue)
            with pytest.raises(InvalidInputError):
                client.task(task_id).result(TIMEOUT_S)
        client.submit("identity", {"input_fp32": array(1.0)}).result(TIMEOUT_S)
        assert redis.lrange("celery", 0, -1) == [b"somebody else's"]
        redis.delete("celery", b"inference.m\x06\x16x")
        redis.srem(KEYS.queues, b"\xff\xfe", "celery", "inference.x\x06\x16y")
    assert "the lane failed" not in stack.worker_log()


def test_a_message_of_100_mb_becomes_a_dead_letter_and_its_producer_is_told(stack: Up, client: Client) -> None:
    """Its id is read from its end; its bytes stay on the broker."""
    raw = message("too-large", body="[" + " " * 100_000_000)
    with stack.redis() as redis:
        redis.lpush("inference.identity", raw)
        with pytest.raises(PayloadTooLargeError, match="at most 4194304 bytes, given 100000"):
            client.task("too-large").result(60)
        assert redis.hstrlen("samphire:dead:too-large", "message") == len(raw)
        redis.delete("samphire:dead:too-large")
    client.submit("identity", {"input_fp32": array(1.0)}).result(TIMEOUT_S)


def test_a_full_queue_is_refused_at_submit(stack: Up) -> None:
    """The client's own limit, before anything is queued."""
    with Client(stack.broker_url, queue_limit=10, tenant="full") as client, stack.redis() as redis:
        redis.lpush("inference.unheard-of@full", *["x"] * 10)
        with pytest.raises(SamphireError, match="its limit is 10"):
            # More than any lane takes away in between.
            for _ in client.map("identity", ({"input_fp32": array(1.0)} for _ in range(5000)), window=5000):
                pass


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("no/model", {}), "expected a model name"),
        (("identity", [1, 2]), "expected inputs as a mapping"),
        (("identity", {"x": np.array([1j])}), "given complex128"),
        (("identity", {"x": np.array([object()])}), "expected str or bytes elements"),
    ],
)
def test_the_sdk_refuses_what_can_never_work(client: Client, arguments: tuple[Any, ...], text: str) -> None:
    """At submit."""
    with pytest.raises(InvalidInputError, match=text):
        client.submit(*arguments)


def test_the_sdk_refuses_an_unknown_priority(client: Client) -> None:
    """By name, with the names that there are."""
    with pytest.raises(InvalidInputError, match="high, normal, low, given 'urgent'"):
        client.submit("identity", {"input_fp32": array(1.0)}, priority="urgent")  # type: ignore[arg-type]
