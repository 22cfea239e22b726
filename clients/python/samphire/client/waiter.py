"""Waiting for results: one connection, however many tasks are awaited.

The workers append the ids of the tasks that end to this client's stream; one blocking read on it tells
which results to fetch, many at a time. The stream is short, so it does not tell everything: of a task that was
submitted before anybody read it, or before entries may have been trimmed unread, the stored result is looked at,
at once. Tasks of other clients are looked at again and again, ever more slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from samphire.client.ended import ended_states
from samphire.client.results import TERMINAL, InferResult, Status, decode_meta, result_of, status_of
from samphire.errors import (
    BrokerRightError,
    BrokerUnavailableError,
    ClientClosedError,
    ProtocolError,
    ResultExpiredError,
    SamphireError,
)
from samphire.transport.address import Broker
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection, read_blob
from samphire.transport.repeat import Pauses

BLOCK_MS = 5000
READ_MAX = 1000
"""Most entries that one read returns: no more than the workers keep. So a read that returns fewer has missed none."""
FETCH_BATCH = 256
LOOK_MIN_S = 0.01
LOOK_MAX_S = 0.5
SWEEP_S = 5.0
RETRY_S = 0.1
RETRY_CAP_S = 0.5
PASSED_MAX = 50_000
"""Ids of ended tasks that are kept in mind; with more, every wait begins with a look."""

Look = Literal["never", "now", "often"] | int
"""How the stored result of a task is looked at: see `Waiter.expect`."""


class Waiter:
    """Futures of results by task id."""

    def __init__(self, broker: Broker, stream: str) -> None:
        self._reads = DirectConnection(broker.address)
        self._events = DirectConnection(broker.address)
        self._keys = broker.keys
        self._stream = self._keys.own(stream)
        self._futures: dict[str, asyncio.Future[InferResult]] = {}
        self._claims: Counter[str] = Counter()
        self._unseen: set[str] = set()
        self._foreign: set[str] = set()
        self._passed: set[str] = set()
        """Tasks whose end was seen in the stream, which tells it once."""
        self.epoch = 0
        """Raised whenever entries of the stream may have been missed; 0 while nobody reads it. The stream tells the end
        of every task that was submitted in the present epoch."""
        self._look_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._pauses = Pauses(RETRY_S, RETRY_CAP_S)
        """Between looks at stored results that find no broker."""
        self._closed = False

    def expect(self, task_id: str, look: Look) -> asyncio.Future[InferResult]:
        """The future of a task's result, one for all who wait for it; do not cancel it, but `forget`.

        `look` at the stored result: "never" for a task that is submitted after this call (the stream will
        tell), "now" for one that was awaited before, "often" for one of others, and a number for one of this
        client's that was submitted in that `epoch`: the result is looked at unless the stream tells.
        """
        if self._closed:
            raise ClientClosedError
        if not self._tasks:
            self.epoch += 1
            loops = (self._read(), self._look(), self._sweep())
            self._tasks = [asyncio.create_task(loop) for loop in loops]
            for task in self._tasks:
                task.add_done_callback(self._noticed)
        self._claims[task_id] += 1
        future = self._futures.get(task_id)
        if future is None:
            future = self._futures[task_id] = asyncio.get_running_loop().create_future()
        if look == "often":
            self._foreign.add(task_id)
            self._unseen.add(task_id)
            self._look_now.set()
        elif look == "now" or (look != "never" and not self._stream_will_tell(task_id, look)):
            self._unseen.add(task_id)
            self._look_now.set()
        return future

    def _stream_will_tell(self, task_id: str, epoch: int) -> bool:
        if task_id in self._passed:
            self._passed.discard(task_id)
            return False
        return epoch == self.epoch

    def forget(self, task_ids: Iterable[str]) -> None:
        """One who called `expect` for these waits no longer."""
        for task_id in task_ids:
            self._claims[task_id] -= 1
            if self._claims[task_id] <= 0:
                del self._claims[task_id]
                self._futures.pop(task_id, None)
                self._foreign.discard(task_id)

    async def close(self) -> None:
        """End the background tasks; who still waits gets `ClientClosedError`."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._events.close()
        await self._reads.close()
        self._fail_all(ClientClosedError())

    def _fail_all(self, error: SamphireError) -> None:
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # who does not wait any more need not be told

    def _noticed(self, task: asyncio.Task[None]) -> None:
        """A loop has ended; unless that is wanted, those who wait must know."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(ProtocolError(f"waiting for results failed: {error!r}"))
            self._closed = True

    async def status(self, task_id: str) -> Status:
        """The state that is stored for a task."""
        raw = await self._reads.ask("GET", self._keys.meta_prefix + task_id)
        if raw is not None:
            return status_of(decode_meta(raw))
        if await self._reads.ask("ZSCORE", self._keys.scheduled, task_id) is not None:
            return "scheduled"
        return (await self._remembered([task_id])).get(task_id, "queued")

    async def cancel_answer(self, task_id: str) -> str:
        """What a worker has just told of a task that has no result: how it had ended, "unknown", or nothing ("")."""
        return key_text(await self._reads.ask("GET", self._keys.answer_prefix + task_id) or b"")

    # -- the stream ---------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Follow this client's stream, until closed."""
        last = b"0-0"
        connected = True
        pauses = Pauses(RETRY_S, RETRY_CAP_S)
        command = ("XREAD", "COUNT", READ_MAX, "BLOCK", BLOCK_MS, "STREAMS", self._stream)
        while not self._closed:
            try:
                if not connected:
                    last, connected = await self._still_there(last), True
                for _, entries in await self._events.execute(*command, last, timeout_s=3 * BLOCK_MS / 1000) or ():
                    if len(entries) >= READ_MAX:
                        self._may_have_missed()
                    for _, fields in entries:
                        await self._ended(dict(zip(fields[::2], fields[1::2], strict=True)))
                    last = entries[-1][0]
                pauses.reset()
            except BrokerUnavailableError:
                connected = False
                self._may_have_missed()
                await asyncio.sleep(pauses.next_s())
            except SamphireError as error:
                self._fail_all(error)
                await asyncio.sleep(pauses.next_s())

    async def _still_there(self, last: bytes) -> bytes:
        """Where to go on: a broker that has lost the stream, and whose clock is late, begins with smaller ids."""
        newest = await self._events.execute("XREVRANGE", self._stream, "+", "-", "COUNT", 1)
        return last if newest and _numbers(newest[0][0]) >= _numbers(last) else b"0-0"

    def _may_have_missed(self) -> None:
        """The stream may not have told everything: what is awaited is looked at, all together."""
        self.epoch += 1
        self._unseen.update(self._futures)
        self._look_now.set()

    async def _ended(self, fields: dict[bytes, bytes]) -> None:
        result = fields.pop(b"result", None)
        for state, ids in fields.items():
            if state.decode() not in TERMINAL:
                continue  # it goes on, or is the number of a run
            task_ids = ids.decode().split(" ")
            if len(self._passed) >= PASSED_MAX:  # too many to know each: all that were submitted so far may have ended
                self._passed.clear()
                self.epoch += 1
            self._passed.update(task_ids)  # also those that are awaited: others may ask for them later
            if result is not None and task_ids[0] in self._futures:
                await self._resolve(task_ids[0], result)
            else:
                missing = await self._fetch(task_ids)
                # A failed one may have been redriven since: then it has not ended.
                await self._tell_expired(missing, certain=state != b"failed")

    async def _sweep(self) -> None:
        """Now and then look at everything that is awaited: an event may have been trimmed."""
        while not self._closed:
            waiting = set(self._futures)
            await asyncio.sleep(SWEEP_S)
            await self._try_fetch([], [task_id for task_id in waiting if task_id in self._futures])

    # -- the stored results -------------------------------------------------------------------------

    async def _look(self) -> None:
        """Look once at what may have ended already, and ever more slowly at the tasks of others."""
        interval_s = LOOK_MIN_S
        while not self._closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s if self._foreign else None):
                    await self._look_now.wait()
                    interval_s = LOOK_MIN_S  # somebody new waits: look closely again
            self._look_now.clear()
            unseen, self._unseen = self._unseen, set()
            await self._try_fetch([*self._foreign - unseen], [*unseen])
            interval_s = min(interval_s * 1.5, LOOK_MAX_S)

    # -- results ------------------------------------------------------------------------------------

    async def _try_fetch(self, again: Sequence[str], first: Sequence[str]) -> None:
        """Look at stored results; those that are looked at for the first time may have expired before."""
        try:
            await self._tell_expired(await self._fetch(first))
            await self._fetch(again)
            self._pauses.reset()
        except BrokerUnavailableError:
            # Nothing is known now: all of them are looked at again.
            self._unseen.update(first, again)
            self._look_now.set()
            await asyncio.sleep(self._pauses.next_s())
        except SamphireError as error:
            self._fail_all(error)

    async def _remembered(self, task_ids: Sequence[str]) -> dict[str, Status]:
        try:
            return await ended_states(self._reads, self._keys, task_ids)
        except BrokerRightError:  # it is not to be known then
            return {}

    async def _tell_expired(self, task_ids: Sequence[str], *, certain: bool = False) -> None:
        """Those who wait for tasks without a result get an error if these have ended; `certain`: they have."""
        states = await self._remembered(task_ids) if task_ids else {}
        ended = [task_id for task_id in task_ids if certain or task_id in states]
        for task_id in await self._fetch(ended):  # it may have ended since its result was looked for
            if task_id in self._futures:
                how = states.get(task_id, "ended")
                self._finish(task_id, ResultExpiredError(f"task {task_id} has {how}, and its result has expired"))

    async def _fetch(self, task_ids: Collection[str]) -> list[str]:
        """Resolve what has a stored result; returns what has none."""
        missing: list[str] = []
        wanted = [task_id for task_id in task_ids if task_id in self._futures]
        for begin in range(0, len(wanted), FETCH_BATCH):
            page = wanted[begin : begin + FETCH_BATCH]
            metas = await self._reads.ask("MGET", *(self._keys.meta_prefix + task_id for task_id in page))
            for task_id, raw in zip(page, metas, strict=True):
                if raw is not None:
                    await self._resolve(task_id, raw)
                else:
                    missing.append(task_id)
        return missing

    async def _resolve(self, task_id: str, raw: bytes) -> None:
        ending: InferResult | SamphireError
        try:
            meta = decode_meta(raw)
        except SamphireError as error:
            ending = error
        else:
            if status_of(meta) not in TERMINAL:
                return
            ending = await result_of(task_id, meta, self._blob)
            if isinstance(ending, BrokerUnavailableError):
                raise ending
        self._finish(task_id, ending)

    def _finish(self, task_id: str, ending: InferResult | SamphireError) -> None:
        future = self._futures.pop(task_id, None)
        self._foreign.discard(task_id)
        if future is None or future.done():
            return
        if isinstance(ending, SamphireError):
            future.set_exception(ending)
            future.exception()  # read by whoever awaits it; nobody may, and that is no leak
        else:
            future.set_result(ending)

    async def _blob(self, key: str, size: int) -> bytes | None:
        return await read_blob(self._reads, self._keys.own(key), size)


def _numbers(entry_id: bytes) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split(b"-")))
