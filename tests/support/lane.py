"""A real lane, broker and SDK in one process; only Triton is a stand-in, which speaks the same protocol over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import redis
from celery import Celery
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from samphire_broker.embedded.ports import choose_port
from samphire_broker.settings import Settings
from samphire_broker.store import Store, WorkerInfo
from samphire_workers.celery_settings import celery_settings
from samphire_workers.intake.request import Kind
from samphire_workers.lane.lane import Lane
from samphire_workers.monitoring.celery_events import CeleryEvents
from samphire_workers.monitoring.observers import Observer, Observers
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.upkeep.lease import keep_lease
from samphire_workers.upkeep.reaper import reap_others
from tests.support.names import KEYS

Behaviour = Callable[[Any], Awaitable[None]]
"""What a model does before it answers: it may wait, or abort with the context of the call."""


def x(value: float = 1.0) -> dict[str, Any]:
    """Inputs: one FP32 [1, 1]."""
    return {"x": np.full((1, 1), value, np.float32)}


def body(model: str, value: float = 1.0) -> dict[str, Any]:
    """The same as the keyword arguments of a plain Celery producer."""
    return {"model_name": model, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}]}


Streams = Callable[[Any], AsyncIterator[Any]]
"""What a model that streams gives out: responses, for the context of the call."""


def given(value: float, *, final: bool = False, size: int = 1) -> Any:
    """A response with one output."""
    answer = service_pb2.ModelInferResponse(model_name="m", model_version="1")
    answer.outputs.add(name="y", datatype="FP32", shape=[1, size])
    answer.raw_output_contents.append(np.full((1, size), value, np.float32).tobytes())
    answer.parameters["triton_final_response"].bool_param = final
    return service_pb2.ModelStreamInferResponse(infer_response=answer)


def last() -> Any:
    """The empty response that ends a stream."""
    answer = service_pb2.ModelInferResponse(model_name="m", model_version="1")
    answer.parameters["triton_final_response"].bool_param = True
    return service_pb2.ModelStreamInferResponse(infer_response=answer)


def counting(outputs: int, *, end: bool = True) -> Streams:
    """A model that gives out 0, 1, 2, …"""

    async def streams(context: Any) -> AsyncIterator[Any]:
        for number in range(outputs):
            yield given(number)
        if end:
            yield last()

    return streams


def held(*parts: int | asyncio.Event) -> Streams:
    """A model that gives out so many, waits, gives out so many more, and so on; at the end one more."""

    async def streams(context: Any) -> AsyncIterator[Any]:
        number = 0
        for part in parts:
            if isinstance(part, asyncio.Event):
                await part.wait()
                continue
            for _ in range(part):
                yield given(number)
                number += 1
        yield given(number)
        yield last()

    return streams


def until_set(event: asyncio.Event) -> Behaviour:
    """A model that waits for an event."""

    async def behave(context: Any) -> None:
        await event.wait()

    return behave


async def broken(context: Any) -> None:
    """A model that raises."""
    await context.abort(grpc.StatusCode.INTERNAL, "the model raised")


async def away(context: Any) -> None:
    """A Triton that does not answer."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "failed to connect")


def sleeping(seconds: float, then: Behaviour | None = None) -> Behaviour:
    """A model that takes so long."""

    async def behave(context: Any) -> None:
        await asyncio.sleep(seconds)
        if then is not None:
            await then(context)

    return behave


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Models with one FP32 input x and one output y = x + 1."""

    def __init__(self, *models: str) -> None:
        self.models = set(models)
        self.stateful: set[str] = set()
        """Those that keep state between the requests of a sequence."""
        self.is_up = True
        """Else it says of itself and of all models that they are away."""
        self.behave: dict[str, Behaviour] = {}
        self.streams: dict[str, Streams] = {}
        """Models that stream, and what they give out."""
        self.widths: dict[str, int] = {}
        """Size of a model's output beside its rows; by default 1."""
        self.cancelled: list[str] = []
        """Streaming models, as often as their call was cancelled."""
        self.asked: list[str] = []
        """Models, as often as they were asked."""
        self.values: list[float] = []
        """Inputs, in the order in which they came."""
        self.address = ""
        self.statistics = service_pb2.InferStatistics()
        """What it tells of each model."""
        self.looks = 0
        """How often it was asked for them."""

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.is_up)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = service_pb2.RepositoryIndexResponse()
        for name in sorted(self.models):
            answer.models.add(name=name, version="1", state="READY")
        return answer

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        if not self.is_up:
            await away(context)
        if request.name not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        return service_pb2.ModelMetadataResponse(name=request.name, versions=["1"])

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        config = model_config_pb2.ModelConfig(name=request.name, max_batch_size=8)
        if request.name in self.streams:
            config.model_transaction_policy.decoupled = True
        elif request.name in self.stateful:
            config.sequence_batching.SetInParent()
        else:
            config.dynamic_batching.SetInParent()
        config.input.add(name="x", data_type=model_config_pb2.TYPE_FP32, dims=[1])
        config.output.add(name="y", data_type=model_config_pb2.TYPE_FP32, dims=[self.widths.get(request.name, 1)])
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.looks += 1
        answer = service_pb2.ModelStatisticsResponse()
        answer.model_stats.add(name=request.name, version=request.version, inference_stats=self.statistics)
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        if not self.is_up:
            await away(context)
        self.asked.append(request.model_name)
        values = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(list(request.inputs[0].shape))
        self.values += values.ravel().tolist()
        if request.model_name in self.behave:
            await self.behave[request.model_name](context)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        answer.outputs.add(name="y", datatype="FP32", shape=values.shape)
        answer.raw_output_contents.append((values + 1).tobytes())
        return answer

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        try:
            async for request in requests:
                self.asked.append(request.model_name)
                async for response in self.streams[request.model_name](context):
                    yield response
        except (asyncio.CancelledError, GeneratorExit):  # in its own wait, or while a response was sent
            self.cancelled.append(request.model_name)
            raise

    async def start(self) -> None:
        """Serve on a free port."""
        port = choose_port(0, "")
        self.server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(f"127.0.0.1:{port}")
        await self.server.start()
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """Die."""
        await self.server.stop(0)


