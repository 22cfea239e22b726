"""The asynchronous client: all of the SDK's logic. `samphire.sync` runs the same on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, overload

from samphire import keys
from samphire.catalogue import Catalogue
from samphire.clock import BrokerClock
from samphire.connection import DEFAULT_BROKER_URL, redact
from samphire.contract import Backoff, check_tenant
from samphire.dead_letters import AsyncDeadLetters
from samphire.encoder import (
    Encoded,
    Encoder,
    Inputs,
    Limits,
    Parameters,
    idempotency,
    priority_step,
    request_for,
    when,
)
from samphire.errors import (
    BrokerMemoryFullError,
    BrokerUnavailableError,
    ClientClosedError,
    InvalidInputError,
    ResultTimeoutError,
    SamphireError,
    UnknownTaskError,
)
from samphire.keys import Priority
from samphire.pipeline import Stage, StepOptions, encode_chain, stages_of
from samphire.publisher import Publisher
from samphire.results import TERMINAL, InferResult, Status
from samphire.validation import ModelSignature
from samphire.waiter import Look, Waiter

MAP_CHUNK = 256
MAP_CHUNK_BYTES = 4 * 2**20
LOOK_MIN_S = 0.01
LOOK_MAX_S = 0.5
CANCEL_AGAIN_S = 1.0
"""Between two requests to cancel a task that has not been answered."""

_END = object()

Progress = Callable[[int, int | None], None]
"""Called with how many results there are, and how many there will be if that is known."""


@dataclass(frozen=True)
class TaskEvent:
    """A state that a task was seen in."""

    task_id: str
    status: Status
    at: float
    """When it was seen, in s since 1970."""


class AsyncTask:
    """A handle of one submitted task."""

    def __init__(self, client: AsyncClient, task_id: str, look: Look) -> None:
        self._client = client
        self._look: Look = look
        self.id = task_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    async def status(self) -> Status:
        """The task's state; a task that nobody knows counts as queued, as in Celery."""
        self._client._check_usable()
        return await self._client._waiter.status(self.id)

    async def result(self, timeout_s: float | None = None, *, delete: bool = False) -> InferResult:
        """Wait for the result.

        Args:
            timeout_s: how long; for ever by default.
            delete: the result is deleted once it was read; a later read raises `ResultDeletedError`. Should the
                broker go away meanwhile, it stays until its lifetime is over.

        Raises:
            ResultTimeoutError: it did not come within `timeout_s`; the task goes on.
            ResultExpiredError: the task has ended, and its result's lifetime is over.
            SamphireError: what the task ended with.
        """
        look = self._look
        if isinstance(look, int):
            self._look = "now"  # its end may have been told to the first who asked
        result = await self._client._result(self.id, timeout_s, look)
        if delete:
            # The caller must not lose the result because nobody hears that it may go: then it goes with its lifetime.
            with contextlib.suppress(BrokerUnavailableError, BrokerMemoryFullError):
                await self._client._publisher.request(keys.DELETES, self.id)
        return result

    async def cancel(self, timeout_s: float = 5.0) -> bool:
        """End the task, whether it is queued, scheduled or running; whether it has ended so.

        A running request is cancelled at Triton when every member of its micro-batch is; otherwise its answer is
        dropped. The error of `result` says which it was. A task that has ended before is left as it is: then the
        answer is False.

        Raises:
            UnknownTaskError: it is nowhere; nothing was changed. Where thousands of messages are queued nobody looks
                for it, and an id is believed.
            ResultTimeoutError: the task has not ended within `timeout_s`; the request stands.
        """
        client = self._client
        client._check_usable()
        request = f"{client._stream} {self.id}"
        await client._publisher.request(keys.CANCELS, request)
        asked_at, interval_s = time.monotonic(), LOOK_MIN_S
        try:
            async with asyncio.timeout(timeout_s):
                while (status := await self.status()) not in TERMINAL:
                    is_stored = status not in ("queued", "scheduled")
                    answer = "" if is_stored else await client._waiter.cancel_answer(self.id)
                    if answer == "unknown":
                        raise UnknownTaskError(f"no task {self.id} is queued, scheduled, running or ended")
                    if answer in TERMINAL:  # before, and its result has expired
                        return answer == "cancelled"
                    if time.monotonic() - asked_at >= CANCEL_AGAIN_S:  # the worker that took it up may have died
                        await client._publisher.request(keys.CANCELS, request)
                        asked_at = time.monotonic()
                    await asyncio.sleep(interval_s)
                    interval_s = min(interval_s * 1.2, LOOK_MAX_S)
        except TimeoutError as error:
            message = f"task {self.id} has not ended within {timeout_s} s of its cancellation; the request stands"
            raise ResultTimeoutError(message) from error
        return status == "cancelled"

    async def events(self, after: Status | None = None) -> AsyncIterator[TaskEvent]:
        """The task's states as they are seen, until it has ended; a state that passes between two looks is not seen.

        Args:
            after: begin once the task is seen in another state than this one, the last that the caller knows.
        """
        last, interval_s = after, LOOK_MIN_S
        while True:
            status = await self.status()
            if status != last:
                last, interval_s = status, LOOK_MIN_S
                yield TaskEvent(self.id, status, time.time())
            if status in TERMINAL:
                return
            await asyncio.sleep(interval_s)
            interval_s = min(interval_s * 1.2, LOOK_MAX_S)


