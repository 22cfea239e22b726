"""A TCP proxy that cuts connections: in place of a reply, when the request has been carried out, or of a request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import urlsplit

from tests.support.serving import serving

_COMMAND = re.compile(rb"\*\d+\r\n\$\d+\r\n(\S+)\r\n(?:\$\d+\r\n(\S+)\r\n)?")

Where = Literal["request", "reply"]


class Proxy:
    """Between a client and the broker; `cut_next` closes the connection in place of the next reply."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.url = ""
        self.cut_next = False
        self.cuts = 0
        self.cut_commands: list[str] = []
        """What was cut: the command's name, of a script its SHA-1, of another command with a second word that too."""
        self.connections: set[asyncio.StreamWriter] = set()
        """Those that are open."""
        self._armed: Where | None = None
        self._spare = 0

    def cut(self, where: Where, after: int) -> None:
        """Cut one request before it arrives whole, or one reply, once `after` others have gone through."""
        self._armed, self._spare = where, after

    def disarm(self) -> bool:
        """Cut nothing more; whether the cut that was asked for was still to come."""
        armed, self._armed = self._armed is not None, None
        return armed

    def _cuts(self, where: Where, command: str) -> bool:
        if where == "reply" and self.cut_next:
            self.cut_next = False
        elif self._armed != where:
            return False
        elif self._spare:
            self._spare -= 1
            return False
        else:
            self._armed = None
        self.cuts += 1
        self.cut_commands.append(command)
        return True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            await self._pass_on(reader, writer)
        finally:
            self.connections.discard(writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)
        command = ""

        async def forward() -> None:
            nonlocal command
            while data := await reader.read(65536):
                if begins := _COMMAND.match(data):
                    words = [word.decode(errors="replace") for word in begins.groups() if word]
                    command = words[1] if words[0] == "EVALSHA" else " ".join(words)
                    if self._cuts("request", command):
                        upstream_writer.write(data[: len(data) // 2])  # half of a command is none
                        break
                upstream_writer.write(data)
                await upstream_writer.drain()
            writer.close()

        forwarding = asyncio.create_task(forward())
        try:
            while data := await upstream_reader.read(65536):
                if self._cuts("reply", command):
                    break
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # one of the two is gone
        finally:
            forwarding.cancel()
            writer.close()
            upstream_writer.close()
            await asyncio.gather(forwarding, return_exceptions=True)


@asynccontextmanager
async def cutting_proxy(broker_url: str) -> AsyncIterator[Proxy]:
    """A proxy in front of a broker."""
    proxy = Proxy(urlsplit(broker_url).port or 6379)
    async with serving(proxy.serve) as port:
        proxy.url = f"redis://127.0.0.1:{port}/0"
        yield proxy