@contextlib.asynccontextmanager
async def fake_triton(*models: str) -> AsyncIterator[FakeTriton]:
    """A stand-in that serves."""
    triton = FakeTriton(*models)
    await triton.start()
    try:
        yield triton
    finally:
        await triton.stop()


class LaneWorker:
    """What `bootstep.py` runs, in this event loop; `down` is its death without a word."""

    def __init__(
        self,
        url: str,
        triton: FakeTriton,
        kinds: Sequence[Kind] = (),
        observers: Sequence[Observer] = (),
        **settings: Any,
    ) -> None:
        self.kinds = kinds
        self.observers = observers
        self.settings = Settings(broker_url=url, triton_urls=(triton.address,), **settings)
        self.info = WorkerInfo(uuid.uuid4().hex, "w@host", 1)
        self.store = Store(self.settings, self.info.id)
        self.tasks: list[asyncio.Task[None]] = []

    async def up(self) -> None:
        """Beat, reap others, and run the lane."""
        registered = asyncio.Event()
        self.tasks = [
            asyncio.create_task(keep_lease(self.store, self.settings, self.info, registered)),
            asyncio.create_task(reap_others(self.store, self.settings)),
        ]
        await registered.wait()
        app = Celery("samphire")
        app.conf.update(
            **celery_settings(self.settings.broker),
            task_serializer="json",
            result_serializer="json",
            accept_content=["json"],
        )
        self.watch = QueueWatch(self.settings.broker)
        self.canvas = Canvas(app, self.info.hostname)
        self.endpoints = Endpoints(self.settings.triton_urls)
        observers = Observers(CeleryEvents(app, self.info.hostname, 0), *self.observers, now=self.store.clock.now)
        parts = (self.settings, self.store, self.endpoints, self.info, observers, self.watch, self.canvas)
        self.lane = Lane(*parts, self.kinds)
        self.tasks.append(asyncio.create_task(self.lane.run()))

    async def down(self) -> None:
        """End everything at once."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.tasks:
            self.watch.close()
            self.canvas.close()
            await self.endpoints.close()
        await self.store.close()


@contextlib.asynccontextmanager
async def lane_worker(
    url: str,
    triton: FakeTriton,
    kinds: Sequence[Kind] = (),
    observers: Sequence[Observer] = (),
    **settings: Any,
) -> AsyncIterator[LaneWorker]:
    """A worker that runs."""
    worker = LaneWorker(url, triton, kinds, observers, **settings)
    await worker.up()
    try:
        yield worker
    finally:
        await worker.down()


async def until(check: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """The first true value of a check; fails after a while."""
    give_up = time.monotonic() + timeout_s
    while (began := time.monotonic()) < give_up:
        if found := check():
            return found
        # The check blocks this event loop, on which the lane runs too.
        await asyncio.sleep(max(0.01, time.monotonic() - began))
    raise AssertionError(f"{what} did not come true within {timeout_s} s")


def state(client: redis.Redis, task_id: str) -> str | None:
    """Celery's state of a task."""
    raw = client.get(KEYS.meta_prefix + task_id)
    return None if raw is None else str(json.loads(raw)["status"])


def places(client: redis.Redis, task_id: str) -> list[str]:
    """Every key that has a message with this id in it."""
    held = {
        key.decode(): client.lrange(key, 0, -1)
        for key in client.scan_iter(count=10_000, _type="list")
        if not key.startswith(b"samphire:sub:")
    }
    for key in client.scan_iter(count=10_000, _type="hash"):
        if key.endswith((b":inflight", KEYS.scheduled_messages.encode())):
            held[key.decode()] = client.hvals(key)
    return sorted(name for name, messages in held.items() if any(task_id.encode() in message for message in messages))


def remember(client: redis.Redis, task_id: str, **counts: int) -> None:
    """Make a task one that was tried before."""
    mapping: Mapping[str, Any] = {"history": "{}", **counts}
    client.hset(KEYS.task_prefix + task_id, mapping=dict(mapping))
    client.sadd(KEYS.tried, task_id)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run
