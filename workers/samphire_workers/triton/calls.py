"""Calls under way at a Triton: who waits for one, who reads a stream, and how either ends."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import grpc.aio

from samphire.errors import EndpointTimeoutError, EndpointUnavailableError, SamphireError
from samphire_workers.triton.errors import StalledError, translate_text

QUIET_S = 0.1
"""A stream is cancelled just after an output, which is waited for as long as this: Triton 24.10 may die where it is
cancelled while one comes. Source: triton-inference-server/server issues 7368 and 8034."""
LEFT_S = 600.0
"""A stream is left to a server that does not answer for so long."""
GOES_ON_S = 2.0
"""Once it answers again, outputs come all at once; a moment to cancel is sought so much later."""
GIVEN_UP = "gRPC has given up the request"
"""Of a call that ends as cancelled though nobody has cancelled it, as where the connection breaks while it is sent."""


class Running:
    """A request under way; `stop` ends the wait for it, and cancels it at the server."""

    def __init__(self) -> None:
        self._call: Any = None
        self._streams = False
        self._waiting: asyncio.Future[Any] | None = None
        self.why: SamphireError | None = None
        self.is_left = False
        """Nobody waits any more, and the call goes on."""

    def stop(self, why: SamphireError) -> None:
        """End it: who waits gets `why`."""
        if self.why is None:
            self.why = why
            if self._call is not None:
                asyncio.get_running_loop().call_later(QUIET_S if self._streams else 0.0, self._call.cancel)

    def leave(self, why: SamphireError) -> None:
        """End the wait, and of a stream the wait alone: who waits gets `why`, and the call goes on.

        A cancel that is sent to a server that stands still meets it as it goes on, when outputs come all at once.
        """
        if not self._streams:
            self.stop(why)
        elif self.why is None:
            self.why, self.is_left = why, True
            if self._waiting is not None:
                self._waiting.cancel()

    def attach(self, call: Any, *, streams: bool = False) -> None:
        """This is the call; raises `why` where it was stopped before.

        A stop cancels one that streams a little later, unless its reader has ended it before.
        """
        if self.why is not None:
            call.cancel()
        self.check()
        self._call, self._streams = call, streams

    def check(self) -> None:
        """Raise where nobody waits for it any more."""
        if self.why is not None:
            raise self.why

    async def wait(self, call: Any) -> Any:
        """The answer of a call."""
        self.attach(call)
        try:
            return await call
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise self.why or EndpointUnavailableError(GIVEN_UP) from None

    async def wait_for_next(self, reading: asyncio.Future[Any]) -> Any:
        """The next response of a stream."""
        self._waiting = asyncio.shield(reading)
        try:
            return await self._waiting
        finally:
            self._waiting = None


def is_cancelled() -> bool:
    """Whether this task itself is being cancelled, and not only the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Reader:
    """Reads a stream; nobody else reads its call."""

    def __init__(self, call: Any, running: Running) -> None:
        self._call = call
        self._running = running
        self._reading: asyncio.Future[Any] | None = None

    def _read(self) -> asyncio.Future[Any]:
        """The next message; the same one where the wait for it has ended without it."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        return self._reading

    async def next_answer(self) -> Any:
        """The next response, None at the end."""
        self._running.check()
        message = await self._running.wait_for_next(self._read())
        self._reading = None
        self._running.check()
        if message is grpc.aio.EOF:
            return None
        if message.error_message:
            raise translate_text(message.error_message)
        return message.infer_response

    async def read_left(self) -> None:
        """Read a call that was left to a server that does not answer, until it does; then end it."""
        try:
            async with asyncio.timeout(LEFT_S):
                await asyncio.wait([self._read()])
        except TimeoutError:
            self._call.cancel()
        await self.read_on(GOES_ON_S)

    async def read_on(self, enough_s: float) -> None:
        """Let a call that nobody waits for come to its end for so long; then cancel it in a quiet moment."""
        loop = asyncio.get_running_loop()
        enough_at = loop.time() + enough_s
        try:
            async with asyncio.timeout(enough_s + QUIET_S):
                while await self._read() is not grpc.aio.EOF and loop.time() < enough_at:
                    self._reading = None
        except (grpc.aio.AioRpcError, TimeoutError):
            pass
        except asyncio.CancelledError:  # of the call, where the task goes on
            if is_cancelled():
                raise
        finally:
            self._call.cancel()


class Watch:
    """Stops a call that takes too long, or whose model gives out nothing for too long."""

    def __init__(self, running: Running, model: str, timeout_s: float, stall_s: float) -> None:
        self._running, self._stall_s, self._model = running, stall_s, model
        self._loop = asyncio.get_running_loop()
        self._seen_at = self._loop.time()
        self._is_paused = False
        self._timer = self._loop.call_later(stall_s, self._look)
        late = EndpointTimeoutError(f"the stream of model {model!r} did not end within {timeout_s:g} s")
        self._late_timer = None if timeout_s == math.inf else self._loop.call_later(timeout_s, running.stop, late)

    def seen(self) -> None:
        """It has given out something."""
        self._seen_at = self._loop.time()
        self._is_paused = False

    def pause(self) -> None:
        """Nobody waits for the model until it is `seen` again."""
        self._is_paused = True

    def end(self) -> None:
        """It is over."""
        self._timer.cancel()
        if self._late_timer is not None:
            self._late_timer.cancel()

    def _look(self) -> None:
        left_s = self._stall_s if self._is_paused else self._seen_at + self._stall_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._running.stop(StalledError(f"model {self._model!r} has given out nothing for {self._stall_s:g} s"))
