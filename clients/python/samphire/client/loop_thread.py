"""An event loop in a thread of its own, on which the blocking client runs the asynchronous one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from samphire.errors import ClientClosedError, SamphireError

T = TypeVar("T")


class LoopThread:
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

    def abandon(self) -> None:
        """In a forked child, where the thread is not: let nothing of it touch what the parent goes on using.

        The selector (epoll) is one object in both processes: what is collected here must not unregister there.
        """
        self._loop._selector.close()  # type: ignore[attr-defined]  # closes this process's handle, and no more

    async def _finish(self, last: Coroutine[Any, Any, None] | None) -> None:
        try:
            if last is not None:
                await last
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
