"""Why a task is not done: where it is, and what it waits for. It is found out by whoever asks; a task pays nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

import msgspec

from samphire.client.messages import mentions, message_id
from samphire.client.place import QueueSearch
from samphire.client.results import TERMINAL, Status, decode_meta, status_of
from samphire.client.session import Session
from samphire.errors import BrokerRightError
from samphire.transport.connection import key_text
from samphire.wire.contract import RetryInfo, TaskMeta
from samphire.wire.keys import (
    CATALOGUE_AWAY,
    CATALOGUE_COMPLETE,
    CATALOGUE_TELLER,
    CATALOGUE_TROUBLE,
    is_of_deliveries,
    parse_queue,
)

LOOKS = 3
"""A task that moves while it is looked for is looked for again."""
HELD_BYTES = 16 * 2**20
"""Most bytes of what workers hold that are looked into."""
ERROR_CHARACTERS = 300

Told = TypeVar("Told", bound=msgspec.Struct)


@dataclass(frozen=True)
class TaskDetail:
    """A task's state, and why it is not done."""

    status: Status
    why: str = ""
    """Why it is not done, in words; "" where it has ended."""
    queue: str = ""
    """The queue that it waits in."""
    ahead: int | None = None
    """About how many tasks of that queue are claimed before it, by their priorities at this moment; None where it is in
    no queue, or its place is not known."""
    attempts: int | None = None
    """How often it was tried, where that is known."""
    next_at: float | None = None
    """When it is scheduled or tried again, in s since 1970."""
    worker: str = ""
    """The worker that holds it."""
    running_s: float | None = None
    """For how long it runs, in s."""
    is_known: bool | None = True
    """False: nobody knows it. None: nothing was found, and not everything could be looked into."""


class _Running(msgspec.Struct):
    """The stored result of a task that runs."""

    hostname: str = ""
    started_at: float | None = None


async def detail_of(session: Session, task_id: str) -> TaskDetail:
    """Find out why a task is not done; raises SamphireError where the broker does not answer."""
    look = _Look(session, task_id)
    found = await look.once()
    for _ in range(LOOKS - 1):
        if found.is_known is not False:
            break
        found = await look.once()
    return found


class _Held(NamedTuple):
    """What is known of what workers hold."""

    worker: str
    """The one that has claimed it; "" for none."""
    is_mentioned: bool
    """A task that they hold is to be followed by it."""
    is_certain: bool
    """Everything was looked into."""


