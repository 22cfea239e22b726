"""How `map` goes: many tasks at once, as many as the window allows, and their results in the order of the inputs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sized
from typing import Any, TypedDict

from samphire.client.encoder import Encoded, Encoder, Inputs, Parameters
from samphire.client.results import InferResult
from samphire.client.session import Session
from samphire.errors import InvalidInputError, SamphireError
from samphire.wire.keys import Priority

CHUNK = 256
CHUNK_BYTES = 4 * 2**20

_END = object()

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

    def __init__(self, batches: Iterable[Inputs], progress: Progress | None) -> None:
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


class Map:
    """One map under way.

    Args:
        session: of the client.
        encode: makes a message of one element, for a queue.
        batches: inputs of one task each; read only as far ahead as the window allows.
        sizes: tell how far that is.
        deadline_s: of each task, from when it is queued.
    """

    def __init__(
        self,
        session: Session,
        encode: Encoder,
        batches: Iterable[Inputs],
        sizes: Sizes,
        deadline_s: float | None,
    ) -> None:
        self._session = session
        self._encode = encode
        self._source: Iterator[Any] = iter(batches)
        self._exhausted = False
        self._sizes = sizes
        self._deadline_s = deadline_s
        self._waiting: deque[tuple[str, asyncio.Future[InferResult]]] = deque()

    async def chunks(self) -> AsyncGenerator[list[InferResult | SamphireError], None]:
        """The results in the order of the inputs, those that are there together in one list."""
        try:
            while True:
                while not self._exhausted and len(self._waiting) < self._sizes.window:
                    await self._submit_some()
                if not self._waiting:
                    return
                await asyncio.wait([self._waiting[0][1]])
                ready = self._ready()
                self._sizes.returned(ready)
                yield ready
        finally:
            self._session.waiter.forget(task_id for task_id, _ in self._waiting)

    async def _submit_some(self) -> None:
        encoded = await self._encode_some()
        if not encoded:
            return
        waiter = self._session.waiter
        self._waiting.extend((one.task_id, waiter.expect(one.task_id, "never")) for one in encoded)
        messages, blobs = [one.message for one in encoded], [blob for one in encoded for blob in one.blobs]
        await self._session.publisher.publish(self._encode.queue, self._encode.priority, messages, blobs)

    async def _encode_some(self) -> list[Encoded]:
        encode, sizes = self._encode, self._sizes
        encoded: list[Encoded] = []
        nbytes = 0
        most, most_bytes = min(CHUNK, sizes.window - len(self._waiting)), min(CHUNK_BYTES, sizes.window_bytes)
        encode.headers(await self._session.when(None, None, self._deadline_s))
        while len(encoded) < most and nbytes < most_bytes:
            inputs: Any = next(self._source, _END)
            if inputs is _END:
                self._exhausted = True
                break
            try:
                one = encode(inputs)
            except InvalidInputError:
                one = await self._session.encode(encode, inputs)
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
        while self._waiting and self._waiting[0][1].done():
            task_id, future = self._waiting.popleft()
            self._session.waiter.forget([task_id])
            error = future.exception()
            if error is not None and not isinstance(error, SamphireError):
                raise error
            ready.append(error if error is not None else future.result())
        return ready
