"""The lane's way: claim, sort out, check, batch; then dispatch and settle.

    claim loop -> Sorter: read -> (route | schedule | expire | errand | dead letter)
                          per model: check -> micro-batches
               -> Dispatcher, per batch: load -> start -> Triton -> split -> Endings -> settle loop

Everything runs on one event loop. Every background task belongs to one TaskGroup, so none can end
unnoticed: an error in any of them ends the lane, and whoever runs it starts a new one, which adopts what
the old one held. At most `inflight_max` tasks and `inflight_max_bytes` bytes are held at any time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from samphire.errors import BrokerRightError, BrokerUnavailableError, SamphireError
from samphire.wire import keys
from samphire.wire.envelope import describe
from samphire_broker.settings import Settings
from samphire_broker.store import (
    WAS_CANCELLED,
    Claimed,
    LeaseLostError,
    Settlement,
    Store,
    WorkerInfo,
)
from samphire_workers.claiming.discovery import INTAKE_MODEL, QueueDiscovery
from samphire_workers.claiming.limits import AdaptiveLimits
from samphire_workers.claiming.round_robin import RoundRobin
from samphire_workers.claiming.search import cancel_everywhere, requests_for
from samphire_workers.claiming.sorting import Sorter, read_or_error
from samphire_workers.claiming.wake import QueueWatch
from samphire_workers.inference.dispatcher import Dispatcher
from samphire_workers.inference.sequences import Sequences
from samphire_workers.intake.request import Request, home_of
from samphire_workers.ledger import Ledger
from samphire_workers.monitoring.celery_events import TaskEvents
from samphire_workers.repeat import RIGHT_RETRY_S, persist
from samphire_workers.settlement import outcome
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.settlement.endings import Endings
from samphire_workers.settlement.settler import Settler
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.triton.served import ServedModels
from samphire_workers.unexpected import ShortageError
from samphire_workers.upkeep.periodic import keep_clock, keep_time, tell_clients, watch_letters

logger = logging.getLogger(__name__)

BATCHES_A_MODEL = 4
"""Micro-batches of one model under way at once. While that many are, its queue fills up, so the next
claim makes fuller batches: load itself sets the batch size, and no timer does."""

IDLE_CHECK_S = 0.25
"""An idle lane that nothing woke looks into the queues again after this long: a plain producer's message of
another priority than the highest wakes nobody."""

LOOK_EVERYWHERE_S = 0.05
"""A lane that is woken for one queue again and again looks into all of them after this long."""

ADOPT_S = 5.0
"""A claim that the broker carried out after its caller had given up is found after this long."""

BROKER_RETRY_S = 0.25

SHORTAGE_REST_S = 1.0
RESTS_MAX = 8
"""Rests in a row without a task that was done in between: then the worker is of no use."""


class Scheduled(NamedTuple):
    """A task that waits for its time."""

    task_id: str
    due_s: float
    """Its time, in s since 1970."""
    list_key: str
    name: str
    described: str


class Lane:
    """One worker's lane over one broker and its endpoints. Run it once."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endpoints: Endpoints,
        info: WorkerInfo,
        events: TaskEvents,
        watch: QueueWatch,
        canvas: Canvas,
    ) -> None:
        self._settings = settings
        self._store = store
        self._endpoints = endpoints
        self._events = events
        self._watch = watch
        self._round_robin = RoundRobin(settings.queue_weights)
        self._served = ServedModels(endpoints, settings)
        self._limits = AdaptiveLimits(settings.inflight_max)
        self._held = Ledger(self._limits)
        self._settler = Settler(store, self._let_go, self._not_settled)
        self._endings = Endings(
            settings, store, self._settler, canvas, events, self._spawn, self._release, info.hostname
        )
        self._dispatcher = Dispatcher(
            settings,
            store,
            endpoints,
            self._served,
            self._endings,
            info,
            events,
            self._limits,
            release=self._release,
            let_go=self._let_go,
            room_again=self._room_again,
        )
        self._sequences = Sequences(
            store,
            self._served,
            endpoints,
            self._endings,
            ask=self._run_batch,
            release=self._release,
            spawn=self._spawn,
        )
        self._queues = QueueDiscovery(
            store, endpoints, self._served, self._round_robin, watch, in_background=self._until_stopped
        )
        self._sorter = Sorter(
            settings,
            store,
            self._served,
            self._queues,
            self._held,
            self._endings,
            self._sequences,
            dispatch=self._run_batch,
            release=self._release,
            hand_back=self._hand_back,
            let_go=self._let_go,
            spawn=self._spawn,
            wake=watch.wake,
        )
        self._background: set[asyncio.Task[None]] = set()
        """What ends with the lane."""
        self._more = False
        """The last claim may have left something in the queues it looked into."""
        self._held_up = False
        """The last claim left out what there was no room for."""
        self._looked_everywhere = 0.0
        self._shortages = 0
        """As of the last round."""
        self._rests = 0
        self._stopping = False
        self._hostname = info.hostname
        self._work: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Move tasks until `stop`; then finish what is held and return.

        Raises:
            ExceptionGroup: a background task failed; whatever was held is still in the in-flight hash.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            background = [
                group.create_task(self._endpoints.watch()),
                group.create_task(self._served.watch(self._watch.wake)),
                group.create_task(self._settler.run()),
                group.create_task(self._queues.discover(group, self._may_claim)),
                group.create_task(self._queues.look()),
                group.create_task(self._watch.listen()),
                group.create_task(self._sequences.lead(self._watch.wake, self._held.some_of)),
                group.create_task(self._events.run()),
                group.create_task(keep_clock(self._store, self.cancel)),
                group.create_task(keep_time(self._store.clock)),
                group.create_task(watch_letters(self._store, self._settings)),
                group.create_task(tell_clients(self._store, self._served.signatures)),
            ]
            await self._claim_loop()
            await self._settler.drain()
            while self._work:
                await asyncio.wait(self._work)
                await self._settler.drain()  # what it refuses is work again
            for task in [*background, *self._background]:
                task.cancel()
            self._watch.close()

    def requests(self) -> list[Request]:
        """What this lane holds, claimed and not yet settled."""
        return self._held.requests()

    def queues(self) -> list[str]:
        """The queues that this lane claims from."""
        return self._round_robin.queues

    def send_events(self, wanted: bool) -> None:
        """Send task events to monitors, or none."""
        self._events.enabled = wanted

    async def scheduled(self, most: int) -> list[Scheduled]:
        """Tasks that wait for their time, of all workers, the earliest first."""
        found = []
        for task_id, due_s, list_key, message in await self._store.scheduled(most):
            request, _ = read_or_error(Claimed(f"0:{list_key}", len(message), message), self._settings)
            described = describe(request.infer) if request.infer is not None else ""
            name = request.envelope.headers.task if request.envelope is not None else ""
            found.append(Scheduled(task_id, due_s, list_key, name, described))
        return found

    async def cancel(self, task_ids: Sequence[str]) -> dict[str, str]:
        """End tasks, those that clients ask for among them; see `Store.cancel`."""
        verdicts = await self._store.cancel(outcome.revoked_meta("", "revoked"), task_ids)
        for task_id, verdict in verdicts.items():
            if verdict == "cancelled":
                self._events.cancelled(task_id)
        running = {task_id for task_id, verdict in verdicts.items() if verdict == "running"}
        if running:
            self._dispatcher.cancel([request for request in self.requests() if request.task_id in running])
        if again := requests_for(verdicts):
            self._spawn(self._cancel_again(again))
        return verdicts

    async def _cancel_again(self, requests: Sequence[str]) -> None:
        meta = outcome.revoked_meta("", "revoked")
        try:
            verdicts = await persist(lambda: cancel_everywhere(self._store, requests, meta, self._round_robin.queues))
        except SamphireError as error:  # a client that has no answer asks again
            logger.warning("%d tasks were not looked for: %s", len(requests), error, extra={"action": "seek_failed"})
            return
        for task_id, verdict in verdicts.items():
            if verdict == "cancelled":
                self._events.cancelled(task_id)

    def hand_back(self) -> None:
        """Claim nothing more, and give what is held back to the queues instead of finishing it."""
        self.stop()
        self._dispatcher.hand_back()

    def stop(self) -> None:
        """Claim nothing more; `run` returns once everything held is settled."""
        self._stopping = True
        self._watch.wake()

    # -- claiming -----------------------------------------------------------------------------------

    async def _claim_loop(self) -> None:
        adopt = True  # an earlier lane of this worker may have left claims
        adopted_at = 0.0
        short_rounds = 0
        while not self._stopping:
            heard, named = self._watch.clear()  # before looking, so that no wake-up is lost
            self._queues.serve(heard)  # a queue may be new
            await self._rest_if_short()
            try:
                if not self._store.clock.is_known:
                    await self._store.clock.look()
                # Also while no endpoint is ready: what a lost reply has left here belongs back into its queue.
                if adopt or time.monotonic() - adopted_at > ADOPT_S:
                    claimed = await self._store.adopt(self._held.fields())
                    adopt, adopted_at, self._more = False, time.monotonic(), True
                elif not self._endpoints.some_ready.is_set():
                    await self._watch.wait(IDLE_CHECK_S)
                    continue
                else:
                    claimed = await self._claim(named)
            except (BrokerUnavailableError, LeaseLostError) as error:
                # The reply of a claim may be lost: what it moved is found in the in-flight hash.
                adopt = True
                logger.warning("claim failed: %s", error, extra={"action": "claim_failed"})
                await asyncio.sleep(BROKER_RETRY_S)
                continue
            except BrokerRightError as error:  # a script has written nothing then
                logger.error("nothing is claimed: %s", error, extra={"action": "right_missing"})
                await asyncio.sleep(RIGHT_RETRY_S)
                continue
            for claim in claimed:
                self._held.add(claim)
            await self._sorter.take_in(claimed)
            if self._more:
                short_rounds = 0
                await asyncio.sleep(0)  # let what was claimed get under way before more is claimed
                continue
            short_rounds += 1
            if short_rounds >= self._round_robin.rounds:
                short_rounds = 0
                await self._watch.wait(IDLE_CHECK_S)

    async def _rest_if_short(self) -> None:
        """Claim nothing for a while where this worker is short of something; where that does not end, end instead."""
        shortages = self._endings.shortages
        if shortages > self._shortages:
            self._rests += 1
            if self._rests > RESTS_MAX:
                raise ShortageError(f"{shortages} tasks in a row could not be done")
            await asyncio.sleep(SHORTAGE_REST_S)
        elif not shortages:
            self._rests = 0
        self._shortages = shortages

    async def _claim(self, named: set[str]) -> list[Claimed]:
        """Claim from the queues that a wake-up named, which is quicker, but every so often from all."""
        now = time.monotonic()
        if now - self._looked_everywhere > LOOK_EVERYWHERE_S:
            named = set()
        if not named:
            self._looked_everywhere = now
        busy = {model for model, batches in self._dispatcher.under_way.items() if batches >= BATCHES_A_MODEL}
        room = min(self._settings.claim_max, self._settings.inflight_max - len(self._held))
        room_bytes = self._settings.inflight_max_bytes // 2 - self._held.nbytes
        self._more = False
        held_up = bool(busy) or room <= 0 or room_bytes <= 0
        self._held_up = held_up or (bool(named) and self._held_up)  # of the queues not named it still holds
        skipped = busy | self._endpoints.away() | self._queues.unseen | self._sequences.not_led()
        plan = self._round_robin.plan(room, skipped, named)
        if room <= 0 or room_bytes <= 0 or not plan.turns:
            return []
        rooms = [room if model == INTAKE_MODEL else self._limits.room(model) for model in plan.models]
        claimed = await self._store.claim(plan.turns, rooms, room, room_bytes)
        # Fewer than there was room for: the queues that were looked into are empty now, or have had their part.
        self._more = len(claimed) == room or self._store.cut_short
        self._queues.serve({keys.split_list(claim.list_key)[0] for claim in claimed})
        given = Counter(home_of(claim.list_key)[0] for claim in claimed)
        full = any(given[model] >= part for model, part in zip(plan.models, rooms, strict=True))
        self._held_up |= full or sum(len(claim.message) for claim in claimed) >= room_bytes
        return claimed

    def _may_claim(self, queue: str) -> bool:
        model, _ = keys.parse_queue(queue)
        if model in self._queues.unseen or model in self._sequences.not_led():
            return False
        return not self._endpoints.is_away(model) and self._dispatcher.under_way[model] < BATCHES_A_MODEL

    def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _not_settled(self, settlement: Settlement, verdict: int) -> None:
        request = self._held.request(settlement.field)
        if request is None:  # it was settled otherwise meanwhile
            self._let_go([settlement.field])
        elif verdict == WAS_CANCELLED:
            self._endings.revoke(request, "cancelled")
        else:
            self._endings.not_pushed(request, settlement)

    def _let_go(self, fields: Sequence[str]) -> None:
        self._dispatcher.written(fields)
        self._held.let_go(fields)
        self._room_again()

    def _room_again(self) -> None:
        if self._held_up:
            self._watch.wake()

    async def _release(
        self, requests: Sequence[Request], *, blamed: SamphireError | None = None, endpoint_died: bool = False
    ) -> None:
        attempt = "" if blamed is None else outcome.attempt_text(self._hostname, blamed)
        if len(requests) == 1 and requests[0].infer is not None and requests[0].sequence_id is not None:
            together = [*requests, *self._sequences.went_back(requests[0])]
            requests = sorted(together, key=lambda request: keys.claim_number(request.claim.field))
        fields = [request.claim.field for request in requests]
        for request in requests:
            self._events.dropped(request)
        await self._hand_back(
            requests, lambda: self._store.release(fields, attempt=attempt, endpoint_died=endpoint_died)
        )

    async def _hand_back(self, requests: Sequence[Request], action: Callable[[], Awaitable[int]]) -> None:
        try:
            await persist(action)
        except SamphireError as error:  # the broker does not take them: they must not be stuck here
            for request in requests:
                self._sequences.refuse(request, error)
        else:
            self._queues.serve({keys.split_list(request.claim.list_key)[0] for request in requests})
            self._let_go([request.claim.field for request in requests])

    def _run_batch(self, model: str, batch: list[Request]) -> Coroutine[Any, Any, None]:
        self._dispatcher.under_way[model] += 1
        return self._dispatcher.run_batch(model, batch)
