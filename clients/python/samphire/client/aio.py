"""The asynchronous client: all of the SDK's logic. `samphire.client.sync` runs the same on a thread."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import datetime
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from msgspec import UNSET

from samphire.client.dead_letters import AsyncDeadLetters
from samphire.client.encoder import (
    Encoder,
    Inputs,
    Limits,
    Parameters,
    idempotency,
    plain_text,
    priority_step,
    request_for,
)
from samphire.client.mapping import Batches, Counted, Map, MapOptions, Progress, Sizes, Source
from samphire.client.models import AsyncModels
from samphire.client.pipeline import Stage, StepOptions, encode_chain, stages_of
from samphire.client.prepared import PreparedTask, SubmitOptions, once
from samphire.client.results import InferResult
from samphire.client.session import Session
from samphire.client.task import AsyncTask
from samphire.client.webhooks import AsyncWebhooks
from samphire.errors import InvalidInputError, SamphireError
from samphire.transport.address import Broker, broker_of
from samphire.wire import keys
from samphire.wire.contract import Backoff, check_task_id, check_tenant
from samphire.wire.keys import Priority
from samphire.wire.signature import CHAMPION, ModelSignature


class AsyncClient:
    """Submits tasks and reads their results; for one event loop of one process.

    Args:
        broker_url: Redis or Valkey; by default `SAMPHIRE_BROKER_URL`, else redis://localhost:6379/0.
        namespace: what the keys of this deployment begin with; by default `SAMPHIRE_NAMESPACE`, else `samphire:`.
        celery_key_prefix: `global_keyprefix` of Celery's keys; by default `SAMPHIRE_CELERY_KEY_PREFIX`, else none.
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
        namespace: str | None = None,
        celery_key_prefix: str | None = None,
        tenant: str = "",
        queue_limit: int = 1_000_000,
        inline_limit_bytes: int = 8 * 2**10,
        max_request_bytes: int = 16 * 2**20,
        blob_ttl_s: int = 86_400,
        idempotency_ttl_s: int = 3600,
        validate: bool = True,
    ) -> None:
        tenant = plain_text("the tenant", tenant)
        check_tenant(tenant)
        self.broker: Broker = broker_of(broker_url, namespace, celery_key_prefix)
        self.tenant = tenant
        if idempotency_ttl_s < 1:
            raise InvalidInputError(f"expected idempotency_ttl_s of at least 1, given {idempotency_ttl_s}")
        self._idempotency_ttl_s = idempotency_ttl_s
        self._limits = Limits(inline_limit_bytes, max_request_bytes)
        self._session = Session(self.broker, queue_limit=queue_limit, blob_ttl_s=blob_ttl_s, validate=validate)

    def __repr__(self) -> str:
        tenant = f" tenant={self.tenant}" if self.tenant else ""
        closed = " closed" if self._session.closed else ""
        return f"<{type(self).__name__} {self.broker.address}{tenant}{closed}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; who still waits for a result gets `ClientClosedError`."""
        await self._session.close()

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
        collect: bool = False,
        webhook: str | None = None,
    ) -> AsyncTask:
        """Queue one inference and return its handle, as soon as the broker has it.

        Args:
            model: name in the model repository.
            inputs: input name to array, with the batch dimension where the model has one.
            version: version number, or "champion".
            priority: high is served before normal, normal before low, none starves.
            outputs: names of the outputs to return; all by default.
            parameters: OIP parameters for the model; `micro_batch: False` keeps the request alone, "tenant" joins it
                with those of its tenant only.
            eta: not before this time by the broker's clock, a datetime with a time zone.
            delay_s: not before so many seconds from now.
            deadline_s: of use for so many seconds from now: what has not started by then ends as expired, what
                is running is given up.
            idempotency_key: a second submit with the same key, of this tenant and model, within
                `idempotency_ttl_s` gives the task of the first, also when that has ended.
            max_attempts: how often the task is tried before it is a dead letter, 1 to 100; by default what the
                workers have set for the model.
            backoff: how long it waits in between; by default the same.
            collect: of a model that streams: keep all outputs, joined along their first dimension, in the result as
                well, which lives longer than the log may hold them.
            webhook: who is told of its end, however it ends: the name of a registered endpoint, or an `https://` URL,
                which is signed with the tenant's default secret.

        Raises:
            InvalidInputError: the request can never succeed, or its webhook never arrive; nothing was queued.
            IdempotencyConflictError: the key belongs to a task that was asked for something else.
            QueueFullError, BrokerMemoryFullError, BrokerRightError: refused; nothing was queued.
            BrokerUnavailableError: no answer; the task may or may not be queued.
        """
        prepared = await self.prepare(
            model,
            inputs,
            version=version,
            priority=priority,
            outputs=outputs,
            parameters=parameters,
            eta=eta,
            delay_s=delay_s,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            max_attempts=max_attempts,
            backoff=backoff,
            collect=collect,
            webhook=webhook,
        )
        return await self.submit_prepared(prepared)

    async def prepare(self, model: str, inputs: Inputs, **options: Unpack[SubmitOptions]) -> PreparedTask:
        """Check and encode one inference, and submit nothing: `submit_prepared` does, here or in another process.

        Delays and deadlines count from now.

        Args:
            model, inputs, options: as in `submit`.

        Raises:
            InvalidInputError: the request can never succeed, or its webhook never arrive.
        """
        key = options.pop("idempotency_key", None)
        eta, delay_s = options.pop("eta", None), options.pop("delay_s", None)
        headers = await self._session.when(eta, delay_s, options.pop("deadline_s", None))
        encode = await self._encoder(model, headers, **{"collect": False, **options})  # type: ignore[arg-type]
        task_id, message, blobs = await self._session.encode(encode, inputs)
        known_by = None
        if key is not None:
            known_by = idempotency(key, encode.request, task_id, self._idempotency_ttl_s)
        stream = self._session.stream
        return PreparedTask(task_id, encode.queue, encode.priority, message, stream, tuple(blobs), known_by)

    async def submit_prepared(self, prepared: PreparedTask, *, once_s: int | None = None) -> AsyncTask:
        """Queue a prepared task and return its handle, as soon as the broker has it.

        Args:
            prepared: as `prepare` made it, of any client of this broker.
            once_s: submit it once however often this is called within so many seconds, by whatever process.

        Raises:
            SamphireError: as in `submit`.
        """
        self._session.check_usable()
        key = prepared.key if once_s is None else once(prepared, once_s)
        epoch = self._session.waiter.epoch  # before the task can end
        known = await self._session.publisher.publish(
            prepared.queue, prepared.priority, [prepared.message], list(prepared.blobs), key
        )
        if known or prepared.stream != self._session.stream:
            return AsyncTask(self._session, known or prepared.id, "often")
        return AsyncTask(self._session, prepared.id, epoch)

    async def chain(
        self,
        *stages: Stage,
        priority: Priority = "normal",
        eta: datetime | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        webhook: str | None = None,
    ) -> AsyncTask:
        """Queue a chain of inferences and return the handle of its last step; see `samphire.client.pipeline`.

        Args:
            stages: steps, each in its turn; a list of steps is a stage whose steps run side by side.
            priority, eta, delay_s, deadline_s: as in `submit`, for the whole chain.
            webhook: who is told of the end of the last step, also where it never comes to that.

        Raises:
            InvalidInputError: a step takes an input from where there is none, or what does not fit its model;
                nothing was queued.
            QueueFullError, BrokerMemoryFullError, BrokerUnavailableError: as in `submit`.
        """
        self._session.check_usable()
        listed = stages_of(stages)
        headers = {**await self._session.when(eta, delay_s, deadline_s), "samphire_stream": self._session.stream}
        options = StepOptions(self.tenant, priority_step(priority), headers, self._limits, self._session, webhook)
        await self._check_webhook(webhook)
        models = {step.model for stage in listed for step in stage}
        signatures = {model: await self._session.signature(model) for model in models}
        try:
            task_id, message, blobs = encode_chain(listed, options, signatures)
        except InvalidInputError:  # perhaps a model has changed
            fresh = {model: await self._session.signature(model, fresh=True) for model in models}
            task_id, message, blobs = encode_chain(listed, options, fresh)
        await self._session.publisher.publish(keys.INTAKE, options.priority, [message], blobs)
        return AsyncTask(self._session, task_id, "often")  # of a chord that fails no event tells

    @overload
    def map(
        self,
        model: str,
        batches: Batches,
        *,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[MapOptions],
    ) -> AsyncIterator[InferResult]: ...

    @overload
    def map(
        self,
        model: str,
        batches: Batches,
        *,
        return_exceptions: bool,
        **options: Unpack[MapOptions],
    ) -> AsyncIterator[InferResult | SamphireError]: ...

    async def map(
        self,
        model: str,
        batches: Batches,
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
        webhook: str | None = None,
    ) -> AsyncIterator[InferResult | SamphireError]:
        """Submit every element of `batches` and yield the results in the same order.

        Args:
            model: name in the model repository.
            batches: inputs of one task each, an iterable or an asynchronous one; read only as far ahead as the window
                allows.
            return_exceptions: yield the error of a task that failed, or of an element that cannot be sent, in its
                place instead of raising it there.
            progress: called with the number of results so far, and of all if `batches` has a length.
            window: most tasks under way, or done and not yet yielded, at once.
            window_bytes: most bytes of their inputs and outputs, as far as these can be known ahead.
            version, priority, outputs, parameters: as in `submit`.
            deadline_s: as in `submit`, for each task from when it is queued.
            webhook: as in `submit`, for each task.

        Raises:
            SamphireError: the first error of a task or element, in its place, unless `return_exceptions`; the rest
                goes on.
            InvalidInputError: `batches` is nothing to iterate over.
        """
        chunks = self._map_chunks(
            model, batches, window, window_bytes, version, priority, outputs, parameters, deadline_s, webhook
        )
        counted = Counted(batches, progress)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                for result in chunk:
                    counted.one_more()
                    if isinstance(result, SamphireError) and not return_exceptions:
                        raise result
                    yield result

    @property
    def dead_letters(self) -> AsyncDeadLetters:
        """What failed for good, or was no task; see `AsyncDeadLetters`."""
        self._session.check_usable()
        return AsyncDeadLetters(self._session.publisher.connection, self._session.broker.keys)

    @property
    def webhooks(self) -> AsyncWebhooks:
        """The endpoints that this tenant's tasks can name, and what became of their deliveries; see `AsyncWebhooks`."""
        session = self._session
        session.check_usable()
        return AsyncWebhooks(session.publisher.connection, session.broker.keys, session.webhooks, self.tenant)

    @property
    def models(self) -> AsyncModels:
        """The models of the endpoints, and why one is not loaded; see `AsyncModels`."""
        self._session.check_usable()
        return AsyncModels(self._session.publisher.connection, self._session.broker.keys)

    async def signature(self, model: str) -> ModelSignature | None:
        """What a model takes and returns, as the workers tell it; None where no worker has told.

        Raises:
            UnknownModelError: the workers know all models, and there is none of that name.
        """
        self._session.check_usable()
        return await self._session.catalogue.signature(model)

    def task(self, task_id: str) -> AsyncTask:
        """A handle of a task that anybody submitted.

        Raises:
            InvalidInputError: not a task id.
        """
        check_task_id(task_id)
        return AsyncTask(self._session, task_id, "often")

    # -- the parts ----------------------------------------------------------------------------------

    async def _map_chunks(
        self,
        model: str,
        batches: Batches,
        window: int,
        window_bytes: int,
        version: str | int,
        priority: Priority,
        outputs: Iterable[str],
        parameters: Parameters | None,
        deadline_s: float | None,
        webhook: str | None,
    ) -> AsyncGenerator[list[InferResult | SamphireError], None]:
        """Like `map`, with the results that are there together in one list."""
        if window < 1 or window_bytes < 1:
            raise InvalidInputError(f"expected a window of at least 1, given {window} tasks, {window_bytes} bytes")
        encode = await self._encoder(model, {}, version, priority, outputs, parameters, collect=True, webhook=webhook)
        under_way = Map(self._session, encode, Source(batches), Sizes(window, window_bytes), deadline_s)
        async with contextlib.aclosing(under_way.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _check_webhook(self, webhook: str | None) -> None:
        if webhook is not None:
            await self._session.webhooks.check(plain_text("the webhook", webhook), self.tenant)

    async def _encoder(
        self,
        model: str,
        headers: dict[str, Any],
        version: str | int = CHAMPION,
        priority: str = "normal",
        outputs: Iterable[str] = (),
        parameters: Parameters | None = None,
        max_attempts: int | None = None,
        backoff: Backoff | None = None,
        *,
        collect: bool,
        webhook: str | None = None,
    ) -> Encoder:
        self._session.check_usable()
        template = request_for(
            model, version, outputs, parameters, self.tenant, max_attempts, backoff, collect=collect, webhook=webhook
        )
        await self._check_webhook(webhook)
        signature = await self._session.signature(model)
        if signature is not None and not signature.decoupled:
            template.collect = UNSET  # it means nothing there
        step, last = priority_step(priority), self._session.catalogue.last_known(model)
        encoder = Encoder(template, step, self._session.stream, self._limits, self._session.clock, last)
        encoder.headers(headers)
        encoder.check_against(signature)
        return encoder
