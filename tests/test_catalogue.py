"""What workers tell of the models, as clients read it: it ends with what told it."""

from __future__ import annotations

import asyncio
import json

import msgspec
import numpy as np
import pytest

from samphire import AsyncClient, InvalidInputError, ModelSignature, ServedModel, Step, TensorSpec
from samphire.wire.keys import CATALOGUE_COMPLETE, CATALOGUE_TROUBLE
from tests.stacks import Valkey
from tests.support.lane import in_a_loop
from tests.support.names import KEYS
from tests.test_store import worker

SIGNATURE = ModelSignature("m", ("1",), {"x": TensorSpec("x", "FP32", (1,))}, {}, 8)
TOLD = msgspec.json.encode(SIGNATURE)


@in_a_loop
async def test_a_model_that_no_worker_tells_is_gone(valkey: Valkey) -> None:
    """Also where the worker that told it has ended without a word, and its broker's memory has outlived it."""
    async with (
        worker(valkey, "first") as first,
        worker(valkey, "second") as second,
        worker(valkey, "third") as third,
        AsyncClient(valkey.url) as client,
    ):
        await first.store.publish_catalogue({"m": TOLD, "only": b"", CATALOGUE_TROUBLE + "only": b"why"})
        await second.store.publish_catalogue({"m": TOLD, "other": b"", CATALOGUE_COMPLETE: b"1"})
        only, other = ServedModel("only", None, "why"), ServedModel("other", None)
        assert await client.models.list() == [ServedModel("m", SIGNATURE), only, other]
        assert await client.models.get("only") == only
        await second.store.publish_catalogue({"m": TOLD})
        assert await client.models.list() == [ServedModel("m", SIGNATURE), only], "others' models stay"
        valkey.client.srem(KEYS.workers, "first")  # as when it is lost
        await third.store.publish_catalogue({"other": b""})
        assert await client.models.list() == [ServedModel("m", SIGNATURE), other]
        await second.store.publish_catalogue({})
        assert await client.models.list() == [other]


@in_a_loop
async def test_what_an_older_version_left_is_taken_out(valkey: Valkey) -> None:
    """Nobody is named as its teller."""
    valkey.client.hset(KEYS.catalogue, mapping={"old": TOLD, CATALOGUE_COMPLETE: "1"})
    async with worker(valkey, "w") as one:
        await one.store.publish_catalogue({"m": TOLD})
    assert valkey.client.hgetall(KEYS.catalogue) == {b"m": TOLD, b"@w": b"m"}


@in_a_loop
async def test_numbers_become_what_a_model_took_last(valkey: Valkey) -> None:
    """While it is not loaded, too: what is queued then runs once it is back."""
    async with worker(valkey, "w") as one, AsyncClient(valkey.url) as client:
        await one.store.publish_catalogue({"m": TOLD})
        assert await client.signature("m") == SIGNATURE
        await one.store.publish_catalogue({"m": b""})
        client._session.catalogue._known.clear()
        assert await client.signature("m") is None
        prepared = await client.prepare("m", {"x": [[1.0]]})
        assert "x FP32[1, 1]" in json.loads(prepared.message)["headers"]["kwargsrepr"]


@in_a_loop
async def test_numbers_for_a_model_that_is_not_loaded(valkey: Valkey) -> None:
    """They are refused, since nobody knows what they become; lists that are none are refused for that."""
    valkey.client.hset(KEYS.catalogue, mapping={"late": "", CATALOGUE_COMPLETE: "1"})
    async with AsyncClient(valkey.url) as client:
        for numbers in ([[1.0]], [1, 2], 3):
            with pytest.raises(InvalidInputError, match=r"model 'late' is not loaded.*send arrays"):
                await client.submit("late", {"x": numbers})
        async with asyncio.timeout(20):  # a model is waited for once, and not for each element
            batches = [{"x": [[float(n)]]} for n in range(200)]
            refused = [error async for error in client.map("late", batches, return_exceptions=True)]
        assert [type(error) for error in refused] == [InvalidInputError] * 200
        with pytest.raises(InvalidInputError, match=r"model 'late' is not loaded.*send arrays"):
            await client.chain(Step("late", {"x": [[1.0]]}))
        with pytest.raises(InvalidInputError, match="equal lengths"):
            await client.submit("late", {"x": [[1.0], [1.0, 2.0]]})
        for known in (np.ones((1, 1), np.float32), [["text"]]):
            await client.submit("late", {"x": known})
        assert valkey.client.llen("inference.late\x06\x163") == 2
    async with AsyncClient(valkey.url) as client:
        submitting = asyncio.create_task(client.submit("late", {"x": [[1.0]]}))
        await asyncio.sleep(0.3)
        valkey.client.hset(KEYS.catalogue, "late", TOLD)  # it is waited for a moment
        task = await submitting
        (message, *_) = valkey.client.lrange("inference.late\x06\x163", 0, -1)
        assert task.id.encode() in message and b"FP32[1, 1]" in message
