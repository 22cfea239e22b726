"""A kind of task of one's own, through all that a task can meet."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from samphire.wire.contract import Envelope
from samphire_broker.settings import Settings
from samphire_workers.intake.reading import read_arguments
from samphire_workers.intake.request import Kind, Request
from samphire_workers.lane import lane as lane_module
from samphire_workers.lane.kinds import kinds_of
from tests.stacks import Valkey
from tests.support.lane import LaneWorker, fake_triton, lane_worker, state, until
from tests.support.names import KEYS
from tests.support.plain import plain_celery

QUEUES = pytest.mark.parametrize("queue", ["sums", "inference"])


class Sums:
    """The kind: it adds numbers, on a queue of its own or on those of inferences."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.kind = Kind("my.sum", self.read, self.run, queue="" if queue == "inference" else queue)
        self.failures, self.begun = 0, 0
        self.inner: BaseException | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    def read(self, request: Request, envelope: Envelope, settings: Settings) -> None:
        request.payload, _ = read_arguments(request, envelope, settings)

    async def run(self, request: Request) -> dict[str, float]:
        self.begun += 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("not this time")
        if self.inner is not None:
            raise self.inner
        await self.may_end.wait()
        return {"sum": sum(request.payload)}


def send(valkey: Valkey, queue: str, *numbers: Any, task: str = "my.sum", **options: Any) -> str:
    with plain_celery(valkey.url) as app:
        return str(app.send_task(task, numbers, queue=queue, priority=0, **options).id)


def result_of(worker: LaneWorker, valkey: Valkey, task_id: str) -> Any:
    return json.loads(valkey.client.get(KEYS.meta_prefix + task_id) or b"{}").get("result")


@QUEUES
def test_it_is_claimed_retried_dead_lettered_and_redriven(valkey: Valkey, queue: str) -> None:
    """As inferences are: by one budget, with its history."""

    async def test() -> None:
        sums = Sums(queue)
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, [sums.kind], backoff_base_s=0) as w:
            first = send(valkey, queue, 1, 2)
            await until(lambda: state(valkey.client, first) == "SUCCESS", "its result")
            assert result_of(w, valkey, first) == {"sum": 3}
            sums.failures = 4  # three attempts, and one of the next run
            second = send(valkey, queue, 3, 4)
            await until(lambda: state(valkey.client, second) == "FAILURE", "its end")
            letter = valkey.client.hgetall(KEYS.dead_prefix + second)
            assert (letter[b"attempts"], len(json.loads(letter[b"history"]))) == (b"3", 3)
            valkey.client.lpush(KEYS.letters, f"redrive {second}")
            await until(lambda: state(valkey.client, second) == "SUCCESS", "its next run")
            assert result_of(w, valkey, second) == {"sum": 7} and sums.begun == 6
        assert valkey.client.llen(KEYS.of_celery(queue)) == 0

    asyncio.run(test())


@QUEUES
def test_it_is_cancelled_and_given_back(valkey: Valkey, queue: str) -> None:
    """Before it runs, while it runs, and when its worker ends or is lost."""

    async def test() -> None:
        sums = Sums(queue)
        sums.may_end.clear()
        async with fake_triton("one") as triton:
            async with lane_worker(valkey.url, triton, [sums.kind]) as w:
                runs = send(valkey, queue, 1)
                await until(lambda: sums.begun == 1, "its start")
                valkey.client.rpush(KEYS.cancels, f" {runs}")
                await until(lambda: state(valkey.client, runs) == "REVOKED", "its end")
                held = send(valkey, queue, 2)
                await until(lambda: sums.begun == 2, "its start")
                w.lane.hand_back()
                await until(lambda: valkey.client.llen(KEYS.of_celery(queue)) == 1, "its return")
                assert state(valkey.client, held) is None
            sums.may_end.set()
            async with lane_worker(valkey.url, triton, [sums.kind]) as w:
                await until(lambda: state(valkey.client, held) == "SUCCESS", "its result")
                assert result_of(w, valkey, held) == {"sum": 2}

    asyncio.run(test())


