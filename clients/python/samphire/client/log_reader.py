"""Reading the event logs of tasks: two connections, however many tasks are followed.

A channel tells what was written to a task's log. A reader that has all before it takes it from there; any other reads
the log after its own position, in pages and for many readers with one command. A slow reader has a few entries waiting
here; all others stay in the log until it asks for them. What a channel does not tell (a message may be lost, or the
right to hear it missing) is found by looking now and then.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from samphire.errors import (
    BrokerRightError,
    BrokerUnavailableError,
    ClientClosedError,
    ProtocolError,
    SamphireError,
)
from samphire.transport.address import Broker
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection, read_blob
from samphire.transport.repeat import Pauses
from samphire.wire.positions import NO_EPOCH, Place, place_of

PAGE = 32
"""Entries that are read at once: each has at most about 64 KB."""
PUSHED_MAX = 32
"""Entries that are kept as they are told, of at most 16 KB each."""
KEYS_A_CALL = 256
LISTEN_S = 15.0
RETRY_S = 0.005
RETRY_CAP_S = 0.5
RETRIES_S = 30.0
"""For so long a read is repeated while the broker is away."""


class Entry(NamedTuple):
    """An entry of a log."""

    place: Place
    """Of its last event."""
    before: Place
    """Of the last event before it, whether that is still there or not."""
    event: str
    at: float
    events: int
    """How many are in it."""
    fields: Mapping[bytes, bytes]


class Follower:
    """What a reader has heard of a task's log, and not taken yet."""

    def __init__(self) -> None:
        self.heard = asyncio.Event()
        """Set whenever something may have been written."""
        self._pushed: deque[tuple[str, Entry]] = deque()

    def push(self, epoch: str, entry: Entry | None) -> None:
        """Something was written; what is told beyond a few entries is read from the log."""
        if entry is not None and len(self._pushed) < PUSHED_MAX:
            self._pushed.append((epoch, entry))
        self.heard.set()

    def take(self, epoch: str, after: Place) -> list[Entry]:
        """The entries that follow after a place without a gap, as far as they were told."""
        taken: list[Entry] = []
        while self._pushed:
            told_in, entry = self._pushed.popleft()
            if entry.place <= after:
                continue
            if told_in != epoch or entry.before != after:
                self._pushed.clear()
                break
            taken.append(entry)
            after = entry.place
        return taken


Bounds = tuple[Entry, Entry] | None
"""The first and the last entry of a log."""
Page = tuple[str, list[Entry]]
"""The epoch, and entries. It is asked for after them on the same connection, so it is at least as new as they are: a
broker that was restarted has it set before anything else is written, and a restart breaks the connection."""


