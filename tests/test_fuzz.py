"""Thousands of malformed messages beside good ones: no lane restarts, no neighbour runs twice, every message ends.

SAMPHIRE_TEST_FUZZ=10000 SAMPHIRE_TEST_SEED=7 pytest tests/test_fuzz.py is the long form.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import random
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samphire import AsyncClient
from samphire.wire import keys
from samphire.wire.envelope import encode_task
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed
from samphire_workers.intake.reading import read
from tests.stacks import Valkey
from tests.support.kinds import KINDS
from tests.support.lane import body, fake_triton, lane_worker, until, x
from tests.support.names import KEYS

COUNT = int(os.environ.get("SAMPHIRE_TEST_FUZZ", "600"))
SEED = int(os.environ.get("SAMPHIRE_TEST_SEED", "11"))
GOOD_IN = 20
"""One in so many is a good task."""

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, -0.0, 1e-320, [], {}, [[]], [None], {"": ""}),
    *("", " ", "x" * 300, "\x00", "\x1b[2J", "\n", "\ud800", "null", "NaN", "inference.m", "samphire:dead", "é\u202e"),
    *("events:c", "samphire.infer", "samphire.canvas", "samphire.chord_part", "celery.chord", "2026-01-01T00:00:00"),
    *(["a"] * 50, {str(n): n for n in range(50)}, {"__type__": "uuid", "__value__": "x"}, {"key": "dead:x", "size": 1}),
]


def valid(rng: random.Random) -> dict[str, Any]:
    """A message as a client, or plain Celery, sends it."""
    kwargs = body("m", rng.randrange(1000))
    if rng.random() < 0.3:
        ref = {"key": "sub:blob:x:0", "size": 4, "sha256": "0" * 64}
        kwargs["inputs"] = [{"name": "x", "datatype": "FP32", "shape": [1, 1], "ref": ref}]
    if rng.random() < 0.3:
        kwargs |= {"parameters": {"a": 1}, "tenant": "t", "max_attempts": 2, "model_version": "1", "outputs": []}
    task_id = str(uuid.UUID(int=rng.getrandbits(128)))
    message: dict[str, Any] = json.loads(encode_task("samphire.infer", task_id, kwargs, "inference.m", 0))
    step = {
        "task": "samphire.infer",
        "args": [],
        "kwargs": kwargs,
        "options": {"queue": "inference.m"},
        "subtask_type": None,
    }
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    if rng.random() < 0.4:
        embed[rng.choice(list(embed))] = [step]  # type: ignore[assignment]
        message["headers"]["group"] = rng.choice([None, "g"])
    message["headers"] |= {"eta": None, "expires": None, "timelimit": [None, None], "samphire_stream": "events:c"}
    decoded = [[], kwargs, embed]
    message["body"] = rng.choice([json.dumps(decoded), decoded])
    return message


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in items:
        found += paths(part, (*path, name))
    return found


def change_one(rng: random.Random, message: dict[str, Any]) -> None:
    """Replace, remove or add something somewhere."""
    *way, last = rng.choice(paths(message))
    place: Any = message
    for name in way:
        place = place[name]
    how = rng.random()
    if how < 0.6:
        place[last] = copy.deepcopy(rng.choice(ODD))
    elif how < 0.8:
        del place[last]
    elif isinstance(place, dict):
        place[str(rng.choice(ODD))[:20]] = copy.deepcopy(rng.choice(ODD))
    else:
        place.append(copy.deepcopy(rng.choice(ODD)))


def coded(rng: random.Random, message: dict[str, Any]) -> dict[str, Any]:
    """The body as text, plain or in base64, as it is on the wire."""
    if isinstance(message.get("body"), list | dict):
        text = json.dumps(message["body"])
        is_plain = rng.random() < 0.5
        message["body"] = text if is_plain else base64.b64encode(text.encode(errors="replace")).decode()
        if not is_plain and isinstance(message.get("properties"), dict):
            message["properties"]["body_encoding"] = "base64"
    return message


def spoilt(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, flipped, doubled or replaced."""
    how = rng.randrange(6)
    at = rng.randrange(len(data))
    if how == 0:
        return data[:at]
    if how == 1:
        return data[at:] or b"x"
    if how == 2:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 3:
        return data + data
    if how == 4:
        return rng.randbytes(rng.randrange(1, 200))
    return b"[" * rng.randrange(1, 100_000)


