"""Publication: submits that come while a call is under way go out together with the next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import chain
from typing import NamedTuple

from samphire import keys
from samphire.direct import Argument, DirectConnection, Script
from samphire.errors import BrokerMemoryFullError, ClientClosedError, QueueFullError, SamphireError

BATCH_MESSAGES = 512
BATCH_BYTES = 4 * 2**20
MEMORY_CHECK_INTERVAL_S = 0.1
RETRY_AFTER_S = 1.0


class Outgoing(NamedTuple):
    """Messages for one list, with their claim checks; submitted all or none."""

    queue: str
    priority: int
    messages: list[bytes]
    blobs: list[tuple[str, bytes]]
    accepted: asyncio.Future[None]

    @property
    def nbytes(self) -> int:
        """Size on the wire."""
        return sum(map(len, self.messages)) + sum(len(data) for _, data in self.blobs)


class Publisher:
    """Pushes messages to queues: one call of `submit.lua` a batch, never repeated after a lost reply.
    One connection is enough, since one call is under way at a time.
    """

    def __init__(self, broker_url: str, *, queue_limit: int, blob_ttl_s: int) -> None:
        self.connection = DirectConnection(broker_url)
        """For other commands as well, which wait until a batch is out."""
        self._script = Script((resources.files("samphire") / "submit.lua").read_text())
        self._queue_limit = queue_limit
        self._blob_ttl_s = blob_ttl_s
        self._waiting: deque[Outgoing] = deque()
        self._flusher: asyncio.Task[None] | None = None
        self._busy = False
        self._closed = False
        self._memory_checked = 0.0

    async def close(self) -> None:
        """Close the connection; submits under way get `ClientClosedError`."""
        self._closed = True
        if self._flusher is not None:
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
        _fail(self._waiting, ClientClosedError())
        self._waiting.clear()
        await self.connection.close()

    async def publish(self, queue: str, priority: int, messages: list[bytes], blobs: list[tuple[str, bytes]]) -> None:
        """Return once the broker has the messages.

        Raises:
            QueueFullError: the queue's limit is reached; nothing was queued.
            BrokerMemoryFullError: 80 % of the broker's memory is used; nothing was queued.
            BrokerUnavailableError: no answer; the messages may or may not be queued.
            ClientClosedError: the client was closed; the messages may or may not be queued.
        """
        if self._closed:
            raise ClientClosedError
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        outgoing = Outgoing(queue, priority, messages, blobs, accepted)
        if self._busy:  # joins the next batch
            self._waiting.append(outgoing)
            await accepted
            return
        self._busy = True
        try:
            await self._send([outgoing])
        finally:
            self._busy = bool(self._waiting) and not self._closed
            if self._busy:
                self._flusher = asyncio.create_task(self._flush())

    async def request(self, list_key: str, request: str) -> None:
        """Ask the workers for something, by a list that they look into.

        Raises:
            BrokerUnavailableError: no answer; the request may or may not be there, and may be repeated.
        """
        await self.connection.execute("RPUSH", list_key, request)

    async def _flush(self) -> None:
        """Send what has come together, a batch after the other; cancelled only by `close`."""
        batch: list[Outgoing] = []
        try:
            while self._waiting:
                batch = self._take()
                await self._send_together(batch)
        finally:
            self._busy = False
            _fail(batch, ClientClosedError())

    async def _send_together(self, batch: list[Outgoing]) -> None:
        try:
            await self._send(batch)
        except QueueFullError as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for outgoing in batch:  # together they were too many: each has its own chance
                await self._send_together([outgoing])
        except SamphireError as error:
            _fail(batch, error)
        else:
            for outgoing in batch:
                if not outgoing.accepted.done():
                    outgoing.accepted.set_result(None)

    def _take(self) -> list[Outgoing]:
        """Remove what fits into one call: submits to the same list, in their order."""
        first = self._waiting.popleft()
        batch, count, nbytes = [first], len(first.messages), first.nbytes
        while self._waiting:
            following = self._waiting[0]
            count += len(following.messages)
            nbytes += following.nbytes
            same_list = following.queue == first.queue and following.priority == first.priority
            if not same_list or count > BATCH_MESSAGES or nbytes > BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _send(self, batch: Sequence[Outgoing]) -> None:
        queue, priority = batch[0].queue, batch[0].priority
        messages = list(chain.from_iterable(outgoing.messages for outgoing in batch))
        blobs = [blob for outgoing in batch for blob in outgoing.blobs]
        now = time.monotonic()
        check_memory = now - self._memory_checked > MEMORY_CHECK_INTERVAL_S
        if check_memory:
            self._memory_checked = now
        args: list[Argument] = [
            queue,
            self._queue_limit,
            int(check_memory),
            keys.WAKE_CHANNEL,
            self._blob_ttl_s,
            len(blobs),
            *(part for blob in blobs for part in blob),
            *messages,
        ]
        reply = await self.connection.call(
            self._script,
            [keys.queue_list(queue, priority), *keys.queue_lists(queue), keys.QUEUES],
            args,
        )
        if reply[0] == b"full":
            raise QueueFullError(
                f"queue {queue!r} holds {reply[1]} messages; its limit is {self._queue_limit}, "
                f"{len(messages)} more were refused",
                retry_after_s=RETRY_AFTER_S,
            )
        if reply[0] == b"memory":
            self._memory_checked = 0.0
            raise BrokerMemoryFullError(
                f"the broker uses {int(reply[1]):,} of {int(reply[2]):,} bytes; submits are refused above 80 %",
                retry_after_s=RETRY_AFTER_S,
            )


def _fail(batch: Iterable[Outgoing], error: SamphireError) -> None:
    for outgoing in batch:
        if not outgoing.accepted.done():
            outgoing.accepted.set_exception(error)