@pytest.mark.parametrize("how", ["deadline", "time limit", "cancelled from inside"])
def test_a_run_that_does_not_end_by_itself_has_an_end(valkey: Valkey, how: str) -> None:
    """Its deadline and its time limit end it, and an inner cancellation is no reason to run it for ever."""

    async def test() -> None:
        sums = Sums("sums")
        if how == "cancelled from inside":
            sums.inner = asyncio.CancelledError()
        else:
            sums.may_end.clear()
        limit = {"soft_time_limit": 0.5} if how == "time limit" else {}
        headers = {"samphire_deadline": time.time() + 1.5} if how == "deadline" else {}
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, [sums.kind], max_attempts=1) as w:
            task_id = send(valkey, "sums", 1, headers=headers, **limit)
            await until(lambda: state(valkey.client, task_id) == "FAILURE", "its end")
            error = {"deadline": "EndpointTimeoutError", "time limit": "SoftTimeLimitExceeded"}.get(
                how, "InternalError"
            )
            assert result_of(w, valkey, task_id)["exc_type"] == error
            await until(lambda: not w.lane.requests(), "nothing to be held")

    asyncio.run(test())


def test_what_is_being_started_is_handed_back_too(valkey: Valkey) -> None:
    """It does not run to its end in a worker that ends."""

    async def test() -> None:
        sums = Sums("sums")
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, [sums.kind]) as w:
            start = w.store.start

            async def late(*args: Any) -> Any:
                w.lane.hand_back()
                return await start(*args)

            w.store.start = late  # type: ignore[method-assign]
            task_id = send(valkey, "sums", 1)
            await until(lambda: valkey.client.llen(KEYS.of_celery("sums")) == 1 and not w.lane.requests(), "its return")
            assert sums.begun == 0 and state(valkey.client, task_id) is None

    asyncio.run(test())


def test_a_kind_of_the_table_has_its_queue_served(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that Samphire will have."""
    sums = Sums("sums")
    monkeypatch.setattr(lane_module, "kinds_of", lambda *parts: [*kinds_of(*parts), sums.kind])

    async def test() -> None:
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton) as w:
            task_id = send(valkey, "sums", 1, 2)
            await until(lambda: state(valkey.client, task_id) == "SUCCESS", "its result")
            assert result_of(w, valkey, task_id) == {"sum": 3}

    asyncio.run(test())


def test_a_lost_worker_is_an_attempt_of_what_it_ran(valkey: Valkey) -> None:
    """And another worker runs it again."""

    async def test() -> None:
        sums = Sums("sums")
        sums.may_end.clear()
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, [sums.kind]) as lost:
            task_id = send(valkey, "sums", 5)
            await until(lambda: sums.begun == 1, "its start")
            await lost.down()
            sums.may_end.set()
            async with lane_worker(valkey.url, triton, [sums.kind]) as other:
                await until(lambda: state(valkey.client, task_id) == "SUCCESS", "its result")
                assert result_of(other, valkey, task_id) == {"sum": 5} and sums.begun == 2

    asyncio.run(test())


def test_a_task_on_another_kinds_queue_is_a_dead_letter(valkey: Valkey) -> None:
    """That says what is expected there."""

    async def test() -> None:
        sums = Sums("sums")
        async with fake_triton("one") as triton, lane_worker(valkey.url, triton, [sums.kind]) as w:
            for queue, task in (("sums", "samphire.infer"), ("inference", "my.sum")):
                task_id = send(valkey, queue, 1, task=task)
                await until(lambda task_id=task_id: state(valkey.client, task_id) == "FAILURE", "its end")
                told = result_of(w, valkey, task_id)["exc_message"]
                assert f"on {'the queue sums' if queue == 'sums' else 'an inference queue'}" in told
                assert valkey.client.hget(KEYS.dead_prefix + task_id, "reason") == b"invalid_input"

    asyncio.run(test())
