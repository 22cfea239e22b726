"""Readers of streams beside the other clients of a round: whatever happens, each stream ends, and its end is true."""

from __future__ import annotations

import asyncio
import contextlib
import time

import numpy as np

from samphire import AsyncClient, BrokerUnavailableError, SamphireError, TaskEvent
from tests.faults.stand import Stand

READERS = 3
TOKENS, INTERVAL_MS = 40, 25
END_TIMEOUT_S = 90.0
"""For the end of a stream, from its last event on."""
ENDS = ("succeeded", "failed", "cancelled", "expired")


class StreamReaders:
    """Some readers, each with one stream after the other."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.ended = 0
        """Streams that were read to their end."""
        self.restarts = 0
        """Times that outputs began anew, or that a gap was told."""
        self.untrue: list[str] = []
        """What was not as it must be."""

    def start(self) -> None:
        """Begin to read."""
        self._tasks = [asyncio.create_task(self._read_on(number)) for number in range(READERS)]

    async def rest(self) -> None:
        """Read what is under way to its end, and no more."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _read_on(self, number: int) -> None:
        count = 0
        while not self._stopping:
            count += 1
            text = " ".join(f"{number}x{count}x{word}" for word in range(TOKENS // 4))
            async with AsyncClient(self._stand.broker_url) as client:
                inputs = {"text": np.array([text.encode()], object), "delay_ms": np.array([INTERVAL_MS], np.int32)}
                try:
                    task = await client.submit("token_stream", inputs)
                except SamphireError:  # the broker is away: nothing was promised
                    await asyncio.sleep(0.2)
                    continue
                try:
                    await self._read(client, task.id, text, time.time())
                except Exception as error:  # noqa: BLE001 - told with the others
                    self.untrue.append(f"stream {task.id}: {error!r}")

    async def _read(self, client: AsyncClient, task_id: str, text: str, accepted_at: float) -> None:
        position, pieces, end = None, list[bytes](), None
        while end is None:
            try:
                events = client.task(task_id).events(position)
                async with contextlib.aclosing(events):
                    while end is None:
                        async with asyncio.timeout(END_TIMEOUT_S):
                            event = await anext(events)
                        position = event.position
                        self._take(event, pieces)
                        end = event if event.kind in ENDS else None
            except BrokerUnavailableError:
                await asyncio.sleep(0.2)
            except (TimeoutError, SamphireError) as error:
                if not self._stand.may_be_forgotten(accepted_at):
                    self.untrue.append(f"stream {task_id} has no end: {error!r}, {len(pieces)} outputs, at {position}")
                return
        if end.kind != "succeeded":
            self.untrue.append(f"stream {task_id} has {end.kind}")
        elif b"".join(pieces).decode() != text or end.output_count != len(pieces):
            self.untrue.append(f"stream {task_id}: {end.output_count} outputs, read {b''.join(pieces)!r} of {text!r}")
        self.ended += 1

    def _take(self, event: TaskEvent, pieces: list[bytes]) -> None:
        if event.begins_anew or (event.kind == "started" and pieces):
            self.restarts += 1
            pieces.clear()
        if event.kind == "output":
            if event.index != len(pieces):
                self.untrue.append(f"stream {event.task_id}: output {event.index} follows on {len(pieces)} outputs")
            pieces.append(event.outputs["token"][0])
