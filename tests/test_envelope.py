"""Messages: what the SDK writes, kombu reads; what Celery writes, the lane reads; what is broken, nobody trips over."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import time
import uuid
import zlib
from typing import Any

import msgspec
import pytest
from kombu import Connection
from kombu.compression import compress

from samphire.errors import InvalidInputError, PayloadTooLargeError
from samphire.wire import keys
from samphire.wire.contract import INFER_TASK, InferRequest, InputTensor
from samphire.wire.envelope import decode_body, decode_envelope, describe, encode_task, new_task_id, time_of_id
from samphire_broker.queues import inference_queue, intake
from tests.stacks import Valkey
from tests.support.plain import plain_celery

REQUEST = InferRequest("digits", [InputTensor("image", "FP32", [1, 1], raw="AAAAAA==")], tenant="acme")


def test_kombu_reads_what_the_sdk_writes(valkey: Valkey) -> None:
    """A stock kombu consumer gets task, id and arguments out of an SDK message."""
    task_id = new_task_id(time.time())
    queue = inference_queue("digits", "acme")
    message = encode_task(INFER_TASK, task_id, REQUEST, queue.name, 0, headers={"samphire_stream": "events:1"})
    valkey.client.lpush(queue.name, message)
    with Connection(valkey.url) as connection:
        received = connection.SimpleQueue(queue).get(timeout=5)
        received.ack()
    args, kwargs, embed = received.payload
    assert received.headers["task"] == "samphire.infer"
    assert received.headers["id"] == task_id
    assert args == []
    assert kwargs == msgspec.to_builtins(REQUEST)
    assert embed["chain"] is None


def test_task_ids_are_uuids_in_the_order_of_time() -> None:
    """RFC 9562, version 7; ids of others tell no time."""
    now = 1_790_000_000.123
    ids = {new_task_id(now) for _ in range(200)}
    assert len(ids) == 200
    assert {(uuid.UUID(task_id).version, uuid.UUID(task_id).variant) for task_id in ids} == {(7, uuid.RFC_4122)}
    assert {time_of_id(task_id) for task_id in ids} == {now}
    assert max(ids) < min(new_task_id(now + 0.001), new_task_id(now + 3600))
    assert [time_of_id(other) for other in (str(uuid.uuid4()), "", "mine", max(ids) + "0", max(ids).upper())] == [
        None
    ] * 5


@pytest.mark.parametrize("compression", [None, "zlib", "bzip2", "lzma"])
def test_the_lane_reads_what_celery_writes(valkey: Valkey, compression: str | None) -> None:
    """A plain `send_task` decodes to the same request, compressed or not."""
    with plain_celery(valkey.url) as app:
        kwargs = msgspec.to_builtins(REQUEST)
        app.send_task("samphire.infer", kwargs=kwargs, queue=intake(), compression=compression, task_id="an id")
    (raw,) = valkey.client.lrange(keys.INTAKE, 0, -1)
    envelope = decode_envelope(raw)
    assert envelope.headers.id == "an id"
    _, request, canvas = decode_body(envelope, 10_000)
    assert request == REQUEST
    assert canvas.chain is None


def _message(body: str, headers: dict[str, Any] | None = None, **fields: Any) -> bytes:
    message = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": "1", "task": "samphire.infer", **(headers or {})},
        "properties": {},
    }
    return json.dumps(message | fields).encode()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"no json",
        b"\x80\x04\x95",  # a pickle
        b"[]",
        b"{}",
        b'{"body": 1, "headers": {}, "properties": {}}',
        b"[" * 100_000,
        "{'body'}".encode("utf-16"),
        b'{"body": "", "headers": {"id": 7, "task": "x"}, "properties": {}}',
    ],
)
def test_what_is_no_message_is_named(message: bytes) -> None:
    """Anything on a queue gives an error of ours, never another."""
    with pytest.raises(InvalidInputError, match="expected a Celery protocol-2 message in JSON"):
        decode_envelope(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (_message("[" * 50_000), "not an inference request"),
        (_message('[[], {"model_name": "m", "inputs": [], "x": 1}, {}]'), "unknown field `x`"),
        (_message('[[], {"model_name": "m"}, {}]'), "missing required field `inputs`"),
        (_message('[[], {"model_name": NaN}, {}]'), "send such tensors as raw"),
        (_message("gASV", **{"content-type": "application/x-python-serialize"}), "application/json"),
        (_message("***", properties={"body_encoding": "base64"}), "not base64"),
        (_message("AAAA", {"compression": "application/zstd"}), "expected one of the compressions"),
        (_message("no zlib", {"compression": "application/x-gzip"}), "does not decompress"),
    ],
)
def test_what_is_no_request_is_named(message: bytes, expected: str) -> None:
    """The arguments are checked as strictly as the envelope."""
    with pytest.raises(InvalidInputError, match=expected):
        decode_body(decode_envelope(message), 100_000)


@pytest.mark.parametrize(
    ("compression", "bomb"),
    [
        ("application/x-gzip", zlib.compress(b" " * 50_000_000)),
        ("application/x-bz2", bz2.compress(b" " * 50_000_000)),
        ("application/x-lzma", lzma.compress(b" " * 50_000_000)),
    ],
)
def test_a_compression_bomb_does_not_go_off(compression: str, bomb: bytes) -> None:
    """No more is unpacked than the limit."""
    body = base64.b64encode(bomb).decode()
    message = _message(body, {"compression": compression}, properties={"body_encoding": "base64"})
    with pytest.raises(PayloadTooLargeError, match="more than 100000 bytes"):
        decode_body(decode_envelope(message), 100_000)


def test_kombu_and_we_mean_the_same_by_the_compression_header() -> None:
    """The content types are kombu's."""
    assert compress(b"", "zlib")[1] == "application/x-gzip"
    assert compress(b"", "bzip2")[1] == "application/x-bz2"
    assert compress(b"", "lzma")[1] == "application/x-lzma"


def test_a_description_has_no_numbers_of_the_tensor() -> None:
    """Logs and monitors see names, datatypes and shapes."""
    assert describe(REQUEST) == "digits: image FP32[1, 1]"
