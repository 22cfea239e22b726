"""Real receivers of webhooks, on loopback: each does what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from samphire.webhooks import WebhookEvent, verify
from tests.support.serving import serving

Respond = Callable[["Receiver", "Received", asyncio.StreamWriter], Awaitable[None]]
"""Answers one request; what it writes is what goes out."""


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, *secrets: str) -> WebhookEvent:
        return verify(self.body, self.headers, list(secrets))


async def ok(receiver: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
    """It has it."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


def status(code: int, *headers: str, body: bytes = b"no") -> Respond:
    """An answer with a status."""

    async def respond(receiver: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {code} X", f"content-length: {len(body)}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode() + body)

    return respond


def raw(data: bytes, *, close: bool = True) -> Respond:
    """Whatever bytes."""

    async def respond(receiver: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        if close:
            await writer.drain()
            writer.close()

    return respond


async def never(receiver: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
    """No answer."""
    await asyncio.Event().wait()


def after(event: asyncio.Event, then: Respond = ok) -> Respond:
    """An answer once something has happened."""

    async def respond(receiver: Receiver, received: Received, writer: asyncio.StreamWriter) -> None:
        await event.wait()
        await then(receiver, received, writer)

    return respond


@dataclass
class Receiver:
    """A server that keeps what it gets."""

    respond: Respond = ok
    got: list[Received] = field(default_factory=list)
    connections: int = 0
    at_once: int = 0
    most_at_once: int = 0
    port: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hook/token-in-path?key=token-in-query"

    def ids(self) -> list[str]:
        return [received.id for received in self.got]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await self._head(reader):
                path, headers = head
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                received = Received(path, headers, body)
                self.got.append(received)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    await self.respond(self, received, writer)
                    await writer.drain()
                finally:
                    self.at_once -= 1
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass

    async def _head(self, reader: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
        first = await reader.readline()
        if not first:
            return None
        headers = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return first.decode().split(" ")[1], headers


@contextlib.asynccontextmanager
async def receiver(respond: Respond = ok, port: int = 0, ssl: Any = None) -> AsyncIterator[Receiver]:
    """A receiver that serves."""
    made = Receiver(respond, scheme="http" if ssl is None else "https")
    async with serving(made.serve, port, ssl) as made.port:
        yield made