def malformed(rng: random.Random) -> bytes:
    """A message that is most likely none."""
    message = valid(rng)
    for _ in range(rng.randrange(1, 4)):
        change_one(rng, message)
    data = json.dumps(coded(rng, message)).encode(errors="replace")
    return spoilt(rng, data) if rng.random() < 0.3 else data


CORPUS: list[bytes] = [
    *(
        b"",
        b" ",
        b"{}",
        b"[]",
        b"null",
        b"0",
        b'"',
        b"\xff\xfe",
        b"\x80\x04N.",
        b"\x00" * 100,
        b"{" * 2000,
        b"[" * 200_000,
    ),
    *(b'{"body": "W10=", "headers": {}, "properties": {}}', b'{"body": [], "headers": [], "properties": 1}'),
]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300) | JSON_VALUES.map(lambda value: json.dumps(value).encode(errors="replace")))
def test_no_bytes_make_reading_fail(data: bytes) -> None:
    """What is no message is an error that is told, and never an exception."""
    request, error = read(Claimed("1:inference.m", len(data), data), Settings(), KINDS)
    assert error is not None and request.task_id is not None


@settings(max_examples=400, deadline=None)
@given(st.integers())
def test_no_change_of_a_message_makes_reading_fail(seed: int) -> None:
    """The same for what was one once."""
    rng = random.Random(seed)
    data = malformed(rng)
    read(Claimed("1:inference.m", len(data), data), Settings(), KINDS)


def test_malformed_messages_beside_good_ones(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    """In the queue of a model, and in the intake."""
    asyncio.run(beside_good_ones(valkey, random.Random(SEED)))
    restarts = [record for record in caplog.records if "the lane failed" in record.getMessage()]
    assert not restarts


async def beside_good_ones(valkey: Valkey, rng: random.Random) -> None:
    async with (
        fake_triton("m") as triton,
        lane_worker(valkey.url, triton, backoff_base_s=0, backoff_cap_s=0) as worker,
        AsyncClient(valkey.url) as sdk,
    ):
        await worker.endpoints.some_ready.wait()
        corpus = list(CORPUS)
        good, value = [], 10_000.0
        for n in range(COUNT):
            where = rng.choice(["inference.m", "inference.m\x06\x163", "inference"])
            valkey.client.lpush(where, corpus.pop() if corpus else malformed(rng))
            if n % GOOD_IN == 0:
                value += 1
                good.append((value, await sdk.submit("m", x(value))))
        for expected, task in good:
            assert (await task.result(60)).outputs["y"][0, 0] == expected + 1
        await until(lambda: left(valkey) == 0, "the end of all messages", 120)
        assert not any(task.done() for task in worker.tasks), "lane, lease and reaper go on"
        ours = [expected for expected, _ in good]
        assert sorted(value for value in triton.values if value in set(ours)) == ours, "each once"
        assert valkey.client.zcard(KEYS.dead) > COUNT / 4, "that many were no tasks"
        streams = {key.decode() for key in valkey.client.scan_iter(_type="stream", count=10_000)}
        assert streams <= {KEYS.own("events:c"), KEYS.own(sdk._session.stream)}


def left(valkey: Valkey) -> int:
    """Messages that are neither ended nor waiting for a time of their own."""
    client = valkey.client
    lists = [name for queue in ("inference", "inference.m", "inference.m@t") for name in keys.queue_lists(queue)]
    queued: int = sum(client.llen(name) for name in lists)
    held: int = sum(client.hlen(key) for key in client.scan_iter("samphire:worker:*:inflight", count=10_000))
    return queued + held
