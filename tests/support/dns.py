"""A name server on loopback that says what a test wants (RFC 1035, questions for A and AAAA)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import ip_address
from typing import Any

Answers = Callable[[str], Sequence[str] | None]
"""The addresses of a name; None: no answer at all."""


class _Server(asyncio.DatagramProtocol):
    def __init__(self, answers: Answers, asked: list[str]) -> None:
        self._answers = answers
        self._asked = asked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        labels, at = [], 12
        while length := data[at]:
            labels.append(data[at + 1 : at + 1 + length].decode())
            at += length + 1
        question = data[12 : at + 5]
        kind = struct.unpack("!H", data[at + 1 : at + 3])[0]
        name = ".".join(labels)
        self._asked.append(name)
        found = self._answers(name)
        if found is None:
            return
        version = {1: 4, 28: 6}.get(kind)
        packed = [ip_address(text).packed for text in found if ip_address(text).version == version]
        records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(raw)) + raw for raw in packed)
        head = data[:2] + struct.pack("!HHHHH", 0x8180, 1, len(packed), 0, 0)
        self._transport.sendto(head + question + records, addr)


@contextlib.asynccontextmanager
async def name_server(answers: Answers) -> AsyncIterator[tuple[str, list[str]]]:
    """Its address, and the names that it was asked for."""
    asked: list[str] = []
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Server(answers, asked), sock=sock)
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}", asked
    finally:
        transport.close()
