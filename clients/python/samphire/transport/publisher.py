"""Publication: submits that come while a call is under way go out together with the next."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib import resources
from itertools import chain
from typing import Any, NamedTuple

from samphire.errors import (
    BrokerMemoryFullError,
    BrokerUnavailableError,
    ClientClosedError,
    IdempotencyConflictError,
    ProtocolError,
    QueueFullError,
    SamphireError,
)
from samphire.transport.address import Broker
from samphire.transport.direct import Argument, DirectConnection, Script
from samphire.transport.repeat import Pauses
from samphire.wire import keys

BATCH_MESSAGES = 512
BATCH_BYTES = 4 * 2**20
MEMORY_CHECK_INTERVAL_S = 0.1
RETRY_AFTER_S = 1.0
"""What a submit that is refused, because the queue or the broker's memory is full, is told to wait: long enough for a
worker to have done something about it, short enough to be there when it has. How fast it drains nobody knows here."""
ONCE_TTL_S = 300
"""How long the broker knows that it has carried out a call: longer than anybody repeats it."""
REPEAT_FOR_S = 3.0
REPEAT_MIN_S = 0.05
REPEAT_MAX_S = 0.5


class IdempotencyKey(NamedTuple):
    """What makes two submits one."""

    name: str
    """Of the key, a digest of whom it belongs to."""
    task_id: str
    digest: str
    ttl_s: int


class Outgoing(NamedTuple):
    """Messages for one list, with their claim checks; submitted all or none."""

    queue: str
    priority: int
    messages: list[bytes]
    blobs: list[tuple[str, bytes]]
    accepted: asyncio.Future[str]
    """The id of the task that the idempotency key has; empty where these messages were queued."""
    idempotency: IdempotencyKey | None = None

    @property
    def nbytes(self) -> int:
        """Size on the wire."""
        return sum(map(len, self.messages)) + sum(len(data) for _, data in self.blobs)


class Publisher:
    """Pushes messages to queues: one call of `submit.lua` a batch, repeated after a lost reply, carried out once.
    One connection is enough, since one call is under way at a time.
    """

    def __init__(self, broker: Broker, *, queue_limit: int, blob_ttl_s: int) -> None:
        self._keys = broker.keys
        self.connection = DirectConnection(broker.address)
        """For other commands as well, which wait until a batch is out."""
        self._script = Script((resources.files("samphire.transport") / "submit.lua").read_text())
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

    async def publish(
        self,
        queue: str,
        priority: int,
        messages: list[bytes],
        blobs: list[tuple[str, bytes]],
        idempotency: IdempotencyKey | None = None,
    ) -> str:
        """Return once the broker has the messages: "", or the id of the task that the idempotency key has already.

        Raises:
            IdempotencyConflictError: that task was asked for something else; nothing was queued.
            QueueFullError: the queue's limit is reached; nothing was queued.
            BrokerMemoryFullError: 80 % of the broker's memory is used; nothing was queued.
            BrokerUnavailableError: no answer; the messages may or may not be queued.
            ClientClosedError: the client was closed; the messages may or may not be queued.
        """
        if self._closed:
            raise ClientClosedError
        accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        outgoing = Outgoing(queue, priority, messages, blobs, accepted, idempotency)
        if self._busy:  # joins the next batch
            self._waiting.append(outgoing)
            return await accepted
        self._busy = True
        try:
            return await self._send([outgoing])
        finally:
            self._busy = bool(self._waiting) and not self._closed
            if self._busy:
                self._flusher = asyncio.create_task(self._flush())

    async def request(self, list_key: str, request: str) -> None:
        """Ask the workers for something that does no harm if it is done twice, by a list that they look into.

        Raises:
            BrokerUnavailableError: no answer, however often it was asked; the request may or may not be there.
        """
        await self._repeat(lambda: self.connection.execute("RPUSH", list_key, request, repeatable=True))

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
            known = await self._send(batch)
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
                    outgoing.accepted.set_result(known)

    def _take(self) -> list[Outgoing]:
        """Remove what fits into one call: submits to the same list, in their order."""
        first = self._waiting.popleft()
        batch, count, nbytes = [first], len(first.messages), first.nbytes
        while self._waiting:
            following = self._waiting[0]
            count += len(following.messages)
            nbytes += following.nbytes
            same_list = following.queue == first.queue and following.priority == first.priority
            same_list = same_list and first.idempotency is None and following.idempotency is None
            if not same_list or count > BATCH_MESSAGES or nbytes > BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _send(self, batch: Sequence[Outgoing]) -> str:
        queue, priority = batch[0].queue, batch[0].priority
        messages = list(chain.from_iterable(outgoing.messages for outgoing in batch))
        blobs = [blob for outgoing in batch for blob in outgoing.blobs]
        now = time.monotonic()
        check_memory = now - self._memory_checked > MEMORY_CHECK_INTERVAL_S
        if check_memory:
            self._memory_checked = now
        idempotency = batch[0].idempotency
        args: list[Argument] = [queue, self._queue_limit, int(check_memory), self._keys.wake_channel, self._blob_ttl_s]
        args.append(ONCE_TTL_S)
        args += ("", "", "") if idempotency is None else (idempotency.ttl_s, idempotency.task_id, idempotency.digest)
        args += (keys.SCHEMA_VERSION, self._keys.schema, len(blobs))
        for name, data in blobs:
            args += (self._keys.own(name), data)
        args += messages
        lists = (keys.queue_list(queue, priority), *keys.queue_lists(queue))
        key_names = [*map(self._keys.of_celery, lists), self._keys.queues]
        key_names.append(self._keys.once_prefix + uuid.uuid4().hex)
        if idempotency is not None:
            key_names.append(self._keys.idempotency_prefix + idempotency.name)
        reply = await self._call(key_names, args)
        if reply[0] == b"same":
            return str(reply[1].decode())
        if reply[0] == b"conflict":
            raise IdempotencyConflictError(
                f"the idempotency key belongs to task {reply[1].decode()}, which was asked for something else"
            )
        if reply[0] == b"schema":
            raise ProtocolError(
                f"the workers keep their keys under {self._keys.namespace!r} by schema {reply[1].decode()[:20]}, this "
                f"client knows schema {keys.SCHEMA_VERSION}: install the version of samphire that they have"
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
        return ""

    async def _call(self, key_names: Sequence[str], args: Sequence[Argument]) -> Any:
        """Call the script; what lost replies leave open is settled by calling again, which does nothing twice."""
        return await self._repeat(lambda: self.connection.call(self._script, key_names, args, repeatable=True))

    async def _repeat(self, action: Callable[[], Awaitable[Any]]) -> Any:
        give_up = time.monotonic() + REPEAT_FOR_S
        pauses = Pauses(REPEAT_MIN_S, REPEAT_MAX_S)
        while True:
            try:
                return await action()
            except BrokerUnavailableError:
                pause_s = pauses.next_s()
                if self._closed or time.monotonic() + pause_s > give_up:
                    raise
            await asyncio.sleep(pause_s)


def _fail(batch: Iterable[Outgoing], error: SamphireError) -> None:
    for outgoing in batch:
        if not outgoing.accepted.done():
            outgoing.accepted.set_exception(error)
