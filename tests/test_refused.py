"""A message that is refused, whatever is wrong with it: whoever waits is told, and the letter names the task."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, signature
from celery.canvas import Signature
from celery.result import AsyncResult
from hypothesis import given
from hypothesis import strategies as st

from samphire import Client, InvalidInputError
from samphire.wire.contract import INFER_TASK, UNKNOWN_CHORD
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed
from samphire_workers.intake.loading import load
from samphire_workers.intake.reading import read
from samphire_workers.intake.who_waits import who_waits
from tests.stacks import Up, Valkey, eventually
from tests.support.kinds import KINDS
from tests.support.names import KEYS
from tests.support.plain import plain_celery
from tests.workers import running_worker

TIMEOUT_S = 30
FROM_PARENT = {"name": "input_fp32", "from": "output_fp32"}
TOLD = "expected|not an inference request"
BODY = {"model_name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
LARGE = base64.b64encode(b"\0" * 2**22).decode()


def tensor(value: float) -> dict[str, Any]:
    return {"name": "input_fp32", "datatype": "FP32", "shape": [1, 1], "data": [value]}


@pytest.fixture
def app(stack: Up) -> Iterator[Celery]:
    with plain_celery(stack.broker_url) as app:
        yield app


def infer(app: Celery, *inputs: dict[str, Any], **options: Any) -> Signature:
    return signature(INFER_TASK, kwargs={"model_name": "identity", "inputs": list(inputs)}, app=app).set(
        queue="inference", **options
    )


def wrong(app: Celery, how: str) -> Signature:
    """An inference that is refused before its arguments are understood."""
    made = {
        "a NaN": lambda: infer(app, tensor(float("nan"))),
        "over 4 MiB": lambda: infer(app, {"name": "input_fp32", "datatype": "FP32", "shape": [1, 2**20], "raw": LARGE}),
        "another task": lambda: signature("my.task", app=app).set(queue="inference"),
        "pickle": lambda: infer(app, tensor(1), serializer="pickle"),
        "a parent of another type": lambda: infer(app, tensor(1), headers={"parent_id": 42}),
        "a compression of another type": lambda: infer(app, tensor(1), headers={"compression": 5}),
        "three time limits": lambda: infer(app, tensor(1), headers={"timelimit": [1, 2, 3]}),
        "a numeric eta": lambda: infer(app, tensor(1), headers={"eta": 17}),
        "an unknown compression": lambda: infer(app, tensor(1), headers={"compression": "application/x-brotli"}),
    }
    return made[how]()


UNDERSTOOD = [
    "a NaN",
    "over 4 MiB",
    "another task",
    "a parent of another type",
    "three time limits",
    "a numeric eta",
]
NOT_UNDERSTOOD = ["pickle", "a compression of another type", "an unknown compression"]
"""Of these the canvas cannot be read, only the group."""


@pytest.mark.parametrize("how", UNDERSTOOD + NOT_UNDERSTOOD)
def test_the_task_is_told_and_its_letter_names_it(app: Celery, stack: Up, how: str) -> None:
    """Whoever waits for the task itself."""
    sent = wrong(app, how).apply_async()
    with pytest.raises(Exception, match=TOLD):
        AsyncResult(sent.id, app=app).get(timeout=TIMEOUT_S)
    with stack.redis() as client:
        assert client.hget(KEYS.dead_prefix + sent.id, "task_id") == sent.id.encode()


@pytest.mark.parametrize("how", UNDERSTOOD + NOT_UNDERSTOOD)
@pytest.mark.parametrize("place", ["first", "last"])
def test_the_chord_of_a_refused_part_is_told(app: Celery, how: str, place: str) -> None:
    """Also where the part's canvas cannot be read: its group can, and another part knows the rest."""
    parts = [infer(app, tensor(1)), wrong(app, how)]
    if place == "last":
        parts[1].set(countdown=1)  # of one whose eta is no time that says nothing
    else:
        parts[0].set(countdown=1)
    sent = chord(parts, infer(app, FROM_PARENT)).apply_async()
    with pytest.raises(Exception, match=TOLD):
        AsyncResult(sent.id, app=app).get(timeout=TIMEOUT_S)


