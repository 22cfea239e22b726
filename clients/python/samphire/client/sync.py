"""The blocking client: the asynchronous one on an event loop in a thread of its own."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from samphire.client.aio import AsyncClient
from samphire.client.encoder import Inputs, Parameters
from samphire.client.loop_thread import LoopThread
from samphire.client.mapping import Counted, MapOptions, Progress, iterator_of
from samphire.client.pipeline import Stage
from samphire.client.prepared import PreparedTask, SubmitOptions
from samphire.client.results import InferResult
from samphire.client.sync_parts import DeadLetters, Models, Task, Webhooks, tell_in_full
from samphire.errors import ClientClosedError, InvalidInputError, SamphireError
from samphire.wire.contract import Backoff
from samphire.wire.keys import Priority
from samphire.wire.signature import ModelSignature

T = TypeVar("T")


class Client:
    """Submits tasks and reads their results, blocking; may be shared by threads, and survives a fork.

    Takes the arguments of `AsyncClient`. After a fork (gunicorn, Celery's prefork pool) the child's first use
    makes connections of its own.
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
        self._make = partial(
            AsyncClient,
            broker_url,
            namespace=namespace,
            celery_key_prefix=celery_key_prefix,
            tenant=tenant,
            queue_limit=queue_limit,
            inline_limit_bytes=inline_limit_bytes,
            max_request_bytes=max_request_bytes,
            blob_ttl_s=blob_ttl_s,
            idempotency_ttl_s=idempotency_ttl_s,
            validate=validate,
        )
        self._lock = threading.Lock()
        self._start()
        _clients.add(self)

    def _start(self) -> None:
        self._client = self._make()
        self._loop: LoopThread | None = None
        self._closed = False

    def _forget_parent(self) -> None:
        """In a forked child: put aside, unclosed, what belongs to the parent; its thread is not here."""
        self._lock = threading.Lock()
        if self._loop is not None:
            self._loop.abandon()
            _abandoned.append((self._loop, self._client))
        closed = self._closed
        self._start()
        self._closed = closed

    def _run(self, use: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            if self._closed:
                raise ClientClosedError
            if self._loop is None:
                self._loop = LoopThread()
            loop = self._loop
        return loop.run(use())

    @contextlib.contextmanager
    def _iterating(self, source: Any) -> Iterator[Iterator[Any]]:
        """The items of an asynchronous generator, which is closed at the end."""

        async def following() -> Any:
            return await anext(source, _END)

        def items() -> Iterator[Any]:
            while (item := self._run(following)) is not _END:
                yield item

        try:
            yield items()
        finally:
            with contextlib.suppress(ClientClosedError):
                self._run(source.aclose)

    def __repr__(self) -> str:
        return repr(self._client).replace("AsyncClient", "Client")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See `AsyncClient.close`; a second call does nothing."""
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.close(self._client.close())

    def submit(
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
    ) -> Task:
        """See `AsyncClient.submit`."""
        task = self._run(
            lambda: self._client.submit(
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
        )
        return Task(self, task.id, task._look)

    def prepare(self, model: str, inputs: Inputs, **options: Unpack[SubmitOptions]) -> PreparedTask:
        """See `AsyncClient.prepare`."""
        return self._run(lambda: self._client.prepare(model, inputs, **options))

    def submit_prepared(self, prepared: PreparedTask, *, once_s: int | None = None) -> Task:
        """See `AsyncClient.submit_prepared`."""
        task = self._run(lambda: self._client.submit_prepared(prepared, once_s=once_s))
        return Task(self, task.id, task._look)

    def chain(
        self,
        *stages: Stage,
        priority: Priority = "normal",
        eta: datetime | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        webhook: str | None = None,
    ) -> Task:
        """See `AsyncClient.chain`."""
        task = self._run(
            lambda: self._client.chain(
                *stages, priority=priority, eta=eta, delay_s=delay_s, deadline_s=deadline_s, webhook=webhook
            )
        )
        return Task(self, task.id, "often")

    @overload
    def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: Literal[False] = ...,
        **options: Unpack[MapOptions],
    ) -> Iterator[InferResult]: ...

    @overload
    def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: bool,
        **options: Unpack[MapOptions],
    ) -> Iterator[InferResult | SamphireError]: ...

    def map(
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
        webhook: str | None = None,
    ) -> Iterator[InferResult | SamphireError]:
        """See `AsyncClient.map`. `batches` is an iterable; it is read on the client's thread, `progress` is called
        on the caller's.
        """
        if isinstance(batches, AsyncIterable) and not isinstance(batches, Iterable):
            raise InvalidInputError("expected an iterable of inputs; only `AsyncClient.map` takes an asynchronous one")
        elements = iterator_of(batches)
        chunks = self._client._map_chunks(
            model, elements, window, window_bytes, version, priority, outputs, parameters, deadline_s, webhook
        )
        counted = Counted(batches, progress)
        with self._iterating(chunks) as iterator:
            for chunk in iterator:
                for result in chunk:
                    counted.one_more()
                    if isinstance(result, SamphireError) and not return_exceptions:
                        raise result
                    yield result

    @property
    def dead_letters(self) -> DeadLetters:
        """See `AsyncClient.dead_letters`."""
        return DeadLetters(self, lambda client: client.dead_letters)

    @property
    def models(self) -> Models:
        """See `AsyncClient.models`."""
        return Models(self, lambda client: client.models)

    @property
    def webhooks(self) -> Webhooks:
        """See `AsyncClient.webhooks`."""
        return Webhooks(self, lambda client: client.webhooks)

    def signature(self, model: str) -> ModelSignature | None:
        """See `AsyncClient.signature`."""
        return self._run(lambda: self._client.signature(model))

    def task(self, task_id: str) -> Task:
        """See `AsyncClient.task`."""
        return Task(self, self._client.task(task_id).id, "often")


_END = object()
_abandoned: list[Any] = []
"""What belongs to the parent of a forked process: kept, since its collection would close connections."""
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    for client in list(_clients):
        client._forget_parent()


os.register_at_fork(after_in_child=_after_fork)


tell_in_full(Client, AsyncClient)
