"""How `map` goes: many tasks at once, as many as the window allows, and their results in the order of the inputs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypedDict

from samphire.client.encoder import Encoded, Encoder, Inputs, Parameters
from samphire.client.results import InferResult
from samphire.client.session import Session
from samphire.errors import InvalidInputError, SamphireError
from samphire.wire.keys import Priority

CHUNK = 256
CHUNK_BYTES = 4 * 2**20

_NONE = object()

Batches = Iterable[Inputs] | AsyncIterable[Inputs]
"""Inputs of one task each."""

Progress = Callable[[int, int | None], None]
"""Called with how many results there are, and how many there will be if that is known."""


class MapOptions(TypedDict, total=False):
    """The options of `map`, beside `return_exceptions`, for type checkers."""

    progress: Progress | None
    window: int
    window_bytes: int
    version: str | int
    priority: Priority
    outputs: Iterable[str]
    parameters: Parameters | None
    deadline_s: float | None
    webhook: str | None


class Counted:
    """Tells how far a map has come."""

    def __init__(self, batches: Batches, progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = len(batches) if isinstance(batches, Sized) else None

    def one_more(self) -> None:
        """A result is there."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


class Sizes:
    """How many tasks a map may have under way, given what they and their results take."""

    def __init__(self, window: int, window_bytes: int) -> None:
        self._most = window
        self.window_bytes = window_bytes
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
        self.window = max(1, min(self._most, int(self.window_bytes / max(1.0, self._in + self._out))))


def iterator_of(batches: Any) -> Iterator[Any]:
    """The elements of a map, one after the other.

    Raises:
        InvalidInputError: what was given has none.
    """
    if isinstance(batches, Mapping):
        raise InvalidInputError("expected a list of inputs, given the inputs of one task: put them into a list")
    try:
        return iter(batches)
    except TypeError as error:
        given = type(batches).__name__
        raise InvalidInputError(f"expected an iterable of inputs, or an asynchronous one, given {given}") from error


class Source:
    """The elements of a map, of an iterable or an asynchronous one.

    An asynchronous one is read by one task from its begin to its end, which closes it, one element ahead.

    Raises:
        InvalidInputError: what was given has none.
    """

    def __init__(self, batches: Batches) -> None:
        self._later = batches if isinstance(batches, AsyncIterable) else None
        self._now: Iterator[Any] = iter(()) if self._later is not None else iterator_of(batches)
        self._reader: asyncio.Task[None] | None = None
        self._element: Any = _NONE
        self._free = asyncio.Event()
        """Set while the reader may put an element down."""
        self.coming: asyncio.Future[None] | None = None
        """Done once an element that was asked for in vain is there, or will never be."""
        self.is_exhausted = False

    async def take(self) -> Any:
        """The next element; `_NONE`: there is none, or it is still coming."""
        if self._later is None:
            element = next(self._now, _NONE)
            self.is_exhausted = element is _NONE
            return element
        if self._reader is None:
            self._free.set()
            self._reader = asyncio.create_task(self._read(self._later))
            self._reader.add_done_callback(self._arrived)
        if self._element is _NONE and not self._reader.done():
            await asyncio.sleep(0)  # most sources have many at hand
        element, self._element = self._element, _NONE
        if element is _NONE and self._reader.done():
            self._reader.result()
            self.is_exhausted = True
        is_coming = element is _NONE and not self.is_exhausted
        self.coming = asyncio.get_running_loop().create_future() if is_coming else None
        self._free.set()
        return element

    async def _read(self, later: AsyncIterable[Any]) -> None:
        elements = aiter(later)
        try:
            async for element in elements:
                await self._free.wait()
                self._free.clear()
                self._element = element
                self._arrived()
        finally:
            if isinstance(elements, AsyncGenerator):
                await elements.aclose()

    def _arrived(self, _: object = None) -> None:
        if self.coming is not None and not self.coming.done():
            self.coming.set_result(None)

    async def close(self) -> None:
        """Read no further."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)


class Map:
    """One map under way. An element that cannot be sent gives its error in its place.

    Args:
        session: of the client.
        encode: makes a message of one element, for a queue.
        source: inputs of one task each; read only as far ahead as the window allows.
        sizes: tell how far that is.
        deadline_s: of each task, from when it is queued.
    """

    def __init__(
        self,
        session: Session,
        encode: Encoder,
        source: Source,
        sizes: Sizes,
        deadline_s: float | None,
    ) -> None:
        self._session = session
        self._encode = encode
        self._source = source
        self._sizes = sizes
        self._deadline_s = deadline_s
        self._waiting: deque[tuple[str, asyncio.Future[InferResult]] | SamphireError] = deque()

    async def chunks(self) -> AsyncGenerator[list[InferResult | SamphireError], None]:
        """The results in the order of the inputs, those that are there together in one list."""
        try:
            while True:
                await self._submit()
                if not self._waiting and self._source.is_exhausted:
                    return
                if ready := await self._next_ready():
                    self._sizes.returned(ready)
                    yield ready
        finally:
            self._session.waiter.forget(one[0] for one in self._waiting if isinstance(one, tuple))
            await self._source.close()

    async def _submit(self) -> None:
        """Submit what the source has at hand, as far as there is room for it."""
        source = self._source
        while not source.is_exhausted and len(self._waiting) < self._sizes.window:
            await self._submit_some()
            if source.coming is not None:
                return

    async def _next_ready(self) -> list[InferResult | SamphireError]:
        """The results that are there, once the first is; none: the source's next element came before it."""
        awaited: list[asyncio.Future[Any]] = []
        if self._waiting:
            first = self._waiting[0]
            if isinstance(first, SamphireError):
                return self._ready()
            awaited.append(first[1])
        if self._source.coming is not None and len(self._waiting) < self._sizes.window:
            awaited.append(self._source.coming)
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        return self._ready()

    async def _submit_some(self) -> None:
        encoded = await self._encode_some()
        if not encoded:
            return
        messages, blobs = [one.message for one in encoded], [blob for one in encoded for blob in one.blobs]
        await self._session.publisher.publish(self._encode.queue, self._encode.priority, messages, blobs)

    async def _encode_some(self) -> list[Encoded]:
        encode, sizes = self._encode, self._sizes
        encoded: list[Encoded] = []
        nbytes = 0
        most, most_bytes = min(CHUNK, sizes.window - len(self._waiting)), min(CHUNK_BYTES, sizes.window_bytes)
        encode.headers(await self._session.when(None, None, self._deadline_s))
        while len(encoded) < most and nbytes < most_bytes:
            inputs = await self._source.take()
            if inputs is _NONE:
                break
            try:
                one = await self._session.encode(encode, inputs)
            except SamphireError as error:
                self._waiting.append(error)
                most -= 1
                continue
            self._waiting.append((one.task_id, self._session.waiter.expect(one.task_id, "never")))
            encoded.append(one)
            nbytes += len(one.message)
            if one.blobs:
                nbytes += sum(len(data) for _, data in one.blobs)
        if encoded:
            sizes.sent(len(encoded), nbytes)
        return encoded

    def _ready(self) -> list[InferResult | SamphireError]:
        """The results of those that have waited longest, as far as they are there."""
        ready: list[InferResult | SamphireError] = []
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, SamphireError):
                ready.append(first)
                self._waiting.popleft()
                continue
            task_id, future = first
            if not future.done():
                break
            self._waiting.popleft()
            self._session.waiter.forget([task_id])
            error = future.exception()
            if error is not None and not isinstance(error, SamphireError):
                raise error
            ready.append(error if error is not None else future.result())
        return ready
