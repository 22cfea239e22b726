"""The transitions of tasks, as one worker performs them.

Every call is one script on the broker (`lua/<verb>.lua`, each with its keys at the top). Only `claim`
must not be repeated after a lost reply: what it moved is found again with `adopt`. All others are fenced
by the in-flight field and may be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import msgspec

from samphire import keys
from samphire.clock import BrokerClock
from samphire.connection import key_text
from samphire.contract import Ref
from samphire.direct import Argument, DirectConnection, Script, read_blob
from samphire.errors import ProtocolError, SamphireError
from samphire.results import DELETED
from samphire_broker.settings import Settings

STREAM_MAX_LENGTH = 1_000
"""Entries, each of a settled batch; a client that misses some finds its results all the same."""
INLINE_RESULT_BYTES = 1024
STREAM_TTL_S = 3600
CANCELLED = -3
"""What `start` and `schedule` say of a task that was cancelled: it is to be settled as such."""
NOT_YET = -4
"""What `start` says of a task while another worker is alone with its model."""
DUE, REPLACED = 2, 3
"""What `schedule` says of a task whose time has come, and of one that has taken another's place."""
CANCELLED_MAX = 100_000
CANCELLED_TTL_S = 7 * 86_400
CANCELS_MAX = 500
DUE_MAX = 500
DELETES_MAX = 500
LETTERS_MAX = 200
CATALOGUE_TTL_S = 60
BATCH_MAX = 1000
"""Most tasks that one call of a script takes."""

_pack = msgspec.msgpack.Encoder().encode
_CONNECTION_NAME = re.compile(rb" name=" + keys.CONNECTION_PREFIX.encode() + rb"(\S+)")

_UPTIME = re.compile(rb"uptime_in_seconds:(\d+)")


class LeaseLostError(SamphireError):
    """This worker's lease has lapsed: its claims may have been handed to others."""


class Turn(NamedTuple):
    """A list to claim from: what it may give before others give more, and the group whose room it takes."""

    list_key: str
    share: int
    group: int


class Claimed(NamedTuple):
    """One claimed message. `field` is the claim: its number and the list it came from."""

    field: str
    size: int
    message: bytes
    """The whole message, or its last bytes where it is over the limit (then shorter than `size`)."""

    @property
    def list_key(self) -> str:
        """Key of the list that the message came from."""
        return self.field.partition(":")[2]


class Letter(NamedTuple):
    """The dead letter that a failure leaves."""

    letter_id: str
    model: str
    reason: str
    error: str
    attempts: int
    attempt: str = "{}"
    """The last attempt, JSON; those before it are on the store."""


class Later(NamedTuple):
    """When a task is tried again."""

    delay_s: float
    attempt: str
    """What to keep of the attempt that is over, JSON."""


class Tried(NamedTuple):
    """What `start` says of a task that was tried before."""

    attempts: int
    crashes: int
    """Those of them that took a worker or a model's process down."""
    losses: int = 0
    """Endpoints that died with it; no attempts."""
    shared: int = 0
    """Those of the crashes that took down what all workers share: a model's process, or an endpoint."""


class OtherEnd(NamedTuple):
    """The end of another task that this one's end brings about: the steps after a failed one."""

    task_id: str
    state: str
    meta: str
    stream: str


class Settlement(NamedTuple):
    """The end of a task, of its attempt, or of a message that cannot be read, and all that is committed with it."""

    field: str
    task_id: str
    """Empty where it cannot be read."""
    state: str
    meta: str
    """Result as Celery stores it, JSON; empty for a task whose result is to be ignored."""
    stream: str
    blobs: tuple[str, ...] = ()
    """Claim checks to delete."""
    pushes: tuple[tuple[str, str], ...] = ()
    """Next steps: (list, message); text, since Lua's MessagePack knows no bytes."""
    others: tuple[OtherEnd, ...] = ()
    letter: Letter | tuple[()] = ()
    retry: Later | tuple[()] = ()
    """Of a task whose state is "retrying": it waits with the scheduled ones."""


class Letters(NamedTuple):
    """The dead letters, after the limit was enforced."""

    deleted: int
    left: int
    oldest_s: float
    """Age of the oldest; 0 if there is none."""


