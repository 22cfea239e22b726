"""The blocking client: the asynchronous one on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from samphire.aio import AsyncClient, AsyncTask, Inputs
from samphire.errors import ClientClosedError, SamphireError
from samphire.keys import Priority
from samphire.results import InferResult, Status

T = TypeVar("T")


class _LoopThread:
    """An event loop in a daemon thread, and a way to run coroutines on it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="samphire-client", daemon=True)
        self._thread.start()
        self._open = True
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return the result; an interrupt cancels the coroutine.

        Raises:
            ClientClosedError: the client is closed, or was while this waited.
            SamphireError: called from the client's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise SamphireError("the client was used from within its own thread (inside a map's batches)")
        with self._lock:
            if not self._open:
                coroutine.close()
                raise ClientClosedError
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ClientClosedError from None
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Run `last`, cancel whatever else is under way, end the thread; a second call does nothing."""
        with self._lock:
            if not self._open:
                if last is not None:
                    last.close()
                return
            self._open = False
        asyncio.run_coroutine_threadsafe(self._finish(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self, last: Coroutine[Any, Any, None] | None) -> None:
        try:
            if last is not None:
                await last
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)


class Task:
    """A handle of one submitted task."""

    def __init__(self, loop: _LoopThread, task: AsyncTask) -> None:
        self._loop = loop
        self._task = task

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @property
    def id(self) -> str:
        """The task's id, also Celery's."""
        return self._task.id

    def status(self) -> Status:
        """See `AsyncTask.status`."""
        return self._loop.run(self._task.status())

    def result(self, timeout_s: float | None = None) -> InferResult:
        """See `AsyncTask.result`."""
        return self._loop.run(self._task.result(timeout_s))


class Client:
    """Submits tasks and reads their results, blocking; may be shared by threads.

    Takes the arguments of `AsyncClient`.
    """

    def __init__(self, broker_url: str | None = None, **options: Any) -> None:
        self._loop = _LoopThread()
        try:
            self._client = self._loop.run(_make(broker_url, options))
        except BaseException:
            self._loop.close()
            raise

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
        self._loop.close(self._client.close())

    def submit(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str | int = "champion",
        priority: Priority = "normal",
        outputs: Iterable[str] = (),
        parameters: Mapping[str, bool | int | float | str] | None = None,
    ) -> Task:
        """See `AsyncClient.submit`."""
        submit = self._client.submit(
            model, inputs, version=version, priority=priority, outputs=outputs, parameters=parameters
        )
        return Task(self._loop, self._loop.run(submit))

    @overload
    def map(
        self,
        model: str,
        batches: Iterable[Inputs],
        *,
        return_exceptions: Literal[False] = ...,
        **options: Any,
    ) -> Iterator[InferResult]: ...

    @overload
    def map(
        self, model: str, batches: Iterable[Inputs], *, return_exceptions: Literal[True], **options: Any
    ) -> Iterator[InferResult | SamphireError]: ...

    def map(
        self, model: str, batches: Iterable[Inputs], *, return_exceptions: bool = False, **options: Any
    ) -> Iterator[InferResult | SamphireError]:
        """See `AsyncClient.map`. `batches` is read on the client's thread."""
        chunks = self._client._map_chunks(model, batches, **options)
        try:
            while True:
                chunk = self._loop.run(_next(chunks))
                if chunk is None:
                    return
                for result in chunk:
                    if isinstance(result, SamphireError) and not return_exceptions:
                        raise result
                    yield result
        finally:
            with contextlib.suppress(ClientClosedError):
                self._loop.run(chunks.aclose())  # type: ignore[attr-defined]

    def task(self, task_id: str) -> Task:
        """See `AsyncClient.task`."""
        return Task(self._loop, self._client.task(task_id))


async def _make(broker_url: str | None, options: Mapping[str, Any]) -> AsyncClient:
    return AsyncClient(broker_url, **options)


async def _next(chunks: Any) -> list[InferResult | SamphireError] | None:
    chunk: list[InferResult | SamphireError] | None = await anext(chunks, None)
    return chunk
