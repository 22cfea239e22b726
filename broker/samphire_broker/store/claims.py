"""A worker's claims: from the queues to their end, or back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from samphire.errors import ProtocolError
from samphire.transport.connection import key_text
from samphire.transport.direct import Argument
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store.calls import Calls
from samphire_broker.store.records import (
    BATCH_MAX,
    STREAM_MAX_LENGTH,
    STREAM_TTL_S,
    Claimed,
    LeaseLostError,
    Led,
    OtherEnd,
    Settled,
    Settlement,
    Started,
    Tried,
    Turn,
    WorkerInfo,
    by_value,
)

INLINE_RESULT_BYTES = 1024

_pack = msgspec.msgpack.Encoder().encode


_STARTED, _SETTLED = by_value(Started), by_value(Settled)


def _packed(settlement: Settlement) -> tuple[Any, ...]:
    """As `settle.lua` takes it: most tasks have nothing beside their result."""
    extra = settlement[5:]
    return (*settlement[:5], extra) if any(extra) else settlement[:5]


class Claims(Calls):
    """Claim, adopt, start, settle, release, route. Only `claim` must not be repeated after a lost reply: what it moved
    is found again with `adopt`. All others are fenced by the in-flight field and may be repeated.
    """

    def __init__(self, settings: Settings, worker_id: str) -> None:
        super().__init__(settings, worker_id)
        self._next_number = 1
        self.some_tried = self.some_cancelled = True
        """Whether some task was tried before, and whether some were cancelled lately, as of the last claim."""
        self.cut_short = False
        """Whether it was the bytes that ended the last claim: there may be more."""

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
        lists = [self.keys.of_celery(turn.list_key) for turn in turns]
        key_names = [self._lease, self._inflight, self.keys.tried, self.keys.cancelled_lately, *lists]
        try:
            reply = await self._run("claim", key_names, args, self._claims)
        except ProtocolError as error:
            if "NOLEASE" in str(error):
                raise LeaseLostError(str(error)) from error
            raise
        values = iter(reply)
        about = next(values)
        self.some_tried, self.some_cancelled = bool(about & 1), bool(about & 2)
        self.cut_short = bool(about & 4)
        return [
            Claimed(key_text(field), size, message) for field, size, message in zip(values, values, values, strict=True)
        ]

    async def adopt(self, known: set[str]) -> list[Claimed]:
        """Return what lies in the in-flight hash and is not in `known`: claims of lost replies, or of an earlier lane.

        None of it runs, whatever that lane had started.
        """
        self.some_tried = self.some_cancelled = True  # it is not known whether there are
        fields = [key_text(field) for field in await self._rest.execute("HKEYS", self._inflight)]
        lost = sorted((field for field in fields if field not in known), key=keys.claim_number)
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

    async def tried(self, task_ids: Sequence[str], *, deliveries: bool = False) -> list[Tried]:
        """What was tried of tasks before they are started, or of deliveries."""
        found = [Tried(0, 0)] * len(task_ids)
        key = self.keys.tried_deliveries if deliveries else self.keys.tried
        members = await self._starts.execute("SMISMEMBER", key, *task_ids)
        for n, is_member in enumerate(members):
            if is_member:
                counts = await self._starts.execute(
                    "HMGET", self.keys.task_prefix + task_ids[n], "attempts", "crashes", "losses", "shared"
                )
                found[n] = Tried(*(int(count or 0) for count in counts))
        return found

    async def alone(self, model: str, for_s: float, hold: int = 0) -> int:
        """Be the only worker that runs anything of a model, or of all (""), for so long; 0 gives it back.

        Each time that it is begun anew has another number as its `hold`: what is carried out late changes no other.

        Returns:
            How many tasks other workers have under way yet; -1: another worker is alone, or this one by another hold,
            and nothing happens.
        """
        args: list[Argument] = [self.worker_id, model, int(for_s * 1000), self.keys.worker_prefix, hold]
        return int(await self._run("alone", [self.keys.alone, self.keys.workers], args))

    async def lead(self, model: str, *, give_back: bool = False, is_alone: bool = False) -> Led:
        """Be the only worker that claims a model's tasks, or stop being so.

        Args:
            model: the model.
            give_back: whether to stop.
            is_alone: this worker was told so before: while it leads, nobody looks for claims of others again.
        """
        args: list[Argument] = [self.worker_id, model, int(give_back), self.keys.worker_prefix, int(is_alone)]
        return Led(await self._run("lead", [self.keys.leaders, self.keys.workers], args))

    async def is_another_alone(self, model: str) -> bool:
        """Whether another worker is alone with a model, or with all."""
        raw = await self._starts.execute("GET", self.keys.alone)
        holder, _, rest = key_text(raw or b"").partition(" ")
        _number, _, whom = rest.partition(" ")
        return bool(holder) and holder != self.worker_id and whom in ("", model)

    async def start(self, tasks: Sequence[tuple[str, str]], info: WorkerInfo) -> list[Started | Tried]:
        """Mark claims (field, task id) as running."""
        args: list[Argument] = [
            self.keys.meta_prefix,
            self.keys.task_prefix,
            self.keys.dead_prefix,
            info.hostname,
            info.pid,
        ]
        args += [self.worker_id, self._settings.dead_letter_ttl_s, _pack(tasks)]
        key_names = [self._inflight, self._started, self.keys.cancelled, self.keys.alone]
        key_names += [self.keys.tried, self.keys.ended, self.keys.ended_before]
        verdicts = await self._run("start", key_names, args, self._starts)
        return [_STARTED[verdict] if isinstance(verdict, int) else Tried(*verdict) for verdict in verdicts]

    async def settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        """End tasks or their attempts, at most `BATCH_MAX`."""
        args: list[Argument] = [self.keys.meta_prefix, self._settings.result_ttl_s, STREAM_MAX_LENGTH, STREAM_TTL_S]
        args += [INLINE_RESULT_BYTES, self.keys.dead_prefix, self._settings.dead_letter_ttl_s, self.worker_id]
        args += [self.keys.wake_channel, self.keys.task_prefix, self._settings.remembered_s]
        args.append(_pack([_packed(settlement) for settlement in settlements]))
        key_names = [self._inflight, self._started, self.keys.dead, self.keys.cancelled]
        key_names += [self.keys.scheduled, self.keys.scheduled_messages, self.keys.tried]
        key_names += [self.keys.ended, self.keys.ended_before, self.keys.ended_turn, self.keys.cancelled_running]
        return [_SETTLED[verdict] for verdict in await self._run("settle", key_names, args, self._endings)]

    async def end_others(self, ends: Sequence[OtherEnd]) -> list[int]:
        """End tasks that nobody holds, unless they have ended: 0 for each that has, 1 for each other, 2 where a webhook
        of it could not be pushed.
        """
        args: list[Argument] = [self.keys.meta_prefix, self._settings.result_ttl_s, STREAM_MAX_LENGTH, STREAM_TTL_S]
        args += [self.keys.task_prefix, self._settings.remembered_s, self.keys.wake_channel]
        for end in ends:
            args += (end.task_id, end.state, end.meta, end.stream, _pack(end.webhooks))
        key_names = [self.keys.ended, self.keys.ended_before, self.keys.ended_turn, self.keys.tried]
        verdicts: list[int] = await self._run("end_others", key_names, args)
        return verdicts

    async def release(self, fields: Sequence[str], *, attempt: str = "", endpoint_died: bool = False) -> int:
        """Hand claims back to the heads of their lists; returns how many were still ours.

        With an `attempt` (JSON) it counts as one of those that had started: one of them may be to blame. Where the
        `endpoint_died` with them that is noted, and is no attempt.
        """
        args: list[Argument] = [self.keys.meta_prefix, self.keys.task_prefix, self._settings.dead_letter_ttl_s, attempt]
        args += (int(endpoint_died), self.worker_id)
        key_names = [self._inflight, self._started, self.keys.tried]
        return int(await self._run("release", key_names, [*args, *fields]))

    async def give_back(self) -> None:
        """Hand back whatever lies in the in-flight hash, as if it had not been claimed."""
        fields = [key_text(field) for field in await self._rest.execute("HKEYS", self._inflight)]
        fields.sort(key=keys.claim_number)
        while fields:  # the last claimed go back first, so the order is kept
            last, fields = fields[-BATCH_MAX:], fields[:-BATCH_MAX]
            await self.release(last)

    async def route(self, moves: Sequence[tuple[str, str, str]]) -> int:
        """Move claims (field, queue, list) on to other queues; returns how many were still ours."""
        args: list[Argument] = [self.keys.wake_channel]
        for move in moves:
            args += move
        return int(await self._run("route", [self._inflight], args))