class LogReader:
    """Reads the logs of a client's followers."""

    def __init__(self, broker: Broker) -> None:
        self._keys = broker.keys
        self._reads = DirectConnection(broker.address)
        self._hints = DirectConnection(broker.address)
        self._channel_prefix = f"{self._keys.channel_prefix}log:"
        self._followers: defaultdict[str, set[Follower]] = defaultdict(set)
        self._wanted: list[tuple[str, Place, asyncio.Future[Page]]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._hears = False
        """Whether the channels of all followers are subscribed to."""
        self._ask_epoch = ("GET", self._keys.epoch)
        self._closed = False

    async def close(self) -> None:
        """End the background tasks; who reads gets `ClientClosedError`."""
        self._closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._reads.close()
        await self._hints.close()
        wanted, self._wanted = self._wanted, []
        for _, _, future in wanted:
            if not future.done():
                future.set_exception(ClientClosedError())
        self._tell_all()

    def follow(self, task_id: str) -> Follower:
        """Hear what is written to a task's log, until `forget`."""
        if self._closed:
            raise ClientClosedError
        follower = Follower()
        is_new = task_id not in self._followers
        self._followers[task_id].add(follower)
        if is_new:
            self._begin("listen", self._listen)
            if self._hears:
                self._begin(f"subscribe {task_id}", lambda: self._send("SUBSCRIBE", task_id))
        return follower

    def forget(self, task_id: str, follower: Follower) -> None:
        """One who called `follow` reads no longer."""
        self._followers[task_id].discard(follower)
        if not self._followers[task_id]:
            del self._followers[task_id]
            if self._hears and not self._closed:
                self._begin(f"unsubscribe {task_id}", lambda: self._send("UNSUBSCRIBE", task_id))

    async def bounds(self, task_id: str) -> tuple[str, Bounds]:
        """The epoch, and the first and the last entry of a log, where there is one."""
        key = self._keys.log_prefix + task_id
        first, last, epoch = await self._ask(
            ("XRANGE", key, "-", "+", "COUNT", 1), ("XREVRANGE", key, "+", "-", "COUNT", 1), self._ask_epoch
        )
        return _epoch_in(epoch), (_entry(*first[0]), _entry(*last[0])) if first and last else None

    async def last_of(self, task_id: str, event: str, most: int = 100) -> tuple[str, Entry] | None:
        """The epoch, and the last entry of a kind among the last of a log."""
        key = self._keys.log_prefix + task_id
        entries, epoch = await self._ask(("XREVRANGE", key, "+", "-", "COUNT", most), self._ask_epoch)
        for entry in entries:
            found = _entry(*entry)
            if found.event == event:
                return _epoch_in(epoch), found
        return None

    async def read(self, task_id: str, after: Place) -> Page:
        """The epoch, and the next entries of a log after a place, at most `PAGE`; of the first a part may be before."""
        if self._closed:
            raise ClientClosedError
        future: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self._wanted.append((task_id, after, future))
        self._begin("read", self._read_wanted)
        return await future

    async def blob(self, key: str, size: int) -> bytes | None:
        """Bytes of a claim check; None when it has expired."""
        return await read_blob(self._reads, self._keys.own(key), size)

    async def request_follow(self, task_id: str) -> None:
        """Ask the workers to begin a task's log, where it has none."""
        await self._reads.execute("RPUSH", self._keys.follows, task_id, repeatable=True)

    # -- the parts ----------------------------------------------------------------------------------

    def _begin(self, name: str, work: Any) -> None:
        """Begin some work, unless it is under way; its end is noticed."""
        if name not in self._tasks:
            task = self._tasks[name] = asyncio.create_task(work())
            task.add_done_callback(lambda task: self._ended(name, task))

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            wanted, self._wanted = self._wanted, []
            for _, _, future in wanted:
                if not future.done():
                    future.set_exception(ProtocolError(f"reading logs failed: {error!r}"))
        if self._closed:
            return
        if self._wanted:
            self._begin("read", self._read_wanted)
        if name == "listen" and self._followers:
            self._begin("listen", self._listen)

    async def _ask(self, *commands: tuple[str | int, ...]) -> list[Any]:
        """Run commands that change nothing, one after the other, again and again while the broker is away."""
        pauses = Pauses(RETRY_S, RETRY_CAP_S)
        give_up = asyncio.get_running_loop().time() + RETRIES_S
        while True:
            try:
                return await self._reads.ask_all(commands)
            except BrokerUnavailableError:
                if self._closed:
                    raise ClientClosedError from None
                if asyncio.get_running_loop().time() > give_up:
                    raise
            await asyncio.sleep(pauses.next_s())

    async def _read_wanted(self) -> None:
        while self._wanted:
            together: dict[tuple[str, Place], list[asyncio.Future[Page]]] = {}
            left: list[tuple[str, Place, asyncio.Future[Page]]] = []
            named: set[str] = set()
            for task_id, after, future in self._wanted:
                if (task_id, after) in together:
                    together[task_id, after].append(future)
                elif task_id in named or len(named) >= KEYS_A_CALL:
                    left.append((task_id, after, future))  # a command names each log once
                else:
                    named.add(task_id)
                    together[task_id, after] = [future]
            self._wanted = left
            await self._read_together(together)

    async def _read_together(self, together: Mapping[tuple[str, Place], Sequence[asyncio.Future[Page]]]) -> None:
        names = [self._keys.log_prefix + task_id for task_id, _ in together]
        ids = [after.entry_id for _, after in together]
        try:
            count = max(1, PAGE // len(together))  # for each of the logs
            reply, told = await self._ask(("XREAD", "COUNT", count, "STREAMS", *names, *ids), self._ask_epoch)
            epoch = _epoch_in(told)
            found = {key_text(name): [_entry(*entry) for entry in entries] for name, entries in reply or ()}
        except BaseException as error:
            known = error if isinstance(error, SamphireError) else ProtocolError(f"reading logs failed: {error!r}")
            for futures in together.values():
                for future in futures:
                    if not future.done():
                        future.set_exception(ClientClosedError() if self._closed else known)
            if not isinstance(error, SamphireError):
                raise
            return
        for (task_id, _), futures in together.items():
            for future in futures:
                if not future.done():
                    future.set_result((epoch, found.get(self._keys.log_prefix + task_id, [])))

    async def _listen(self) -> None:
        """Hear of what is written to the logs of followers, as long as there are any."""
        pauses = Pauses(RETRY_S, RETRY_CAP_S)
        while self._followers and not self._closed:
            try:
                await self._hints.execute("SUBSCRIBE", self._channel_prefix)  # nobody's: the connection is open then
                self._hears = True
                for task_id in list(self._followers):
                    await self._send("SUBSCRIBE", task_id)
                self._tell_all()  # what was written meanwhile
                while self._followers:
                    message = await self._hints.read(LISTEN_S)
                    pauses.reset()
                    if message is not None and message[0] == b"message":
                        task_id = key_text(message[1]).removeprefix(self._channel_prefix)
                        epoch, entry = _decode_message(message[2])
                        for follower in self._followers.get(task_id, ()):
                            follower.push(epoch, entry)
            except SamphireError as error:  # who follows looks now and then
                self._tell_all()
                await asyncio.sleep(LISTEN_S if isinstance(error, BrokerRightError) else pauses.next_s())
            finally:
                self._hears = False
                await self._hints.close()

    async def _send(self, command: str, task_id: str) -> None:
        if command == "UNSUBSCRIBE" and task_id in self._followers:
            return  # somebody follows it again
        try:
            await self._hints.send(command, self._channel_prefix + task_id)
        except SamphireError:
            self._tell_all()  # the connection is opened again by who listens

    def _tell_all(self) -> None:
        for followers in self._followers.values():
            for follower in followers:
                follower.heard.set()


def _decode_message(message: bytes) -> tuple[str, Entry | None]:
    """The epoch, and an entry as a channel tells it; None: it is only told that there is one."""
    head, has_fields, data = message.partition(b"\n\n")
    if not has_fields:
        return NO_EPOCH, None
    epoch, entry_id, *fields = head.split(b"\n")
    try:
        return key_text(epoch), _entry(entry_id, [*fields, b"d", data])
    except ProtocolError:  # whoever may publish may write anything; the log tells
        return NO_EPOCH, None


def _entry(entry_id: bytes, fields: Sequence[bytes]) -> Entry:
    try:
        known = dict(zip(fields[::2], fields[1::2], strict=True))
        return Entry(
            place_of(entry_id),
            place_of(known[b"p"]),
            key_text(known[b"e"]),
            float(known[b"t"]),
            int(known.get(b"n", 1)),
            known,
        )
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"an entry of a task's log is not understood: {key_text(entry_id)}: {error!r}") from error


def _epoch_in(stored: bytes | None) -> str:
    return key_text(stored).split(" ")[0] if stored else NO_EPOCH
