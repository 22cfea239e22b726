"""A TCP proxy that can swallow a reply: the request arrives, the answer does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class Proxy:
    """Between a client and the broker; `cut_next` closes the connection in place of the next reply."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.url = ""
        self.cut_next = False
        self.cuts = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
        forward = asyncio.create_task(_pump(reader, upstream_writer))
        try:
            while data := await upstream_reader.read(65536):
                if self.cut_next:
                    self.cut_next = False
                    self.cuts += 1
                    break
                writer.write(data)
                await writer.drain()
        except asyncio.CancelledError:
            pass  # the loop is closing
        finally:
            forward.cancel()
            writer.close()
            upstream_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def cutting_proxy(broker_url: str) -> AsyncIterator[Proxy]:
    """A proxy in front of a broker."""
    proxy = Proxy(urlsplit(broker_url).port or 6379)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    try:
        yield proxy
    finally:
        server.close()