class _Look:
    def __init__(self, session: Session, task_id: str) -> None:
        self._session = session
        self._connection = session.looking
        self._keys = session.broker.keys
        self._id = task_id

    async def once(self) -> TaskDetail:
        raw = await self._connection.ask("GET", self._keys.meta_prefix + self._id)
        if raw is None:
            status = await self._session.waiter.status(self._id)
            if status in TERMINAL:
                return TaskDetail(status)
            return await self._waiting(status, await self._attempts(), "")
        meta = decode_meta(raw)
        status = status_of(meta)
        if status in TERMINAL:
            return TaskDetail(status)
        if status == "running":
            return await self._running(meta)
        told = _decoded(meta, RetryInfo("", ""))
        error = f": {told.exc_type}: {str(told.exc_message)[:ERROR_CHARACTERS]}"
        return await self._waiting(status, told.attempts, error)

    async def _running(self, meta: TaskMeta) -> TaskDetail:
        told = _decoded(meta, _Running())
        if told.started_at is None:  # by an older worker
            return TaskDetail("running", f"held by worker {told.hostname}", worker=told.hostname)
        running_s = max(0.0, await self._session.clock.fresh_now() - told.started_at)
        why = f"held by worker {told.hostname}, running for {running_s:.1f} s"
        return TaskDetail("running", why, worker=told.hostname, running_s=running_s)

    async def _waiting(self, status: Status, attempts: int | None, error: str) -> TaskDetail:
        tried = f"tried {_times(attempts)}, " if attempts else ""
        at = await self._connection.ask("ZSCORE", self._keys.scheduled, self._id)
        if at is not None:
            what = "next at" if attempts or status == "retrying" else "scheduled for"
            why = f"{tried}{what} {_time(float(at))}{error}"
            return TaskDetail(status, why, attempts=attempts, next_at=float(at))
        try:
            found = await QueueSearch(self._connection, self._keys, self._id).find()
        except BrokerRightError as refused:
            why = f"{tried}it is not known where it is: {refused}"
            return TaskDetail(status, why, attempts=attempts, is_known=None)
        if found.place is not None:
            queue, ahead, queued = found.place
            blocked = await self._blocked(queue)
            place = f"{ahead:,} of the {queued:,} tasks in queue {queue} are before it"
            why = tried + (f"{blocked}; {place}" if blocked else place) + error
            return TaskDetail(status, why, queue, ahead, attempts)
        held = await self._held()
        if held.worker:
            why = f"{tried}held by worker {held.worker}, not started yet{error}"
            return TaskDetail(status, why, attempts=attempts, worker=held.worker)
        if found.is_mentioned or held.is_mentioned:
            return TaskDetail(status, "a task before it, in a chain or a chord, has not ended", attempts=attempts)
        if found.is_certain and held.is_certain and status == "queued":
            return TaskDetail(status, "nobody knows it: no queue, no worker and no result has this id", is_known=False)
        why = f"{tried}its place is not known: a worker holds it, or too much is queued to look for it{error}"
        return TaskDetail(status, why, attempts=attempts, is_known=None)

    async def _attempts(self) -> int | None:
        """How often it was tried, of one that a lost worker had; None where this user may not know."""
        try:
            attempts = await self._connection.ask("HGET", self._keys.task_prefix + self._id, "attempts")
        except BrokerRightError:
            return None
        return None if attempts is None else int(attempts)

    async def _held(self) -> _Held:
        """Look into what workers hold, and into what waits for its time."""
        left, is_mentioned, is_certain = HELD_BYTES, False, True
        try:
            workers = [key_text(worker) for worker in await self._connection.ask("SMEMBERS", self._keys.workers)]
            hashes = {f"{self._keys.worker_prefix}{worker}:inflight": worker for worker in workers}
            for name in (*hashes, self._keys.scheduled_messages):
                pages = self._connection.scan("HSCAN", name, options=("COUNT", 8))  # a message may be large
                async for message in (value async for page in pages for value in page[1::2]):
                    left -= len(message)
                    if left < 0:
                        return _Held("", is_mentioned, is_certain=False)
                    if message_id(message) == self._id and name in hashes:
                        return _Held(await self._name_of(hashes[name]), is_mentioned=False, is_certain=True)
                    mentioned = mentions(message, self._id)
                    is_mentioned = is_mentioned or mentioned is True
                    is_certain = is_certain and mentioned is not None
        except BrokerRightError:
            return _Held("", is_mentioned, is_certain=False)
        return _Held("", is_mentioned, is_certain)

    async def _name_of(self, worker: str) -> str:
        info = await self._connection.ask("GET", f"{self._keys.worker_prefix}{worker}:info")
        return msgspec.json.decode(info or b"{}", type=_Running).hostname or worker

    async def _blocked(self, queue: str) -> str:
        """Why nothing is taken from a queue; "" where nothing is known of that."""
        reply = await self._connection.ask("HGETALL", self._keys.catalogue)
        told = {key_text(name): key_text(value) for name, value in zip(reply[::2], reply[1::2], strict=True)}
        try:
            workers = await self._connection.ask("SMEMBERS", self._keys.workers)
            leases = [self._keys.worker_prefix + key_text(worker) for worker in workers]
            is_served = bool(leases) and bool(await self._connection.ask("EXISTS", *leases))
        except BrokerRightError:
            is_served = any(name.startswith(CATALOGUE_TELLER) for name in told)
        return why_nothing_is_taken(queue, told, is_served=is_served)


def why_nothing_is_taken(queue: str, told: Mapping[str, str], *, is_served: bool) -> str:
    """Why nothing is taken from a queue, by what the workers tell in the catalogue; "" where nothing is known of that.

    Args:
        queue: its name.
        told: the catalogue.
        is_served: whether any worker runs.
    """
    if not is_served:
        return "no worker runs"
    away = [value for name, value in told.items() if name.startswith(CATALOGUE_AWAY)]
    model = parse_queue(queue)[0]
    if is_of_deliveries(model):
        return ""
    if away and len(away) == sum(name.startswith(CATALOGUE_TELLER) for name in told):
        return f"no endpoint answers: {away[0]}"
    if not model or told.get(model):
        return ""
    if trouble := told.get(CATALOGUE_TROUBLE + model):
        return f"model {model} is not loaded: {trouble}"
    if model in told:
        return f"model {model} is not loaded"
    return f"no endpoint of the workers has the model {model}" if CATALOGUE_COMPLETE in told else ""


def _decoded(meta: TaskMeta, nothing: Told) -> Told:
    """A stored result of the type of `nothing`, which is returned for what Celery itself has written."""
    try:
        return msgspec.json.decode(meta.result, type=type(nothing))
    except msgspec.MsgspecError:
        return nothing


def _times(count: int | None) -> str:
    return {1: "once", 2: "twice"}.get(count or 0, f"{count} times")


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
