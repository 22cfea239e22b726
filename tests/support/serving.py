"""Servers of connections on loopback, which end with all their connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
"""Serves one connection."""


@contextlib.asynccontextmanager
async def serving(serve: Serve, port: int = 0, ssl: Any = None) -> AsyncIterator[int]:
    """A server; gives its port. At its end each connection is closed, also one that has only just come."""
    tasks: set[asyncio.Task[None]] = set()

    # Not a coroutine function: asyncio would begin it later, and nobody would know of it until then.
    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def done(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            writer.close()

        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(done)

    server = await asyncio.start_server(begin, "127.0.0.1", port, ssl=ssl)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
