"""The asynchronous client: all of the SDK's logic. `samphire.sync` runs the same on a thread."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import os
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self, overload

from samphire import keys
from samphire.connection import DEFAULT_BROKER_URL, redact
from samphire.contract import (
    INFER_TASK,
    InferRequest,
    InputTensor,
    Ref,
    RequestedOutput,
    check_model_name,
    check_tenant,
)
from samphire.envelope import describe, encode_task, new_task_id
from samphire.errors import ClientClosedError, InvalidInputError, ResultTimeoutError, SamphireError
from samphire.keys import Priority
from samphire.publisher import Publisher
from samphire.results import InferResult, Status
from samphire.tensors import array_to_bytes
from samphire.validation import check_request_size
from samphire.waiter import Look, Waiter

MAP_CHUNK = 256
MAP_CHUNK_BYTES = 4 * 2**20

Inputs = Mapping[str, Any]
"""Input name to an array, or to anything that numpy makes one of."""


class AsyncTask:
    """A handle of one submitted task."""

    def __init__(self, client: AsyncClient, task_id: str, *, own: bool) -> None:
        self._client = client
        self._look: Look = "once" if own else "often"
        self.id = task_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    async def status(self) -> Status:
        """The task's state; a task that nobody knows counts as queued, as in Celery."""
        return await self._client._waiter.status(self.id)

    async def result(self, timeout_s: float | None = None) -> InferResult:
        """Wait for the result.

        Raises:
            ResultTimeoutError: it did not come within `timeout_s`; the task goes on.
            SamphireError: what the task ended with.
        """
        look = self._look
        if look == "once":
            self._look = "now"  # its end may have been told to the first who asked
        return await self._client._result(self.id, timeout_s, look)


