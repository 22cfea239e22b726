"""What workers do for clients beside the queues: the schedule, cancellations, letters, deletions, the catalogue."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence

from samphire.errors import BrokerRightError
from samphire.transport.connection import key_text
from samphire.transport.direct import Argument, read_blob
from samphire.wire import keys
from samphire.wire.contract import DELETED, Ref
from samphire_broker.settings import Settings
from samphire_broker.store.calls import Calls
from samphire_broker.store.records import STREAM_MAX_LENGTH, STREAM_TTL_S, LetterCounts, Looked, Scheduled, by_value

CANCELLED_MAX = 100_000
CANCELLED_TTL_S = 7 * 86_400
CANCELS_MAX = 500
DUE_MAX = 500
DELETES_MAX = 500
LETTERS_MAX = 200
CATALOGUE_TTL_S = 60
NAMES_A_CALL = 1000
LISTS_A_CALL = 400

_LOOKED = by_value(Looked)


class Requests(Calls):
    """All of it may be repeated after a lost reply."""

    def __init__(self, settings: Settings, worker_id: str) -> None:
        super().__init__(settings, worker_id)
        self._forms: dict[bytes, str | None] = {}
        """What the names in the set of queues mean."""

    async def schedule(self, tasks: Sequence[tuple[str, str, float]]) -> list[Scheduled]:
        """Put claims (field, task id, time in s since 1970) aside until their time."""
        args: list[Argument] = [self.keys.meta_prefix, *(part for task in tasks for part in task)]
        key_names = [
            self._inflight,
            self._started,
            self.keys.scheduled,
            self.keys.scheduled_messages,
            self.keys.cancelled,
        ]
        key_names += [self.keys.ended, self.keys.ended_before]
        return [Scheduled(verdict) for verdict in await self._run("schedule", key_names, args)]

    async def return_due(self) -> int:
        """Return scheduled tasks whose time has come to their queues, at most `DUE_MAX`; how many."""
        return int(
            await self._run(
                "due", [self.keys.scheduled, self.keys.scheduled_messages], [self.keys.wake_channel, DUE_MAX]
            )
        )

    async def scheduled(self, most: int) -> list[tuple[str, float, str, bytes]]:
        """The earliest of the scheduled tasks: id, time in s since 1970, list that it returns to, message."""
        found = await self._rest.execute("ZRANGE", self.keys.scheduled, 0, most - 1, "WITHSCORES")
        if not found:
            return []
        ids = [key_text(task_id) for task_id in found[::2]]
        values = await self._rest.execute("HMGET", self.keys.scheduled_messages, *ids)
        tasks = []
        for task_id, due, value in zip(ids, found[1::2], values, strict=True):
            if value is not None:
                list_key, _, message = value.partition(b" ")
                tasks.append((task_id, float(due), key_text(list_key), message))
        return tasks

    async def cancel(self, meta: str, task_ids: Sequence[str] = (), again: Sequence[str] = ()) -> dict[str, str]:
        """End tasks: those that clients ask for, at most `CANCELS_MAX`, and `task_ids`.

        Args:
            meta: the result to store, with an empty task id.
            task_ids: tasks that a revocation names; they may be anybody's.
            again: requests ("<stream> <task id>") that were answered with `NOWHERE`, once all queues are named.

        Returns:
            "cancelled" or "marked" by task id, "running" of each marked one that this worker has started, or Celery's
            state of a task that is past cancelling, or runs elsewhere; "nowhere <stream>" of what is in no queue that
            is known, "unknown" of what is in none.
        """
        args: list[Argument] = [self.keys.meta_prefix, self._settings.result_ttl_s, STREAM_MAX_LENGTH, STREAM_TTL_S]
        args += [CANCELLED_TTL_S, CANCELLED_MAX, meta, self.keys.wake_channel, CANCELS_MAX, self.keys.answer_prefix]
        args += [
            keys.INTAKE,
            self.keys.worker_prefix,
            self.keys.dead_prefix,
            self.keys.task_prefix,
            self._settings.remembered_s,
        ]
        args += [len(again), *again, *task_ids]
        key_names = [
            self.keys.cancels,
            self.keys.cancelled,
            self.keys.scheduled,
            self.keys.scheduled_messages,
            self.keys.cancelled_lately,
        ]
        key_names += [self._started, self.keys.queues, self.keys.workers]
        key_names += [self.keys.ended, self.keys.ended_before, self.keys.ended_turn, self.keys.cancelled_running]
        reply = [key_text(value) for value in await self._run("cancel", key_names, args)]
        return dict(zip(reply[::2], reply[1::2], strict=True))

    async def is_cancelled(self, task_id: str) -> bool:
        """Whether a task was cancelled before it was claimed."""
        return await self._rest.execute("ZSCORE", self.keys.cancelled, task_id) is not None

    async def delete_results(self) -> int:
        """Delete results that clients have read and no longer need; how many they named."""
        args: list[Argument] = [self.keys.meta_prefix, keys.RESULT_BLOB_PREFIX, DELETED, DELETES_MAX]
        return int(await self._run("delete", [self.keys.deletes], args))

    async def serve_letters(self) -> int:
        """Redrive and purge the dead letters that clients name; how many they named."""
        args: list[Argument] = [
            self.keys.dead_prefix,
            self.keys.meta_prefix,
            self.keys.task_prefix,
            self.keys.wake_channel,
            LETTERS_MAX,
        ]
        args += [STREAM_MAX_LENGTH, STREAM_TTL_S, self._settings.dead_letter_ttl_s, keys.BLOB_PREFIX]
        key_names = [self.keys.letters, self.keys.dead, self.keys.tried, self.keys.ended, self.keys.ended_before]
        return int(await self._run("letters", key_names, args))

    async def trim_letters(self) -> LetterCounts:
        """Delete the oldest dead letters beyond the limit, at most `BATCH_MAX` a call; what there is."""
        args: list[Argument] = [
            self.keys.dead_prefix,
            self._settings.dead_letters_max,
            self._settings.dead_letter_ttl_s,
        ]
        deleted, left, oldest, now = await self._run("trim", [self.keys.dead], args)
        return LetterCounts(deleted, left, float(now) - float(oldest) if oldest else 0.0)

    async def publish_catalogue(self, told: Mapping[str, bytes]) -> None:
        """Tell clients what the models take, and take out what no worker tells; what none renews expires."""
        args: list[Argument] = [self.worker_id, CATALOGUE_TTL_S, *(part for item in told.items() for part in item)]
        await self._run("catalogue", [self.keys.catalogue, self.keys.workers], args)

    async def known_queues(self) -> set[str]:
        """The queues whose names are noted; what is no queue's name is taken out."""
        names = await self._rest.execute("SMEMBERS", self.keys.queues)
        # Asked every second, and nearly always the same.
        before = self._forms
        self._forms = {name: before[name] if name in before else keys.known_form(name) for name in names}
        strange = [name for name, queue in self._forms.items() if queue is None or len(queue) != len(name)]
        with contextlib.suppress(BrokerRightError):
            for first in range(0, len(strange), NAMES_A_CALL):
                await self._rest.execute("SREM", self.keys.queues, *strange[first : first + NAMES_A_CALL])
        return {queue for queue in self._forms.values() if queue}

    async def look_at_queues(self, old: Sequence[str], others: Sequence[str]) -> list[Looked]:
        """Look which queues, the old ones and the others, hold something; of the old the names of empty ones go."""
        verdicts = await self._run("forget", [self.keys.queues], [len(old), *old, *others])
        return [_LOOKED[verdict] for verdict in verdicts]

    async def depths(self, lists: Sequence[str]) -> list[tuple[int | None, float | None]]:
        """How many messages lie in each of some lists, and when the one that is next was submitted, in s since 1970.

        None where that is not known: this user may not ask, the message does not say it, or it had to wait for a time
        of its own.
        """
        found: list[tuple[int | None, float | None]] = []
        while len(found) < len(lists):
            some = [self.keys.of_celery(name) for name in lists[len(found) : len(found) + LISTS_A_CALL]]
            values = await self._run("depths", some, [], self._counts)
            for length, sent in zip(values[::2], values[1::2], strict=True):
                found.append((None if length < 0 else length, _number(sent)))
        return found

    async def name_queues(self, queues: Collection[str]) -> None:
        """Note the names of queues that were found, so that other workers know them."""
        await self._rest.execute("SADD", self.keys.queues, *queues)

    async def find_queues(self, cursor: int) -> tuple[int, set[str]]:
        """One bounded step of a scan for queues that plain producers made; returns the next cursor."""
        pattern = self.keys.of_celery(f"{keys.INTAKE}.*")
        following, found = await self._rest.execute("SCAN", cursor, "MATCH", pattern, "COUNT", 1000, "TYPE", "list")
        return int(following), {queue for key in found if (queue := self.keys.queue_in(key))}

    async def read_blob(self, key: str, size: int) -> bytes | None:
        """Bytes of a claim check, at most one more than `size`; None when it has expired."""
        return await read_blob(self._blobs, self.keys.own(key), size)

    async def write_blob(self, tenant: str, task_id: str, number: int, data: bytes, sha256: str, ttl_s: int = 0) -> Ref:
        """Store an output as a claim check, at least with the lifetime of results.

        What its bytes are is in its name: a late attempt of a worker that was taken for lost overwrites nothing else.
        """
        key = f"{keys.result_blobs_of(tenant)}{task_id}:{number}:{sha256[:16]}"
        await self._blobs.execute("SET", self.keys.own(key), data, "EX", max(ttl_s, self._settings.result_ttl_s))
        return Ref(key=key, size=len(data), sha256=sha256)


def _number(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:  # whoever may push to a queue may write anything
        return None