@pytest.mark.parametrize("how", UNDERSTOOD)
def test_the_chain_of_a_refused_step_is_told(app: Celery, how: str) -> None:
    """Whoever waits for its end."""
    sent = chain(wrong(app, how), infer(app, FROM_PARENT), infer(app, FROM_PARENT)).apply_async()
    with pytest.raises(Exception, match=TOLD):
        AsyncResult(sent.id, app=app).get(timeout=TIMEOUT_S)


def test_a_producer_that_speaks_protocol_1_is_told(app: Celery, stack: Up) -> None:
    """Alone, and as a part of a chord; its id stands in the message as correlation_id."""
    app.conf.task_protocol = 1
    sent = infer(app, tensor(1)).apply_async()
    with pytest.raises(Exception, match="expected a Celery protocol-2 message"):
        sent.get(timeout=TIMEOUT_S)
    with stack.redis() as client:
        assert client.hget(KEYS.dead_prefix + sent.id, "task_id") == sent.id.encode()
    sent = chord([infer(app, tensor(1)), infer(app, tensor(2))], infer(app, FROM_PARENT)).apply_async()
    with pytest.raises(Exception, match="expected a Celery protocol-2 message"):
        AsyncResult(sent.id, app=app).get(timeout=TIMEOUT_S)


def test_a_chord_of_which_nothing_is_understood(app: Celery, stack: Up) -> None:
    """Nobody knows its body: the log says so, and nothing is repeated."""
    sent = chord([wrong(app, "pickle"), wrong(app, "pickle")], infer(app, FROM_PARENT)).apply_async()
    for part in sent.parent.results:
        with pytest.raises(Exception, match="application/json"):
            part.get(timeout=TIMEOUT_S)
    eventually(lambda: f"the body of chord {sent.parent.id} is not known" in stack.worker_log(), TIMEOUT_S, "the log")
    with stack.redis() as client:
        eventually(
            lambda: not any(client.hlen(key) for key in client.scan_iter("samphire:worker:*:inflight")), 20, "the end"
        )


def test_a_chord_whose_parts_end_further_apart_than_results_live(stack: Up, valkey: Valkey, tmp_path: Path) -> None:
    """Its counters live longer than its parts can wait."""
    with (
        running_worker(tmp_path / "short", valkey.url, stack.triton_grpc, result_ttl_s="1"),
        plain_celery(valkey.url) as app,
    ):
        later = infer(app, tensor(2), countdown=4)
        sent = chord([infer(app, tensor(1)), later], infer(app, FROM_PARENT)).apply_async()
        began = time.monotonic()
        answer = AsyncResult(sent.id, app=app).get(timeout=TIMEOUT_S)
        assert answer["outputs"][0]["data"] == [1.0, 2.0] and time.monotonic() - began > 2


def test_a_chord_whose_producer_lets_it_be_forgotten(app: Celery, stack: Up) -> None:
    """Its counters have expired before its parts have ended: the log says so, and what would help."""
    later = infer(app, tensor(2), countdown=1.5)
    sent = chord([infer(app, tensor(1)), later], infer(app, FROM_PARENT)).apply_async()
    with stack.redis() as client:
        key = f"celery-taskset-meta-{sent.parent.id}"
        eventually(lambda: client.exists(f"{key}.j"), 10, "the first part")
        client.delete(f"{key}.s", f"{key}.j")
    told = f"the counters of chord {sent.parent.id} are gone"
    eventually(lambda: told in stack.worker_log(), TIMEOUT_S, "the log")


# -- what is understood of a message -------------------------------------------------------------------

EMBED = {"callbacks": None, "errbacks": None, "chain": [{"task": "next"}], "chord": {"task": "body"}}
HEADERS = {
    "id": "task-1",
    "task": INFER_TASK,
    "group": "g",
    "group_index": 1,
    "parent_id": "p",
    "samphire_stream": "events:c",
}


def message(body: Any, headers: dict[str, Any] = HEADERS, *, coded: bool = True, **envelope: Any) -> bytes:
    """As kombu writes it."""
    text = body if isinstance(body, str) else json.dumps(body)
    coding = {"body_encoding": "base64"} if coded else {}
    made = {
        "body": base64.b64encode(text.encode()).decode() if coded else text,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {"correlation_id": "task-1", **coding},
    }
    return json.dumps({**made, **envelope}).encode()


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("cut", [0, 5, 20_000, 20_001, 20_002, 20_003])
def test_of_the_end_of_a_message(coded: bool, cut: int) -> None:
    """The canvas stands at the end of the body, wherever its beginning was cut off."""
    decoy = '"{\\"callbacks\\": null}]'
    whole = message([[], {"inputs": [decoy, "x" * 40_000]}, EMBED], coded=coded)
    found = who_waits(whole[cut:], whole=not cut, max_bytes=10**6)
    assert (found.task_id, found.stream) == ("task-1", "events:c")
    assert found.canvas is not None
    assert (found.canvas["chain"], found.canvas["chord"]) == (EMBED["chain"], EMBED["chord"])
    assert (found.canvas["group"], found.canvas["group_index"]) == ("g", 1)