class AsyncClient:
    """Submits tasks and reads their results; for one event loop.

    Args:
        broker_url: Redis or Valkey; by default `SAMPHIRE_BROKER_URL`, else redis://localhost:6379/0.
        tenant: whose tasks these are; each tenant has queues of its own.
        queue_limit: a submit to a queue that holds this many messages is refused; 0 for no limit.
        inline_limit_bytes: larger tensors travel as claim checks, beside the queue.
        max_request_bytes: largest sum of a request's tensors.
        blob_ttl_s: lifetime of claim checks; a task that waits longer fails.
    """

    def __init__(
        self,
        broker_url: str | None = None,
        *,
        tenant: str = "",
        queue_limit: int = 1_000_000,
        inline_limit_bytes: int = 8 * 2**10,
        max_request_bytes: int = 16 * 2**20,
        blob_ttl_s: int = 86_400,
    ) -> None:
        check_tenant(tenant)
        self.broker_url = broker_url or os.environ.get("SAMPHIRE_BROKER_URL") or DEFAULT_BROKER_URL
        self.tenant = tenant
        self._inline_limit_bytes = inline_limit_bytes
        self._max_request_bytes = max_request_bytes
        self._stream = keys.stream_key(uuid.uuid4().hex)
        self._publisher = Publisher(self.broker_url, queue_limit=queue_limit, blob_ttl_s=blob_ttl_s)
        self._waiter = Waiter(self.broker_url, self._stream)
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {redact(self.broker_url)}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; who still waits for a result gets `ClientClosedError`."""
        self._closed = True
        await self._waiter.close()
        await self._publisher.close()

    async def submit(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str | int = "champion",
        priority: Priority = "normal",
        outputs: Iterable[str] = (),
        parameters: Mapping[str, bool | int | float | str] | None = None,
    ) -> AsyncTask:
        """Queue one inference and return its handle, as soon as the broker has it.

        Args:
            model: name in the model repository.
            inputs: input name to array, with the batch dimension where the model has one.
            version: version number, or "champion".
            priority: high is served before normal, normal before low, none starves.
            outputs: names of the outputs to return; all by default.
            parameters: OIP parameters for the model; `micro_batch: False` keeps the request alone.

        Raises:
            InvalidInputError: the request can never succeed; nothing was queued.
            QueueFullError, BrokerMemoryFullError: refused; nothing was queued.
            BrokerUnavailableError: no answer; the task may or may not be queued.
        """
        submit = self._encoder(model, version, priority, outputs, parameters)
        task_id, message, blobs = submit(inputs)
        await self._publisher.publish(keys.queue_name(model, self.tenant), _step(priority), [message], blobs)
        return AsyncTask(self, task_id, own=True)

    @overload
    def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: Literal[False] = ...,
        **options: Any,
    ) -> AsyncIterator[InferResult]: ...

    @overload
    def map(
        self, model: str, batches: Iterable[Inputs], *, return_exceptions: Literal[True], **options: Any
    ) -> AsyncIterator[InferResult | SamphireError]: ...

    async def map(
        self, model: str, batches: Iterable[Inputs], *, return_exceptions: bool = False, **options: Any
    ) -> AsyncIterator[InferResult | SamphireError]:
        """Submit every element of `batches` and yield the results in the same order.

        Args:
            model: name in the model repository.
            batches: inputs of one task each.
            return_exceptions: yield the error of a task that failed instead of raising it.
            options: `window`, most tasks under way at once (default 4096), and those of `submit`.

        Raises:
            SamphireError: the first error of a task, unless `return_exceptions`; the rest goes on.
        """
        async for chunk in self._map_chunks(model, batches, **options):
            for result in chunk:
                if isinstance(result, SamphireError) and not return_exceptions:
                    raise result
                yield result

    def task(self, task_id: str) -> AsyncTask:
        """A handle of a task that anybody submitted.

        Raises:
            InvalidInputError: not a task id.
        """
        if not isinstance(task_id, str) or not 1 <= len(task_id) <= 255:
            raise InvalidInputError(f"expected a task id of 1 to 255 characters, given {task_id!r}")
        return AsyncTask(self, task_id, own=False)

    # -- the parts ----------------------------------------------------------------------------------

    async def _map_chunks(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        window: int = 4096,
        version: str | int = "champion",
        priority: Priority = "normal",
        outputs: Iterable[str] = (),
        parameters: Mapping[str, bool | int | float | str] | None = None,
    ) -> AsyncIterator[list[InferResult | SamphireError]]:
        """Like `map`, with the results that are there together in one list."""
        if window < 1:
            raise InvalidInputError(f"expected a window of at least 1, given {window}")
        encode = self._encoder(model, version, priority, outputs, parameters)
        queue, step = keys.queue_name(model, self.tenant), _step(priority)
        source = iter(batches)
        waiting: deque[tuple[str, asyncio.Future[InferResult]]] = deque()
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) < window:
                    encoded: list[tuple[str, bytes, list[tuple[str, bytes]]]] = []
                    nbytes = 0
                    most = min(MAP_CHUNK, window - len(waiting))
                    while len(encoded) < most and nbytes < MAP_CHUNK_BYTES and not exhausted:
                        inputs = next(source, None)
                        if inputs is None:
                            exhausted = True
                            break
                        encoded.append(encode(inputs))
                        nbytes += len(encoded[-1][1]) + sum(len(data) for _, data in encoded[-1][2])
                    if not encoded:
                        break
                    waiting.extend((task_id, self._waiter.expect(task_id, "never")) for task_id, _, _ in encoded)
                    await self._publisher.publish(
                        queue,
                        step,
                        [message for _, message, _ in encoded],
                        [blob for _, _, blobs in encoded for blob in blobs],
                    )
                if not waiting:
                    return
                ready: list[InferResult | SamphireError] = []
                await asyncio.wait([waiting[0][1]])
                while waiting and waiting[0][1].done():
                    task_id, future = waiting.popleft()
                    self._waiter.forget([task_id])
                    error = future.exception()
                    if error is not None and not isinstance(error, SamphireError):
                        raise error
                    ready.append(error if error is not None else future.result())
                yield ready
        finally:
            self._waiter.forget(task_id for task_id, _ in waiting)

    def _encoder(
        self,
        model: str,
        version: str | int,
        priority: str,
        outputs: Iterable[str],
        parameters: Mapping[str, bool | int | float | str] | None,
    ) -> _Encoder:
        if self._closed:
            raise ClientClosedError
        check_model_name(model)
        _step(priority)
        template = InferRequest(
            model_name=model,
            inputs=[],
            model_version="" if version == "champion" else str(version),
            outputs=[RequestedOutput(name) for name in outputs],
            parameters=dict(parameters or {}),
            tenant=self.tenant,
        )
        return _Encoder(template, _step(priority), self._stream, self._inline_limit_bytes, self._max_request_bytes)

    async def _result(self, task_id: str, timeout_s: float | None, look: Look) -> InferResult:
        future = self._waiter.expect(task_id, look)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)  # others may wait for the same
        except TimeoutError as error:
            if future.done():
                raise  # the task's own error
            message = f"task {task_id} has no result after {timeout_s} s; it goes on"
            raise ResultTimeoutError(message) from error
        finally:
            self._waiter.forget([task_id])


class _Encoder:
    """Turns inputs into a task id, a message and claim checks, for one model and one set of options."""

    def __init__(
        self, template: InferRequest, priority: int, stream: str, inline_limit: int, request_limit: int
    ) -> None:
        self._template = template
        self._priority = priority
        self._stream = stream
        self._inline_limit = inline_limit
        self._request_limit = request_limit
        self._queue = keys.queue_name(template.model_name, template.tenant)

    def __call__(self, inputs: Inputs) -> tuple[str, bytes, list[tuple[str, bytes]]]:
        if not isinstance(inputs, Mapping):
            raise InvalidInputError(f"expected inputs as a mapping of name to array, given {type(inputs).__name__}")
        task_id = new_task_id()
        tensors: list[InputTensor] = []
        blobs: list[tuple[str, bytes]] = []
        sizes: list[tuple[str, int]] = []
        for name, value in inputs.items():
            datatype, shape, data = array_to_bytes(name, value)
            sizes.append((name, len(data)))
            if len(data) > self._inline_limit:
                key = f"{keys.BLOB_PREFIX}{task_id}:{len(blobs)}"
                blobs.append((key, data))
                ref = Ref(key, len(data), hashlib.sha256(data).hexdigest())
                tensors.append(InputTensor(name, datatype, shape, ref=ref))
            else:
                raw = binascii.b2a_base64(data, newline=False).decode()
                tensors.append(InputTensor(name, datatype, shape, raw=raw))
        check_request_size(sizes, self._request_limit)
        request = self._template
        request.inputs = tensors
        message = encode_task(
            INFER_TASK,
            task_id,
            request,
            self._queue,
            self._priority,
            kwargsrepr=describe(request),
            headers={"samphire_stream": self._stream},
        )
        return task_id, message, blobs


def _step(priority: str) -> int:
    step = keys.PRIORITIES.get(priority)
    if step is None:
        raise InvalidInputError(f"expected a priority {', '.join(keys.PRIORITIES)}, given {priority!r}")
    return step
