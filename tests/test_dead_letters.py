"""Dead letters looked at, redriven and purged: by the SDK, by the command, and on the store alone."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samphire import (
    Client,
    InvalidInputError,
    LetterFilter,
    LetterGoneError,
    ModelFaultError,
    ResultTimeoutError,
    UnknownModelError,
)
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from tests.stacks import Up, Valkey, eventually, only, running_stack, samphire
from tests.support.names import KEYS

TIMEOUT_S = 30


def fail(client: Client, value: float = -1) -> str:
    """The id of a task of `picky` that has failed."""
    task = client.submit("picky", {"x": np.array([[value]], np.float32)})
    with pytest.raises(ModelFaultError):
        task.result(TIMEOUT_S)
    return task.id


def test_letters_are_found_by_model_reason_and_time(client: Client, stack: Up) -> None:
    """The newest first; what is shown is what happened."""
    began = datetime.now(UTC) - timedelta(seconds=1)
    first = fail(client)
    with Client(stack.broker_url, validate=False) as careless:
        task = careless.submit("nope", {"x": np.zeros(1)})
        with pytest.raises(UnknownModelError):
            task.result(TIMEOUT_S)
    second = fail(client)
    letters = client.dead_letters.list(LetterFilter(model="picky", since=began))
    assert [letter.id for letter in letters] == [second, first]
    assert {letter.reason for letter in letters} == {"model_fault"}
    found = client.dead_letters.list(LetterFilter(reason="invalid_input", since=began))
    assert [letter.id for letter in found] == [task.id]
    assert client.dead_letters.list(LetterFilter(until=began - timedelta(days=1))) == []
    assert len(client.dead_letters.list(LetterFilter(since=began), limit=2)) == 2
    letter = client.dead_letters.get(first)
    assert (letter.task_id, letter.model, letter.queue) == (first, "picky", "inference.picky")
    assert "negative" in letter.error and letter.message is not None
    assert json.loads(letter.message)["headers"]["id"] == first
    with pytest.raises(InvalidInputError, match="time zone"):
        LetterFilter(since=datetime(2026, 1, 1))


def test_a_redriven_task_is_run_again(client: Client, stack: Up) -> None:
    """With the same id and a budget of its own; who waits gets the new end."""
    task_id = fail(client)
    with stack.redis() as redis:
        assert client.dead_letters.redrive([task_id]) == 1
        with pytest.raises(ModelFaultError):  # the message is what it was
            client.task(task_id).result(TIMEOUT_S)
        again = client.dead_letters.get(task_id)
        assert (again.attempts, again.run) == (3, 2)
        # One that succeeds: the message of a good task, made a letter by hand.
        good = client.submit("picky", {"x": np.array([[1]], np.float32)}, delay_s=60)
        eventually(lambda: redis.hexists(KEYS.scheduled_messages, good.id), TIMEOUT_S, "the schedule")
        held = redis.hget(KEYS.scheduled_messages, good.id)
        list_key, _, message = held.partition(b" ")
        message = message.replace(b'"eta":"', b'"was":"')
        redis.hdel(KEYS.scheduled_messages, good.id)
        redis.zrem(KEYS.scheduled, good.id)
        fields = {"message": message, "list": list_key, "task_id": good.id, "died_at": time.time(), "model": "picky"}
        redis.hset(KEYS.dead_prefix + good.id, mapping=fields)
        redis.zadd(KEYS.dead, {good.id: time.time()})
        redis.set((KEYS.meta_prefix + good.id), '{"status":"FAILURE","task_id":"x","result":{}}')
    assert client.dead_letters.redrive([good.id]) == 1
    assert good.result(TIMEOUT_S).outputs["y"].tolist() == [[2]]
    with pytest.raises(LetterGoneError):
        client.dead_letters.get(good.id)


def test_what_is_not_there_is_said_and_nothing_is_changed(client: Client) -> None:
    """Not even the letters that are there and stand beside it."""
    task_id = fail(client)
    for ask in (client.dead_letters.redrive, client.dead_letters.purge):
        with pytest.raises(LetterGoneError, match="no dead letter 'gone'"):
            ask([task_id, "gone"])
    assert client.dead_letters.get(task_id)
    with pytest.raises(InvalidInputError, match="rate_per_s"):
        client.dead_letters.redrive([task_id], rate_per_s=0)


def test_redriving_keeps_to_its_rate(client: Client) -> None:
    """Many letters come back in a stream, not in a flood."""
    ids = [fail(client) for _ in range(5)]
    began = time.monotonic()
    assert client.dead_letters.redrive(ids, rate_per_s=10) == 5
    assert time.monotonic() - began >= 0.4


def test_without_a_worker_the_request_stands(valkey: Valkey) -> None:
    """The letter is neither lost nor sent twice."""
    fields = {"message": "m", "list": "inference.m", "task_id": "a", "died_at": 1.0}
    valkey.client.hset(KEYS.dead_prefix + "a", mapping=fields)
    valkey.client.zadd(KEYS.dead, {"a": 1.0})
    with Client(valkey.url) as client, pytest.raises(ResultTimeoutError, match="the request stands"):
        client.dead_letters.redrive(["a"], timeout_s=0.2)
    valkey.client.rpush(KEYS.letters, "redrive a", "redrive gone", "junk", "burn a")
    valkey.client.set(KEYS.dead_prefix + "text", "no letter")
    valkey.client.rpush(KEYS.letters, "redrive text", "purge text")

    async def serve() -> int:
        store = Store(Settings(broker_url=valkey.url), "w")
        try:
            return await store.serve_letters()
        finally:
            await store.close()

    assert asyncio.run(serve()) == 7
    assert valkey.client.lrange("inference.m", 0, -1) == [b"m"]
    assert valkey.client.exists(KEYS.dead, KEYS.dead_prefix + "a", KEYS.letters) == 0


def test_a_letter_stays_where_its_queue_is_none(valkey: Valkey) -> None:
    """A push to a key of another type would lose the message."""
    valkey.client.set("inference.m", "no list")
    valkey.client.hset(KEYS.dead_prefix + "a", mapping={"message": "m", "list": "inference.m", "task_id": "a"})
    valkey.client.rpush(KEYS.letters, "redrive a")

    async def serve() -> None:
        store = Store(Settings(broker_url=valkey.url), "w")
        await store.serve_letters()
        await store.close()

    asyncio.run(serve())
    assert valkey.client.hget(KEYS.dead_prefix + "a", "message") == b"m"


def test_the_command(client: Client, stack: Up, tmp_path: Any) -> None:
    """List, show, redrive and purge, each as a person and as a script would."""
    url = stack.broker_url
    task_id = fail(client)
    listed = [
        json.loads(line)
        for line in samphire(url, "dead-letters", "list", "--model", "picky", "--json").stdout.splitlines()
    ]
    assert {letter["id"]: letter for letter in listed}[task_id].keys().isdisjoint({"message", "history"})
    assert task_id in samphire(url, "dead-letters", "list", "--reason", "model_fault", "--since", "2020-01-01").stdout
    shown = samphire(url, "dead-letters", "show", task_id, "--save", str(tmp_path / "message"))
    assert "negative" in shown.stdout
    assert json.loads((tmp_path / "message").read_bytes())["headers"]["id"] == task_id
    assert samphire(url, "dead-letters", "redrive", task_id, "--json").stdout == '{"redriven": 1}\n'
    with pytest.raises(ModelFaultError):
        client.task(task_id).result(TIMEOUT_S)
    refused = samphire(url, "dead-letters", "purge", task_id, stdin="n\n")
    assert refused.returncode == 1 and client.dead_letters.get(task_id)
    assert samphire(url, "dead-letters", "purge", task_id, "--yes").stdout == "1 purged\n"
    gone = samphire(url, "dead-letters", "show", task_id)
    assert gone.returncode == 1 and "LetterGoneError" in gone.stderr
    for arguments in (["purge"], ["redrive"], ["redrive", "a", "--all"], ["list", "--reason", "bad"]):
        assert samphire(url, "dead-letters", *arguments).returncode == 2
    assert samphire(url, "dead-letters", "purge", "--model", "picky", "--yes").returncode == 0
    assert client.dead_letters.list(LetterFilter(model="picky")) == []


def test_the_oldest_letters_go_when_there_are_too_many(tmp_path: Path) -> None:
    """Not before a warning; the newest stay."""
    env = {"SAMPHIRE_DEAD_LETTERS_MAX": "10"}
    models = only(tmp_path, "identity")
    with running_stack(tmp_path, *models, env=env) as up, Client(up.broker_url, validate=False) as client:

        def fail_some(count: int) -> list[str]:
            tasks = [client.submit("nope", {"x": np.zeros(1)}) for _ in range(count)]
            for task in tasks:
                with pytest.raises(UnknownModelError):
                    task.result(TIMEOUT_S)
            return [task.id for task in tasks]

        first = fail_some(8)
        eventually(lambda: "8 dead letters" in up.worker_log(), 20, "the warning")
        assert len(client.dead_letters.list()) == 8
        last = fail_some(10)
        eventually(lambda: len(client.dead_letters.list()) == 10, 20, "the trimming")
        assert {letter.id for letter in client.dead_letters.list()} == set(last)
        assert "8 of the oldest were deleted" in up.worker_log()
        with up.redis() as server:
            assert not server.exists(*(KEYS.dead_prefix + letter for letter in first))