def test_headers_of_another_type_are_left_out() -> None:
    """What is of the right type goes on."""
    found = who_waits(
        message([[], {}, EMBED], {**HEADERS, "parent_id": 42, "retries": "x"}), whole=True, max_bytes=10**6
    )
    assert found.canvas is not None
    assert "parent_id" not in found.canvas and "retries" not in found.canvas and found.canvas["group"] == "g"


def test_a_body_that_is_not_understood_has_a_group() -> None:
    """Whether it is a chord's is found out by who counts its parts."""
    found = who_waits(message("no JSON"), whole=True, max_bytes=10**6)
    assert found.canvas is not None and found.canvas["chord"] == UNKNOWN_CHORD
    assert who_waits(message("no JSON", {"id": "task-1"}), whole=True, max_bytes=10**6).canvas is None


@given(st.binary(max_size=300), st.booleans())
def test_nothing_makes_it_fail(junk: bytes, whole: bool) -> None:
    """Bytes, and bytes within a message."""
    who_waits(junk, whole=whole, max_bytes=1000)
    made = message([[], {}, EMBED])
    for at in (10, len(made) // 2, len(made) - 10):
        mixed = made[:at] + junk + made[at:]
        who_waits(mixed, whole=whole, max_bytes=1000)
        request, _ = read(Claimed("1:inference.m", len(mixed), mixed), Settings(), KINDS)
        assert len(request.task_id) <= 255


def test_deep_nesting_is_refused() -> None:
    """And its id is known all the same."""
    deep = message("[" * 100_000)
    request, error = read(Claimed("1:inference.m", len(deep), deep), Settings(), KINDS)
    assert isinstance(error, InvalidInputError) and request.task_id == "task-1"


@pytest.mark.parametrize("junk", [b'"\xf4x"', b"1e9999"], ids=["no text", "no number"])
def test_what_only_celery_reads_of_a_message_is_the_producers_too(junk: bytes) -> None:
    """A header that the lane skips, and that goes on with the next step of a chain."""
    made = message([[], BODY, EMBED], {**HEADERS, "task": "samphire.infer", "argsrepr": "JUNK"})
    data = made.replace(b'"JUNK"', junk)
    request, error = read(Claimed("1:inference.m", len(data), data), Settings(), KINDS)
    assert isinstance(error, InvalidInputError) and request.task_id == HEADERS["id"]


def in_base64(junk: str) -> bytes:
    """A message whose body, which is no text of the message, has this for its only number."""
    text = json.dumps([[], BODY, {}]).replace("[1.0]", f"[{junk}]").encode("latin-1")
    properties = {"correlation_id": "task-1", "body_encoding": "base64"}
    return message(base64.b64encode(text).decode(), {**HEADERS, "group": None}, coded=False, properties=properties)


def test_a_body_that_is_no_text_is_the_producers() -> None:
    """Whatever of it is asked for."""
    data = in_base64('"\xf4x"')
    _, error = read(Claimed("1:inference.m", len(data), data), Settings(), KINDS)
    assert isinstance(error, InvalidInputError)


def test_a_number_that_is_none_is_the_producers() -> None:
    """It is found only when it is loaded."""
    data = in_base64("1e9999")
    request, error = read(Claimed("1:inference.m", len(data), data), Settings(), KINDS)
    assert error is None
    with pytest.raises(InvalidInputError, match="expected data in JSON"):
        load(request, {})


def test_a_client_whose_message_is_too_large_is_told(stack: Up) -> None:
    """The SDK's message is plain JSON: it is understood from its end too."""
    with Client(stack.broker_url, inline_limit_bytes=2**24, max_request_bytes=2**25) as client:
        import numpy as np

        task = client.submit("identity", {"input_fp32": np.zeros((1, 2**20), np.float32)})
        with pytest.raises(InvalidInputError, match="at most 4194304 bytes"):
            task.result(TIMEOUT_S)
