"""A receiver of webhooks as a process of its own: it answers at once, and tells at its end what it has got, and when.

`python -m benchmarks.receiver PORT FILE`; with FILE `-` it never answers. SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path

_END = b"\r\n\r\n"
_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

Got = tuple[float, dict[str, str], str]
"""When, the headers of Standard Webhooks, the body."""


class _Connection(asyncio.Protocol):
    def __init__(self, got: list[tuple[float, bytes, bytes]], *, answers: bool) -> None:
        self._got = got
        self._answers = answers
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(_END)) >= 0:
            head = self._data[:end]
            at = head.lower().find(b"content-length:")
            whole = end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
            if len(self._data) < whole:
                return
            self._got.append((time.time(), head, self._data[end + 4 : whole]))
            self._data = self._data[whole:]
            if self._answers:
                self._transport.write(_OK)


async def serve(port: int, file: str) -> None:
    """Serve until SIGTERM."""
    got: list[tuple[float, bytes, bytes]] = []
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    server = await loop.create_server(lambda: _Connection(got, answers=file != "-"), "127.0.0.1", port)
    print("ready", flush=True)
    await ended.wait()
    server.close()
    if file == "-":
        return
    with Path(file).open("w") as out:  # noqa: ASYNC230 - it serves nothing any more
        for at, head, body in got:
            headers = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:])
            named = {name.lower(): value for name, value in headers.items() if name.lower().startswith("webhook-")}
            out.write(json.dumps((at, named, body.decode())) + "\n")


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))