class Reaped(NamedTuple):
    """What a reap returned to the queues; `moved` -1: the worker lives."""

    moved: int
    started: int
    left: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the others see it."""

    id: str
    hostname: str
    pid: int


def _packed(settlement: Settlement) -> tuple[Any, ...]:
    """As `settle.lua` takes it: most tasks have nothing beside their result."""
    extra = settlement[5:]
    return (*settlement[:5], extra) if any(extra) else settlement[:5]


def _script(name: str) -> Script:
    return Script((resources.files("samphire_broker.store") / "lua" / f"{name}.lua").read_text())


class Store:
    """One worker's hands on the store.

    Every method raises `BrokerUnavailableError` when the broker is away, and `ProtocolError` when it
    answers what cannot be.
    """

    def __init__(self, settings: Settings, worker_id: str) -> None:
        # Each has calls that others must not wait for.
        self._claims = DirectConnection(settings.broker_url)
        self._starts = DirectConnection(settings.broker_url)
        self._endings = DirectConnection(settings.broker_url)
        self._blobs = DirectConnection(settings.broker_url)
        self._rest = DirectConnection(settings.broker_url)
        self._settings = settings
        self.clock = BrokerClock(self._rest)
        self.worker_id = worker_id
        self._lease = keys.WORKER_PREFIX + worker_id
        self._inflight = f"{self._lease}:inflight"
        self._started = f"{self._lease}:started"
        self._next_number = 1
        self.some_tried = self.some_cancelled = True
        """Whether some task was tried before, and whether some were cancelled lately, as of the last claim."""
        names = (
            "alone",
            "beat",
            "lead",
            "claim",
            "start",
            "settle",
            "release",
            "route",
            "reap",
            "schedule",
            "due",
            "cancel",
            "delete",
            "letters",
            "trim",
        )
        self._scripts = {name: _script(name) for name in names}

    async def close(self) -> None:
        """Close all connections."""
        for connection in (self._claims, self._starts, self._endings, self._blobs, self._rest):
            await connection.close()

    async def _run(
        self,
        name: str,
        key_names: Sequence[str],
        args: Sequence[Argument],
        connection: DirectConnection | None = None,
    ) -> Any:
        return await (connection or self._rest).call(self._scripts[name], key_names, args)

    async def beat(self, info: WorkerInfo, connection: DirectConnection) -> int:
        """Renew the lease, on the worker's named connection; 1 means that it had been lost, or is new."""
        key_names = [self._lease, f"{self._lease}:info", keys.WORKERS]
        args: list[Argument] = [self.worker_id, self._settings.lease_ms, msgspec.json.encode(info)]
        return int(await self._run("beat", key_names, args, connection))

    async def claim(
        self, turns: Sequence[Turn], rooms: Sequence[int], max_messages: int, max_bytes: int
    ) -> list[Claimed]:
        """Move messages from lists into this worker's in-flight hash, and return them.

        Args:
            turns: the lists, in the order of service.
            rooms: for each group of lists, how many messages they give together.
            max_messages: most messages in all.
            max_bytes: the claim stops once it has so many.

        Raises:
            LeaseLostError: this worker's lease has lapsed; beat first.
            BrokerUnavailableError: the reply is lost, or nothing was done: `adopt` tells.
        """
        first = self._next_number
        self._next_number += max_messages  # spent even if the reply is lost: a claim's number is used once
        args: list[Argument] = [max_messages, max_bytes, self._settings.max_message_bytes, first]
        for turn in turns:
            args += (turn.share, turn.group + 1)  # Lua counts from 1
        args += rooms
        lists = [turn.list_key for turn in turns]
        key_names = [self._lease, self._inflight, keys.TRIED, keys.CANCELLED_LATELY, *lists]
        try:
            reply = await self._run("claim", key_names, args, self._claims)
        except ProtocolError as error:
            if "NOLEASE" in str(error):
                raise LeaseLostError(str(error)) from error
            raise
        values = iter(reply)
        about = next(values)
        self.some_tried, self.some_cancelled = bool(about & 1), bool(about & 2)
        return [
            Claimed(key_text(field), size, message) for field, size, message in zip(values, values, values, strict=True)
        ]

    async def adopt(self, known: set[str]) -> list[Claimed]:
        """Return what lies in the in-flight hash and is not in `known`: claims of lost replies, or of an earlier lane.

        None of it runs, whatever that lane had started.
        """
        self.some_tried = self.some_cancelled = True  # it is not known whether there are
        fields = [key_text(field) for field in await self._rest.execute("HKEYS", self._inflight)]
        lost = sorted((field for field in fields if field not in known), key=lambda field: int(field.split(":", 1)[0]))
        found: list[Claimed] = []
        for field in lost:
            size = int(await self._rest.execute("HSTRLEN", self._inflight, field))
            message = b""
            if size <= self._settings.max_message_bytes:
                message = await self._rest.execute("HGET", self._inflight, field) or b""
            found.append(Claimed(field, size, message))
        if lost:
            await self._rest.execute("HDEL", self._started, *lost)
        return found

    async def tried(self, task_ids: Sequence[str]) -> list[Tried]:
        """What was tried of tasks before they are started."""
        found = [Tried(0, 0)] * len(task_ids)
        members = await self._starts.execute("SMISMEMBER", keys.TRIED, *task_ids)
        for n, is_member in enumerate(members):
            if is_member:
                counts = await self._starts.execute(
                    "HMGET", keys.TASK_PREFIX + task_ids[n], "attempts", "crashes", "losses", "shared"
                )
                found[n] = Tried(*(int(count or 0) for count in counts))
        return found

    async def alone(self, model: str, for_s: float) -> int:
        """Be the only worker that runs anything of a model, or of all (""), for so long; 0 gives it back.

        Returns:
            How many tasks other workers have under way yet; -1: another worker is alone, nothing happens.
        """
        args: list[Argument] = [self.worker_id, model, int(for_s * 1000), keys.WORKER_PREFIX]
        return int(await self._run("alone", [keys.ALONE, keys.WORKERS], args))

    async def lead(self, model: str, *, give_back: bool = False) -> int:
        """Be the only worker that claims a model's tasks, or stop being so.

        Returns:
            0: another leads, or none any more; 1: this worker leads; 2: it does, and others hold some of the tasks yet.
        """
        args: list[Argument] = [self.worker_id, model, int(give_back), keys.WORKER_PREFIX]
        return int(await self._run("lead", [keys.LEADERS, keys.WORKERS], args))

    async def start(
        self, tasks: Sequence[tuple[str, str]], info: WorkerInfo, *, wait: bool = True
    ) -> list[int | Tried]:
        """Mark claims (field, task id) as running; see `start.lua` for the verdicts.

        Without `wait` also while another worker is alone with the model.
        """
        args: list[Argument] = [keys.META_PREFIX, keys.TASK_PREFIX, info.hostname, info.pid]
        args += [self.worker_id if wait else "", _pack(tasks)]
        key_names = [self._inflight, self._started, keys.CANCELLED, keys.ALONE]
        verdicts = await self._run("start", key_names, args, self._starts)
        return [verdict if isinstance(verdict, int) else Tried(*verdict) for verdict in verdicts]

    async def settle(self, settlements: Sequence[Settlement]) -> list[int]:
        """End tasks or their attempts, at most `BATCH_MAX`; 1 for each that was still ours, 0 for each that was not."""
        args: list[Argument] = [keys.META_PREFIX, self._settings.result_ttl_s, STREAM_MAX_LENGTH, STREAM_TTL_S]
        args += [INLINE_RESULT_BYTES, keys.DEAD_PREFIX, self._settings.dead_letter_ttl_s, self.worker_id]
        args += [keys.WAKE_CHANNEL, keys.TASK_PREFIX, keys.PAID_PREFIX]
        args.append(_pack([_packed(settlement) for settlement in settlements]))
        key_names = [self._inflight, self._started, keys.DEAD, keys.CANCELLED]
        key_names += [keys.SCHEDULED, keys.SCHEDULED_MESSAGES, keys.TRIED, keys.QUEUES]
        ours: list[int] = await self._run("settle", key_names, args, self._endings)
        return ours

    async def schedule(self, tasks: Sequence[tuple[str, str, float]]) -> list[int]:
        """Put claims (field, task id, time in s since 1970) aside until their time; see `schedule.lua`."""
        args = [part for task in tasks for part in task]
        key_names = [self._inflight, self._started, keys.SCHEDULED, keys.SCHEDULED_MESSAGES, keys.CANCELLED]
        verdicts: list[int] = await self._run("schedule", key_names, args)
        return verdicts

    async def return_due(self) -> int:
        """Return scheduled tasks whose time has come to their queues, at most `DUE_MAX`; how many."""
        return int(await self._run("due", [keys.SCHEDULED, keys.SCHEDULED_MESSAGES], [keys.WAKE_CHANNEL, DUE_MAX]))

    async def scheduled(self, most: int) -> list[tuple[str, float, str, bytes]]:
        """The earliest of the scheduled tasks: id, time in s since 1970, list that it returns to, message."""
        found = await self._rest.execute("ZRANGE", keys.SCHEDULED, 0, most - 1, "WITHSCORES")
        if not found:
            return []
        ids = [key_text(task_id) for task_id in found[::2]]
        values = await self._rest.execute("HMGET", keys.SCHEDULED_MESSAGES, *ids)
        tasks = []
        for task_id, due, value in zip(ids, found[1::2], values, strict=True):
            if value is not None:
                list_key, _, message = value.partition(b" ")
                tasks.append((task_id, float(due), key_text(list_key), message))
        return tasks

    async def cancel(self, meta: str, task_ids: Sequence[str] = ()) -> dict[str, str]:
        """End tasks: those that clients ask for, at most `CANCELS_MAX`, and `task_ids`.

        Args:
            meta: the result to store, with an empty task id.
            task_ids: tasks that a revocation names; they may be anybody's.

        Returns:
            "cancelled" or "marked" by task id, "running" of each marked one that this worker has started, or Celery's
            state of a task that is past cancelling, or runs elsewhere; "unknown" of what is no task.
        """
        args: list[Argument] = [keys.META_PREFIX, self._settings.result_ttl_s, STREAM_MAX_LENGTH, STREAM_TTL_S]
        args += [CANCELLED_TTL_S, CANCELLED_MAX, meta, keys.WAKE_CHANNEL, CANCELS_MAX, keys.UNKNOWN_PREFIX]
        args += [keys.INTAKE, keys.WORKER_PREFIX, keys.DEAD_PREFIX, *task_ids]
        key_names = [keys.CANCELS, keys.CANCELLED, keys.SCHEDULED, keys.SCHEDULED_MESSAGES, keys.CANCELLED_LATELY]
        key_names += [self._started, keys.QUEUES, keys.WORKERS]
        reply = [key_text(value) for value in await self._run("cancel", key_names, args)]
        return dict(zip(reply[::2], reply[1::2], strict=True))

    async def is_cancelled(self, task_id: str) -> bool:
        """Whether a task was cancelled before it was claimed."""
        return await self._rest.execute("ZSCORE", keys.CANCELLED, task_id) is not None

    async def delete_results(self) -> int:
        """Delete results that clients have read and no longer need; how many they named."""
        args: list[Argument] = [keys.META_PREFIX, keys.RESULT_BLOB_PREFIX, DELETED, DELETES_MAX]
        return int(await self._run("delete", [keys.DELETES], args))

    async def serve_letters(self) -> int:
        """Redrive and purge the dead letters that clients name; how many they named."""
        args: list[Argument] = [keys.DEAD_PREFIX, keys.META_PREFIX, keys.TASK_PREFIX, keys.WAKE_CHANNEL, LETTERS_MAX]
        args += [STREAM_MAX_LENGTH, STREAM_TTL_S, self._settings.dead_letter_ttl_s]
        return int(await self._run("letters", [keys.LETTERS, keys.DEAD, keys.TRIED], args))

    async def trim_letters(self) -> Letters:
        """Delete the oldest dead letters beyond the limit, at most `BATCH_MAX` a call; what there is."""
        args: list[Argument] = [keys.DEAD_PREFIX, self._settings.dead_letters_max, self._settings.dead_letter_ttl_s]
        deleted, left, oldest, now = await self._run("trim", [keys.DEAD], args)
        return Letters(deleted, left, float(now) - float(oldest) if oldest else 0.0)

    async def publish_catalogue(self, signatures: Mapping[str, bytes], gone: Collection[str]) -> None:
        """Tell clients what the models take, and which are gone; what no worker renews expires."""
        if gone:
            await self._rest.execute("HDEL", keys.CATALOGUE, *gone)
        if signatures:
            await self._rest.execute("HSET", keys.CATALOGUE, *(part for item in signatures.items() for part in item))
            await self._rest.execute("EXPIRE", keys.CATALOGUE, CATALOGUE_TTL_S)

    async def release(self, fields: Sequence[str], *, attempt: str = "", endpoint_died: bool = False) -> int:
        """Hand claims back to the heads of their lists; returns how many were still ours.

        With an `attempt` (JSON) it counts as one of those that had started: one of them may be to blame. Where the
        `endpoint_died` with them that is noted, and is no attempt.
        """
        args: list[Argument] = [keys.META_PREFIX, keys.TASK_PREFIX, self._settings.dead_letter_ttl_s, attempt]
        args.append(int(endpoint_died))
        key_names = [self._inflight, self._started, keys.TRIED]
        return int(await self._run("release", key_names, [*args, *fields]))

    async def give_back(self) -> None:
        """Hand back whatever lies in the in-flight hash, as if it had not been claimed."""
        fields = [key_text(field) for field in await self._rest.execute("HKEYS", self._inflight)]
        fields.sort(key=lambda field: int(field.split(":", 1)[0]))
        while fields:  # the last claimed go back first, so the order is kept
            last, fields = fields[-BATCH_MAX:], fields[:-BATCH_MAX]
            await self.release(last)

    async def route(self, moves: Sequence[tuple[str, str, str]]) -> int:
        """Move claims (field, queue, list) on to other queues; returns how many were still ours."""
        args: list[Argument] = [keys.WAKE_CHANNEL]
        for move in moves:
            args += move
        return int(await self._run("route", [self._inflight, keys.QUEUES], args))

    async def others(self) -> dict[str, int | None]:
        """The other registered workers with their lease's counter; None where the lease has lapsed."""
        members = await self._rest.execute("SMEMBERS", keys.WORKERS)
        ids = sorted({key_text(member) for member in members} - {self.worker_id})
        if not ids:
            return {}
        beats = await self._rest.execute("MGET", *(keys.WORKER_PREFIX + worker_id for worker_id in ids))
        return {worker_id: None if beat is None else int(beat) for worker_id, beat in zip(ids, beats, strict=True)}

    async def connected(self) -> set[str]:
        """Ids of the workers whose named connection is open."""
        listing = await self._rest.execute("CLIENT", "LIST", "TYPE", "NORMAL")
        return {name.decode() for name in _CONNECTION_NAME.findall(listing)}

    async def uptime_s(self) -> int:
        """Seconds since the broker started."""
        found = _UPTIME.search(await self._rest.execute("INFO", "server"))
        return int(found[1]) if found else 0

    async def hostname(self, worker_id: str) -> str:
        """What a worker calls itself; its id where that is not known any more."""
        raw = await self._rest.execute("GET", f"{keys.WORKER_PREFIX}{worker_id}:info")
        return worker_id if raw is None else str(msgspec.json.decode(raw).get("hostname", worker_id))

    async def reap(self, worker_id: str, last_beat: int | None, attempt: str) -> Reaped:
        """Return a lost worker's messages to their lists, at most `BATCH_MAX` a call.

        What had started is an `attempt` (JSON) of its task.
        """
        lease = keys.WORKER_PREFIX + worker_id
        key_names = [lease, f"{lease}:info", f"{lease}:inflight", f"{lease}:started", keys.WORKERS]
        key_names += [keys.TRIED, keys.ALONE]
        args = [worker_id, "" if last_beat is None else last_beat, keys.META_PREFIX, keys.TASK_PREFIX]
        args += [self._settings.dead_letter_ttl_s, attempt]
        return Reaped(*await self._run("reap", key_names, args))

    async def leave(self) -> None:
        """Drop the lease of a worker that holds nothing any more, so that nobody need reap it."""
        if not await self._rest.execute("HLEN", self._inflight):
            await self._rest.execute("SREM", keys.WORKERS, self.worker_id)
        await self._rest.execute("DEL", self._lease, f"{self._lease}:info")

    async def known_queues(self) -> set[str]:
        """Queues that the SDK has submitted to."""
        names = await self._rest.execute("SMEMBERS", keys.QUEUES)
        return {queue for name in names if (queue := keys.known_form(name))}

    async def name_queues(self, queues: Collection[str]) -> None:
        """Note queues that were found, as those of the SDK are."""
        await self._rest.execute("SADD", keys.QUEUES, *queues)

    async def find_queues(self, cursor: int) -> tuple[int, set[str]]:
        """One bounded step of a scan for queues that plain producers made; returns the next cursor."""
        pattern = f"{keys.INTAKE}.*"
        following, found = await self._rest.execute("SCAN", cursor, "MATCH", pattern, "COUNT", 1000, "TYPE", "list")
        return int(following), {queue for key in found if (queue := keys.known_form(key))}

    async def read_blob(self, key: str, size: int) -> bytes | None:
        """Bytes of a claim check, at most one more than `size`; None when it has expired."""
        return await read_blob(self._blobs, key, size)

    async def write_blob(self, task_id: str, number: int, data: bytes, sha256: str) -> Ref:
        """Store an output as a claim check with the lifetime of results.

        What its bytes are is in its name: a late attempt of a worker that was taken for lost overwrites nothing else.
        """
        key = f"{keys.RESULT_BLOB_PREFIX}{task_id}:{number}:{sha256[:16]}"
        await self._blobs.execute("SET", key, data, "EX", self._settings.result_ttl_s)
        return Ref(key=key, size=len(data), sha256=sha256)
