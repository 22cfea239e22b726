"""Waking an idle lane: blocking instead of polling.

The SDK publishes when a queue was empty. Plain producers do not, so one connection a queue blocks in
`BLMOVE q q RIGHT RIGHT`: moving a list's last message onto the same place is a blocking peek that takes
nothing. A slow look into the queues covers what neither sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

from samphire.errors import BrokerUnavailableError, SamphireError
from samphire.transport.address import Broker
from samphire.transport.direct import DirectConnection
from samphire.transport.repeat import Pauses
from samphire.wire.keys import known_form
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

BLOCK_S = 5.0
WATCHED_QUEUES = 16
"""Queues that a blocking connection is spent on; of the others the slow look takes care."""

RETRY_S = 0.1
RETRY_CAP_S = 2.0
MAY_CLAIM_S = 0.5
"""Between two looks whether a queue may be claimed from."""


class QueueWatch:
    """One event that says: there may be something to do."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._named: set[str] = set()
        self._anywhere = False
        self._peeks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def wake(self, queue: str | None = None) -> None:
        """There may be something to do, in this queue if it is known."""
        if queue is None:
            self._anywhere = True
        else:
            self._named.add(queue)
        self._wake.set()

    def clear(self) -> tuple[set[str], set[str]]:
        """Forget earlier wake-ups, before looking, so that none is lost.

        Returns the queues that they named, of which some may be new, and those to look into: none if one of the
        wake-ups named none, since then it may be anywhere.
        """
        self._wake.clear()
        heard, anywhere = self._named, self._anywhere
        self._named, self._anywhere = set(), False
        return heard, set() if anywhere else heard

    def close(self) -> None:
        """End the background tasks; redis-py may swallow a cancellation, so they also look at this."""
        self._closed = True
        self.forget(list(self._peeks))

    async def wait(self, timeout_s: float) -> None:
        """Return when woken, or after `timeout_s`."""
        self._idle.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._idle.clear()

    async def listen(self) -> None:
        """Wake on the SDK's channel, until closed."""
        connection = DirectConnection(self._broker.address)
        pauses = Pauses(RETRY_S, RETRY_CAP_S)
        while not self._closed:
            try:
                await connection.execute("SUBSCRIBE", self._broker.keys.wake_channel)
                pauses.reset()
                self.wake()  # whatever was published before is found in the queues
                while not self._closed:
                    message = await connection.read(BLOCK_S)
                    if message is not None and message[0] == b"message":
                        self.wake(known_form(message[2]))
            except BrokerUnavailableError:
                await asyncio.sleep(pauses.next_s())
            except SamphireError as error:  # queues are looked into all the same, if less often
                logger.warning(
                    "wake-ups are not heard, so new tasks may wait a quarter of a second; it is tried again: %s",
                    error,
                    extra={"action": "listen_failed"},
                )
                await asyncio.sleep(pauses.next_s())
            finally:
                await connection.close()

    def add(self, queue: str, work: Work, may_claim: Callable[[str], bool]) -> None:
        """Watch a queue of plain producers, while there are connections to spare.

        While `may_claim` says no, a message in the queue is nothing to wake for.
        """
        if queue not in self._peeks and not self.is_full:
            self._peeks[queue] = work.keep(self._peek(queue, may_claim))

    def forget(self, queues: Iterable[str]) -> None:
        """Watch these no more: their connections are free for others."""
        for queue in queues:
            if peek := self._peeks.pop(queue, None):
                peek.cancel()

    @property
    def is_full(self) -> bool:
        """Whether there is no connection to spare."""
        return len(self._peeks) >= WATCHED_QUEUES

    async def _peek(self, queue: str, may_claim: Callable[[str], bool]) -> None:
        connection = DirectConnection(self._broker.address)
        key = self._broker.keys.of_celery(queue)
        pauses = Pauses(RETRY_S, RETRY_CAP_S)
        command = ("BLMOVE", key, key, "RIGHT", "RIGHT", BLOCK_S)
        try:
            while not self._closed and self._peeks.get(queue) is asyncio.current_task():
                try:
                    await self._idle.wait()
                    if not may_claim(queue):
                        await asyncio.sleep(MAY_CLAIM_S)
                        continue
                    found = await connection.execute(*command, timeout_s=3 * BLOCK_S)
                    pauses.reset()
                    if found is not None:
                        self._idle.clear()
                        self.wake(queue)
                except SamphireError as error:  # away, or a key of that name is no list
                    logger.warning(
                        "queue %s cannot be watched, so a task may wait a quarter of a second there: %s",
                        queue,
                        error,
                        extra={"action": "watch_failed"},
                    )
                    await asyncio.sleep(pauses.next_s())
        finally:
            await connection.close()
