"""Who knows what about each task: the client that submitted it, its event stream, its publications, the model.

Each source is read as it grows, by itself:

    journal of a client      submits that have returned, results that were read and compared
    events:<client>          the terminal event, written in the same step as the result; survives a broker restart
    celery-task-meta-<id>    the terminal publication, a channel: nobody hears it who is just reconnecting
    executions               every row that the model was asked for
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from samphire.client.results import TERMINAL
from tests.support.names import KEYS

TERMINAL_META = re.compile(rb'"status": ?"(SUCCESS|FAILURE|REVOKED)"')
LOOK_S = 0.02
BLOCK_MS = 1000
RECONNECT_S = 0.02


@dataclass(slots=True)
class Entry:
    """One task."""

    number: int | None = None
    """What was submitted; None while, or where, no submit of this id has returned."""
    client: str = ""
    accepted_at: float = 0.0
    verdict: str = ""
    """What its client read: `right`, `wrong`, or an error."""
    state: str = ""
    first_ended_at: float = 0.0
    ended_at: float = 0.0
    ends: int = 0
    """Terminal events."""
    published: int = 0
    """Terminal publications that were heard."""


@dataclass(slots=True)
class Tail:
    """The complete lines that a file has gained."""

    path: Path
    offset: int = 0

    def lines(self) -> Iterator[str]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        complete = data.rfind(b"\n") + 1
        self.offset += complete
        yield from data[:complete].decode().splitlines()


@dataclass
class Ledger:
    """All tasks since the last `close`."""

    broker_url: str
    executions_file: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    executions: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """Submits that raised, by error."""
    ended_again: int = 0
    """Terminal events of tasks that were accounted for in an earlier round."""
    last_end: float = 0.0
    resting: set[str] = field(default_factory=set)
    """Clients that were told to rest, and have no submit under way."""

    def __post_init__(self) -> None:
        self._closed: set[str] = set()
        self._journals: dict[str, Tail] = {}
        self._executed = Tail(self.executions_file)
        self._tasks: list[asyncio.Task[None]] = []
        self._markers = set[str]()
        self._stopping = False

    def start(self) -> None:
        """Begin to read; needs a running loop."""
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._hear())]

    async def stop(self) -> None:
        """Read no more. A cancellation alone may be lost in redis-py, so the readers look at a flag as well."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended  # what was not read was not accounted for

    def follow(self, client: str, journal: Path) -> None:
        """Read a client's journal, and the stream that it names."""
        self._journals[client] = Tail(journal)

    # -- what is known ------------------------------------------------------------------------------

    def unended(self, client: str = "") -> list[str]:
        """Tasks whose submit has returned and whose end is not known, of one client or of all."""
        return [
            task_id
            for task_id, entry in self.entries.items()
            if entry.number is not None and not entry.ends and client in ("", entry.client)
        ]

    def unread(self, client: str) -> list[str]:
        """Tasks whose result this client has not read."""
        return [
            task_id
            for task_id, entry in self.entries.items()
            if entry.client == client and entry.number is not None and not entry.verdict
        ]

    def has_read_all(self, client: str) -> bool:
        """Whether this client rests, and has read the results of all that it submitted."""
        return client in self.resting and not self.unread(client)

    async def hear_all(self) -> None:
        """Return when all publications up to now are counted: they travel on another connection than events."""
        marker = f"#{time.monotonic_ns()}"
        async with self._connect() as client:
            while marker not in self._markers:  # whoever is just subscribing again does not hear it
                await client.publish(KEYS.meta_prefix + marker, "")
                await asyncio.sleep(LOOK_S)

    async def wait_ended(self, task_ids: Collection[str], timeout_s: float) -> float:
        """Return when the last of these tasks has ended.

        Raises:
            TimeoutError: some have not.
        """
        left = set(task_ids)
        deadline = time.monotonic() + timeout_s
        while left := {task_id for task_id in left if not self._has_ended(task_id)}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(left)} of {len(task_ids)} tasks have not ended within {timeout_s:.0f} s")
            await asyncio.sleep(LOOK_S)
        return max((self.entries[task_id].ended_at for task_id in task_ids if task_id in self.entries), default=0.0)

    def _has_ended(self, task_id: str) -> bool:
        entry = self.entries.get(task_id)
        return task_id in self._closed if entry is None else entry.ends > 0

    def close(self) -> None:
        """Forget the tasks, but that they have ended."""
        self._closed.update(task_id for task_id, entry in self.entries.items() if entry.ends)
        self.entries.clear()
        self.executions.clear()
        self.refused.clear()
        self.ended_again = 0

    # -- the sources --------------------------------------------------------------------------------

    def _entry(self, task_id: str) -> Entry:
        return self.entries.setdefault(task_id, Entry())

    def read_files(self) -> None:
        """Take in what the files have gained."""
        for client, tail in list(self._journals.items()):
            for line in tail.lines():
                kind, first, *rest = line.split(" ")
                if kind == "S":
                    self._tasks.append(asyncio.create_task(self._follow(first)))
                elif kind == "A":
                    entry = self._entry(first)
                    entry.number, entry.client, entry.accepted_at = int(rest[0]), client, float(rest[1])
                elif kind == "E":
                    self._entry(first).verdict = rest[0]
                elif kind == "R":
                    self.resting.add(client)
                else:
                    self.refused[first] += 1
        self.executions.update(int(line) for line in self._executed.lines())

    async def _look(self) -> None:
        while not self._stopping:
            self.read_files()
            await asyncio.sleep(LOOK_S)

    def _connect(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis.from_url(self.broker_url, retry=Retry(NoBackoff(), 0), socket_timeout=5)

    async def _follow(self, stream: str) -> None:
        last: bytes | str = "0-0"
        async with self._connect() as client:
            while not self._stopping:
                try:
                    found: Any = await client.xread({KEYS.own(stream): last}, block=BLOCK_MS)
                except RedisError:
                    await asyncio.sleep(RECONNECT_S)
                    continue
                for _, events in found:
                    for last, fields in events:  # noqa: B007 - the last one is where to go on
                        self._ended(fields)

    def _ended(self, fields: dict[bytes, bytes]) -> None:
        now = time.monotonic()
        for state, task_ids in fields.items():
            if state.decode() not in TERMINAL:
                continue
            for task_id in task_ids.decode().split(" "):
                if task_id in self._closed:
                    self.ended_again += 1
                    continue
                entry = self._entry(task_id)
                entry.state, entry.ended_at = state.decode(), now
                entry.first_ended_at = entry.first_ended_at or now
                entry.ends += 1
        self.last_end = now

    def _heard(self, task_id: str, meta: bytes) -> None:
        if task_id.startswith("#"):
            self._markers.add(task_id)
        elif TERMINAL_META.search(meta) and task_id not in self._closed:
            self._entry(task_id).published += 1

    async def _hear(self) -> None:
        """Count the publications; a subscription that is cut is made again."""
        while not self._stopping:
            try:
                async with self._connect() as client, client.pubsub() as subscription:
                    await subscription.psubscribe(f"{KEYS.meta_prefix}*")
                    while not self._stopping:
                        message = await subscription.get_message(ignore_subscribe_messages=True, timeout=1.0)
                        if message is not None:
                            self._heard(message["channel"].decode().removeprefix(KEYS.meta_prefix), message["data"])
            except RedisError:
                await asyncio.sleep(RECONNECT_S)