class AsyncClient:
    """Submits tasks and reads their results; for one event loop of one process.

    Args:
        broker_url: Redis or Valkey; by default `SAMPHIRE_BROKER_URL`, else redis://localhost:6379/0.
        tenant: whose tasks these are; each tenant has queues of its own.
        queue_limit: a submit to a queue that holds this many messages is refused; 0 for no limit.
        inline_limit_bytes: larger tensors travel as claim checks, beside the queue.
        max_request_bytes: largest sum of a request's tensors.
        blob_ttl_s: lifetime of claim checks; a task that waits longer fails.
        idempotency_ttl_s: how long an idempotency key is known; results should live as long.
        validate: check requests against what the workers tell of the models, before anything is queued.
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
        idempotency_ttl_s: int = 3600,
        validate: bool = True,
    ) -> None:
        check_tenant(tenant)
        self.broker_url = broker_url or os.environ.get("SAMPHIRE_BROKER_URL") or DEFAULT_BROKER_URL
        self.tenant = tenant
        if idempotency_ttl_s < 1:
            raise InvalidInputError(f"expected idempotency_ttl_s of at least 1, given {idempotency_ttl_s}")
        self._idempotency_ttl_s = idempotency_ttl_s
        self._limits = Limits(inline_limit_bytes, max_request_bytes)
        self._stream = keys.stream_key(uuid.uuid4().hex)
        self._publisher = Publisher(self.broker_url, queue_limit=queue_limit, blob_ttl_s=blob_ttl_s)
        self._waiter = Waiter(self.broker_url, self._stream)
        self._catalogue = Catalogue(self._publisher.connection)
        self._clock = BrokerClock(self._publisher.connection)
        self._validate = validate
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __repr__(self) -> str:
        tenant = f" tenant={self.tenant}" if self.tenant else ""
        closed = " closed" if self._closed else ""
        return f"<{type(self).__name__} {redact(self.broker_url)}{tenant}{closed}>"

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
        parameters: Parameters | None = None,
        eta: datetime | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        max_attempts: int | None = None,
        backoff: Backoff | None = None,
    ) -> AsyncTask:
        """Queue one inference and return its handle, as soon as the broker has it.

        Args:
            model: name in the model repository.
            inputs: input name to array, with the batch dimension where the model has one.
            version: version number, or "champion".
            priority: high is served before normal, normal before low, none starves.
            outputs: names of the outputs to return; all by default.
            parameters: OIP parameters for the model; `micro_batch: False` keeps the request alone.
            eta: not before this time by the broker's clock, a datetime with a time zone.
            delay_s: not before so many seconds from now.
            deadline_s: of use for so many seconds from now: what has not started by then ends as expired, what
                is running is given up.
            idempotency_key: a second submit with the same key, of this tenant and model, within
                `idempotency_ttl_s` gives the task of the first, also when that has ended.
            max_attempts: how often the task is tried before it is a dead letter, 1 to 100; by default what the
                workers have set for the model.
            backoff: how long it waits in between; by default the same.

        Raises:
            InvalidInputError: the request can never succeed; nothing was queued.
            IdempotencyConflictError: the key belongs to a task that was asked for something else.
            QueueFullError, BrokerMemoryFullError: refused; nothing was queued.
            BrokerUnavailableError: no answer; the task may or may not be queued.
        """
        headers = await self._when(eta, delay_s, deadline_s)
        encode = await self._encoder(model, version, priority, outputs, parameters, headers, max_attempts, backoff)
        task_id, message, blobs = await self._encode(encode, model, inputs)
        queue, step, key = keys.queue_name(model, self.tenant), priority_step(priority), None
        if idempotency_key is not None:
            key = idempotency(idempotency_key, encode.request, task_id, self._idempotency_ttl_s)
        epoch = self._waiter.epoch  # before the task can end
        known = await self._publisher.publish(queue, step, [message], blobs, key)
        return AsyncTask(self, known, "often") if known else AsyncTask(self, task_id, epoch)

    async def chain(
        self,
        *stages: Stage,
        priority: Priority = "normal",
        eta: datetime | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
    ) -> AsyncTask:
        """Queue a chain of inferences and return the handle of its last step; see `samphire.pipeline`.

        Args:
            stages: steps, each in its turn; a list of steps is a stage whose steps run side by side.
            priority, eta, delay_s, deadline_s: as in `submit`, for the whole chain.

        Raises:
            InvalidInputError: a step takes an input from where there is none, or what does not fit its model;
                nothing was queued.
            QueueFullError, BrokerMemoryFullError, BrokerUnavailableError: as in `submit`.
        """
        self._check_usable()
        listed = stages_of(stages)
        headers = {**await self._when(eta, delay_s, deadline_s), "samphire_stream": self._stream}
        options = StepOptions(self.tenant, priority_step(priority), headers, self._limits)
        models = {step.model for stage in listed for step in stage}
        signatures = {model: await self._signature(model) for model in models}
        try:
            task_id, message, blobs = encode_chain(listed, options, signatures)
        except InvalidInputError:  # perhaps a model has changed
            fresh = {model: await self._signature(model, fresh=True) for model in models}
            task_id, message, blobs = encode_chain(listed, options, fresh)
        await self._publisher.publish(keys.INTAKE, options.priority, [message], blobs)
        return AsyncTask(self, task_id, "often")  # of a chord that fails no event tells

    @overload
    def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: Literal[False] = ...,
        progress: Progress | None = ...,
        window: int = ...,
        window_bytes: int = ...,
        version: str | int = ...,
        priority: Priority = ...,
        outputs: Iterable[str] = ...,
        parameters: Parameters | None = ...,
        deadline_s: float | None = ...,
    ) -> AsyncIterator[InferResult]: ...

    @overload
    def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: bool,
        progress: Progress | None = ...,
        window: int = ...,
        window_bytes: int = ...,
        version: str | int = ...,
        priority: Priority = ...,
        outputs: Iterable[str] = ...,
        parameters: Parameters | None = ...,
        deadline_s: float | None = ...,
    ) -> AsyncIterator[InferResult | SamphireError]: ...

    async def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: bool = False,
        progress: Progress | None = None,
        window: int = 4096,
        window_bytes: int = 64 * 2**20,
        version: str | int = "champion",
        priority: Priority = "normal",
        outputs: Iterable[str] = (),
        parameters: Parameters | None = None,
        deadline_s: float | None = None,
    ) -> AsyncIterator[InferResult | SamphireError]:
        """Submit every element of `batches` and yield the results in the same order.

        Args:
            model: name in the model repository.
            batches: inputs of one task each; read only as far ahead as the window allows.
            return_exceptions: yield the error of a task that failed instead of raising it.
            progress: called with the number of results so far, and of all if `batches` has a length.
            window: most tasks under way, or done and not yet yielded, at once.
            window_bytes: most bytes of their inputs and outputs, as far as these can be known ahead.
            version, priority, outputs, parameters: as in `submit`.
            deadline_s: as in `submit`, for each task from when it is queued.

        Raises:
            SamphireError: the first error of a task, unless `return_exceptions`; the rest goes on.
        """
        chunks = self._map_chunks(
            model, batches, window, window_bytes, version, priority, outputs, parameters, deadline_s
        )
        counted = Counted(batches, progress)
        async for chunk in chunks:
            for result in chunk:
                counted.one_more()
                if isinstance(result, SamphireError) and not return_exceptions:
                    raise result
                yield result

    @property
    def dead_letters(self) -> AsyncDeadLetters:
        """What failed for good, or was no task; see `AsyncDeadLetters`."""
        self._check_usable()
        return AsyncDeadLetters(self._publisher.connection)

    async def signature(self, model: str) -> ModelSignature | None:
        """What a model takes and returns, as the workers tell it; None where no worker has told.

        Raises:
            UnknownModelError: the workers know all models, and there is none of that name.
        """
        self._check_usable()
        return await self._catalogue.signature(model)

    def task(self, task_id: str) -> AsyncTask:
        """A handle of a task that anybody submitted.

        Raises:
            InvalidInputError: not a task id.
        """
        if not isinstance(task_id, str) or not 1 <= len(task_id) <= 255:
            raise InvalidInputError(f"expected a task id of 1 to 255 characters, given {task_id!r}")
        return AsyncTask(self, task_id, "often")

    # -- the parts ----------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._closed:
            raise ClientClosedError
        if self._process != os.getpid():
            raise SamphireError("an AsyncClient does not survive a fork: make one in each process")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise SamphireError(
                "an AsyncClient belongs to the event loop that first used it: make one in each, or use Client, "
                "which threads and loops may share"
            )

    async def _map_chunks(
        self,
        model: str,
        batches: Iterable[Inputs],
        window: int,
        window_bytes: int,
        version: str | int,
        priority: Priority,
        outputs: Iterable[str],
        parameters: Parameters | None,
        deadline_s: float | None,
    ) -> AsyncIterator[list[InferResult | SamphireError]]:
        """Like `map`, with the results that are there together in one list."""
        if window < 1 or window_bytes < 1:
            raise InvalidInputError(f"expected a window of at least 1, given {window} tasks, {window_bytes} bytes")
        encode = await self._encoder(model, version, priority, outputs, parameters, {})
        queue, step = keys.queue_name(model, self.tenant), priority_step(priority)
        source: Iterator[Any] = iter(batches)
        waiting: deque[tuple[str, asyncio.Future[InferResult]]] = deque()
        sizes = _Sizes(window, window_bytes)
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) < sizes.window:
                    encoded: list[Encoded] = []
                    nbytes = 0
                    most = min(MAP_CHUNK, sizes.window - len(waiting))
                    encode.headers(await self._when(None, None, deadline_s))
                    while len(encoded) < most and nbytes < min(MAP_CHUNK_BYTES, window_bytes) and not exhausted:
                        inputs: Any = next(source, _END)
                        if inputs is _END:
                            exhausted = True
                            break
                        try:
                            one = encode(inputs)
                        except InvalidInputError:
                            one = await self._encode(encode, model, inputs)
                        encoded.append(one)
                        nbytes += len(one.message)
                        if one.blobs:
                            nbytes += sum(len(data) for _, data in one.blobs)
                    if not encoded:
                        break
                    sizes.sent(len(encoded), nbytes)
                    waiting.extend((one.task_id, self._waiter.expect(one.task_id, "never")) for one in encoded)
                    await self._publisher.publish(
                        queue,
                        step,
                        [one.message for one in encoded],
                        [blob for one in encoded for blob in one.blobs],
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
                sizes.returned(ready)
                yield ready
        finally:
            self._waiter.forget(task_id for task_id, _ in waiting)

    async def _when(self, eta: datetime | None, delay_s: float | None, deadline_s: float | None) -> dict[str, Any]:
        """The headers that say when a task may start, and until when it is of use, by the broker's clock."""
        if eta is None and delay_s is None and deadline_s is None:
            return {}
        return when(eta, delay_s, deadline_s, await self._clock.fresh_now()).headers()

    async def _encoder(
        self,
        model: str,
        version: str | int,
        priority: str,
        outputs: Iterable[str],
        parameters: Parameters | None,
        headers: dict[str, Any],
        max_attempts: int | None = None,
        backoff: Backoff | None = None,
    ) -> Encoder:
        self._check_usable()
        template = request_for(model, version, outputs, parameters, self.tenant, max_attempts, backoff)
        encoder = Encoder(template, priority_step(priority), self._stream, self._limits)
        encoder.headers(headers)
        encoder.check_against(await self._signature(model))
        return encoder

    async def _encode(self, encode: Encoder, model: str, inputs: Inputs) -> Encoded:
        try:
            return encode(inputs)
        except InvalidInputError:
            # Perhaps the model has changed since its signature was read.
            if not encode.check_against(await self._signature(model, fresh=True)):
                raise
            return encode(inputs)

    async def _signature(self, model: str, *, fresh: bool = False) -> ModelSignature | None:
        return await self._catalogue.signature(model, fresh=fresh) if self._validate else None

    async def _result(self, task_id: str, timeout_s: float | None, look: Look) -> InferResult:
        self._check_usable()
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


class Counted:
    """Tells how far a map has come."""

    def __init__(self, batches: Iterable[Inputs], progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = len(batches) if isinstance(batches, Sized) else None

    def one_more(self) -> None:
        """A result is there."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Sizes:
    """How many tasks a map may have under way, given what they and their results take."""

    def __init__(self, window: int, window_bytes: int) -> None:
        self._most = window
        self._bytes = window_bytes
        self._in = self._out = 0.0
        self.window = window

    def sent(self, count: int, nbytes: int) -> None:
        """So many were sent, with so many bytes."""
        self._in = nbytes / count
        self._adapt()

    def returned(self, results: list[InferResult | SamphireError]) -> None:
        """These came back."""
        outputs = [result.outputs.values() for result in results if isinstance(result, InferResult)]
        if outputs:
            self._out = sum(array.nbytes for arrays in outputs for array in arrays) / len(outputs)
            self._adapt()

    def _adapt(self) -> None:
        self.window = max(1, min(self._most, int(self._bytes / max(1.0, self._in + self._out))))
