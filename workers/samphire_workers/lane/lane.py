"""The lane's way: claim, sort out, check, batch; then dispatch and settle.

    claim loop -> read -> (route | schedule | expire | errand | dead letter) -> per model: check -> micro-batches
               -> Dispatcher, per batch: load -> start -> Triton -> split -> Endings -> settle loop

Everything runs on one event loop. Every background task belongs to one TaskGroup, so none can end
unnoticed: an error in any of them ends the lane, and whoever runs it starts a new one, which adopts what
the old one held. At most `inflight_max` tasks and `inflight_max_bytes` bytes are held at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

from samphire import keys
from samphire.contract import CanvasStart, ChordPart
from samphire.envelope import describe
from samphire.errors import (
    BrokerUnavailableError,
    EndpointUnavailableError,
    InvalidInputError,
    SamphireError,
    UnknownModelError,
)
from samphire_broker.settings import Settings
from samphire_broker.store import (
    CANCELLED,
    DUE,
    REPLACED,
    WAS_CANCELLED,
    Claimed,
    LeaseLostError,
    Settlement,
    Store,
    WorkerInfo,
)
from samphire_workers.endpoints import Endpoints
from samphire_workers.lane import batching, outcome
from samphire_workers.lane.canvas import Canvas
from samphire_workers.lane.catalogue import Catalogue
from samphire_workers.lane.checking import Checker
from samphire_workers.lane.chores import keep_clock, keep_time, tell_clients, watch_letters
from samphire_workers.lane.dispatch import Dispatcher
from samphire_workers.lane.endings import Endings
from samphire_workers.lane.events import TaskEvents
from samphire_workers.lane.faults import ShortageError, our_error
from samphire_workers.lane.pace import Pace
from samphire_workers.lane.persist import persist
from samphire_workers.lane.planner import QueuePlanner
from samphire_workers.lane.request import Request, find_who_waits, home_of, read
from samphire_workers.lane.seek import cancel_everywhere, requests_for
from samphire_workers.lane.sequences import Sequences
from samphire_workers.lane.settler import Settler
from samphire_workers.lane.wake import QueueWatch

logger = logging.getLogger(__name__)

BATCHES_A_MODEL = 4
"""Micro-batches of one model under way at once. While that many are, its queue fills up, so the next
claim makes fuller batches: load itself sets the batch size, and no timer does."""

INTAKE_MODEL = ""
"""What `keys.parse_queue` calls the model of the intake."""

IDLE_CHECK_S = 0.25
"""An idle lane that nothing woke looks into the queues again after this long: a plain producer's message of
another priority than the highest wakes nobody."""

DISCOVER_S = 1.0
SCANS_A_LOOK = 20
"""Steps of a thousand keys: a plain producer's queue for a tenant is found although there are many results."""

LOOK_EVERYWHERE_S = 0.05
"""A lane that is woken for one queue again and again looks into all of them after this long."""

ADOPT_S = 5.0
"""A claim that the broker carried out after its caller had given up is found after this long."""

BROKER_RETRY_S = 0.25

LOOKUPS_AT_ONCE = 8

SHORTAGE_REST_S = 1.0
SHORTAGES_MAX = 50
"""Tasks in a row that went back to their queues because the worker is short of something: then it is of no use."""


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
        self._planner = QueuePlanner(settings.queue_weights)
        self._planner.add([keys.INTAKE])
        self._catalogue = Catalogue(endpoints, settings)
        self._held: dict[str, tuple[str, int]] = {}
        """Model and bytes of what is between claim and settlement, by claim."""
        self._requests: dict[str, Request] = {}
        """The same, as far as it is read."""
        self._held_bytes = 0
        self._pace = Pace(settings.inflight_max)
        self._settler = Settler(store, self._let_go, self._not_settled)
        self._endings = Endings(
            settings, store, self._settler, canvas, events, self._spawn, self._release, info.hostname
        )
        self._dispatcher = Dispatcher(
            settings,
            store,
            endpoints,
            self._catalogue,
            self._endings,
            info,
            events,
            self._pace,
            release=self._release,
            let_go=self._let_go,
            room_again=self._room_again,
        )
        self._sequences = Sequences(
            store,
            self._catalogue,
            endpoints,
            self._endings,
            ask=self._run_batch,
            release=self._release,
            spawn=self._spawn,
        )
        self._unseen: set[str] = set()
        """Models that nothing is claimed of before it is known what they are."""
        self._looking: set[asyncio.Task[None]] = set()
        self._in_order: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._more = False
        """The last claim may have left something in the queues it looked into."""
        self._held_up = False
        """The last claim left out what there was no room for."""
        self._looked_everywhere = 0.0
        self._shortages = 0
        """As of the last round."""
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
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
                group.create_task(self._catalogue.watch(self._watch.wake)),
                group.create_task(self._settler.run()),
                group.create_task(self._discover(group)),
                group.create_task(self._watch.listen()),
                group.create_task(self._sequences.lead(self._watch.wake, self._holds)),
                group.create_task(self._events.run()),
                group.create_task(keep_clock(self._store, self.cancel)),
                group.create_task(keep_time(self._store.clock)),
                group.create_task(watch_letters(self._store, self._settings)),
                group.create_task(tell_clients(self._store, self._catalogue.signatures)),
            ]
            await self._claim_loop()
            while self._work:
                await asyncio.wait(self._work)
            await self._settler.drain()
            for task in [*background, *self._looking]:
                task.cancel()
            self._watch.close()

    def requests(self) -> list[Request]:
        """What this lane holds, claimed and not yet settled."""
        return list(self._requests.values())

    def queues(self) -> list[str]:
        """The queues that this lane claims from."""
        return self._planner.queues

    def send_events(self, wanted: bool) -> None:
        """Send task events to monitors, or none."""
        self._events.enabled = wanted

    async def scheduled(self, most: int) -> list[Scheduled]:
        """Tasks that wait for their time, of all workers, the earliest first."""
        found = []
        for task_id, due_s, list_key, message in await self._store.scheduled(most):
            request, _ = self._read(Claimed(f"0:{list_key}", len(message), message))
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
        verdicts = await persist(lambda: cancel_everywhere(self._store, requests, meta, self._planner.queues))
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
            self._serve(heard)  # a queue may be new
            await self._rest_if_short()
            try:
                if not self._store.clock.is_known:
                    await self._store.clock.look()
                # Also while no endpoint is ready: what a lost reply has left here belongs back into its queue.
                if adopt or time.monotonic() - adopted_at > ADOPT_S:
                    claimed = await self._store.adopt(set(self._held))
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
            for claim in claimed:
                self._hold(claim)
            self._take_in(claimed)
            if self._more:
                short_rounds = 0
                await asyncio.sleep(0)  # let what was claimed get under way before more is claimed
                continue
            short_rounds += 1
            if short_rounds >= self._planner.rounds:
                short_rounds = 0
                await self._watch.wait(IDLE_CHECK_S)

    async def _rest_if_short(self) -> None:
        """Claim nothing for a while where this worker is short of something; where that does not end, end instead."""
        shortages = self._endings.shortages
        if shortages > self._shortages:
            if shortages >= SHORTAGES_MAX:
                raise ShortageError(f"{shortages} tasks in a row could not be done")
            await asyncio.sleep(SHORTAGE_REST_S)
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
        room_bytes = self._settings.inflight_max_bytes // 2 - self._held_bytes
        self._more = False
        held_up = bool(busy) or room <= 0 or room_bytes <= 0
        self._held_up = held_up or (bool(named) and self._held_up)  # of the queues not named it still holds
        skipped = busy | self._endpoints.away() | self._unseen | self._sequences.not_led()
        plan = self._planner.plan(room, skipped, named)
        if room <= 0 or room_bytes <= 0 or not plan.turns:
            return []
        rooms = [room if model == INTAKE_MODEL else self._pace.room(model) for model in plan.models]
        claimed = await self._store.claim(plan.turns, rooms, room, room_bytes)
        # Fewer than there was room for: the queues that were looked into are empty now, or have had their part.
        self._more = len(claimed) == room
        given = Counter(home_of(claim.list_key)[0] for claim in claimed)
        full = any(given[model] >= part for model, part in zip(plan.models, rooms, strict=True))
        self._held_up |= full or sum(len(claim.message) for claim in claimed) >= room_bytes
        return claimed

    def _serve(self, queues: Collection[str]) -> list[str]:
        """Claim from these queues too, once it is known what their models are; returns those that are new."""
        new = self._planner.add(queues)
        if new:
            self._look_at_models(keys.parse_queue(queue)[0] for queue in new)
        return new

    def _look_at_models(self, models: Iterable[str]) -> None:
        """Find out what models are before anything is claimed of them: of some the order of requests must be kept."""
        new = {model for model in models if model != INTAKE_MODEL and self._catalogue.known(model) is None}
        for model in new - self._unseen:
            self._unseen.add(model)
            task = self._group.create_task(self._look_at(model))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def _look_at(self, model: str) -> None:
        async with self._lookups:
            await self._endpoints.some_ready.wait()
            with contextlib.suppress(SamphireError):  # away, or unknown: that is found out again when it is claimed
                await self._catalogue.checker(model)
        self._unseen.discard(model)
        self._watch.wake()

    def _holds(self, model: str) -> bool:
        return any(held == model for held, _ in self._held.values())

    def _may_claim(self, queue: str) -> bool:
        model, _ = keys.parse_queue(queue)
        if model in self._unseen or model in self._sequences.not_led():
            return False
        return not self._endpoints.is_away(model) and self._dispatcher.under_way[model] < BATCHES_A_MODEL

    async def _discover(self, group: asyncio.TaskGroup) -> None:
        """Find queues: the SDK names those it uses; a slow scan finds those of plain producers."""
        cursor = 0
        self._watch.add(keys.INTAKE, group, self._may_claim)
        while True:
            try:
                queues = await self._store.known_queues()
                found: set[str] = set()
                for _ in range(SCANS_A_LOOK):
                    cursor, some = await self._store.find_queues(cursor)
                    found |= some
                    if not cursor:
                        break
            except SamphireError as error:
                logger.warning("queues were not looked up: %s", error, extra={"action": "discovery_failed"})
                queues, found = set(), set()
            try:
                if new := found - queues:
                    await self._store.name_queues(new)
            except SamphireError as error:
                logger.warning("queues were not noted: %s", error, extra={"action": "discovery_failed"})
            if self._serve(queues | found | self._catalogue.queues):
                self._watch.wake()
            for queue in self._planner.queues:
                self._watch.add(queue, group, self._may_claim)
            await asyncio.sleep(DISCOVER_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _hold(self, claim: Claimed) -> None:
        model, _ = home_of(claim.list_key)
        self._held[claim.field] = (model, len(claim.message))
        self._held_bytes += len(claim.message)
        self._pace.claimed(model)

    def _not_settled(self, settlement: Settlement, verdict: int) -> None:
        request = self._requests.get(settlement.field)
        if request is None:  # it was settled otherwise meanwhile
            self._let_go([settlement.field])
        elif verdict == WAS_CANCELLED:
            self._endings.revoke(request, "cancelled")
        else:
            self._endings.not_pushed(request, settlement)

    def _let_go(self, fields: Sequence[str]) -> None:
        self._dispatcher.written(fields)
        for field in fields:
            if field not in self._held:
                continue
            model, nbytes = self._held.pop(field)
            self._requests.pop(field, None)
            self._held_bytes -= nbytes
            self._pace.let_go(model)
        self._room_again()

    def _room_again(self) -> None:
        if self._held_up:
            self._watch.wake()

    # -- from message to micro-batch ----------------------------------------------------------------

    def _take_in(self, claimed: Sequence[Claimed]) -> None:
        requests: list[Request] = []
        for claim in claimed:
            request, error = self._read(claim)
            self._requests[claim.field] = request
            if error is not None:
                self._endings.fail(request, error)
            else:
                requests.append(request)
        self._sort_out(requests)

    def _sort_out(self, requests: Sequence[Request]) -> None:
        at_home: defaultdict[str, list[Request]] = defaultdict(list)
        elsewhere: list[Request] = []
        later: list[Request] = []
        now = self._store.clock.now()
        for request in requests:
            if request.times.expires <= now:
                self._endings.revoke(request, "expired")
                self._is_missing(request)
            elif request.times.eta > now:
                later.append(request)
            elif request.errand is not None:
                self._spawn(self._errand(request, request.errand))
            elif not request.at_home and request.sequence_id is not None:
                queue = keys.queue_name(request.model, request.request.tenant)
                self._endings.fail(
                    request,
                    InvalidInputError(
                        f"requests of a sequence keep their order only in their model's queue: send them to {queue}"
                    ),
                )
            elif not request.at_home:
                elsewhere.append(request)
            else:
                at_home[request.model].append(request)
        if later:
            self._spawn(self._schedule(later))
        if elsewhere:
            self._spawn(self._route(elsewhere))
        for model, fitting in at_home.items():
            checker = self._catalogue.known(model)
            in_order = checker is not None and checker.signature.sequence_batching
            if checker is not None and not in_order and all(self._fits(checker, request) for request in fitting):
                self._dispatch(model, fitting, checker)
            else:
                self._spawn(self._dispatch_checked(model, fitting))

    def _is_missing(self, request: Request) -> None:
        """A request has ended before it was asked: if it is of a sequence, those after it cannot be right."""
        request.over = True
        if request.errand is None and request.at_home and request.sequence_id is not None:
            self._sequences.add([request])

    def _fits(self, checker: Checker, request: Request) -> bool:
        try:
            checker.check(request)
        except Exception:  # noqa: BLE001 - it is checked again, with time to say what is wrong
            return False
        return True

    def _read(self, claim: Claimed) -> tuple[Request, SamphireError | None]:
        try:
            return read(claim, self._settings)
        except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
            request = Request(claim)
            find_who_waits(request, claim, self._settings)
            return request, our_error(error)

    async def _errand(self, request: Request, errand: ChordPart | CanvasStart) -> None:
        await self._endings.run_errand(request, errand)
        self._watch.wake()  # the body of a chord may have been sent, in Celery's way

    async def _route(self, requests: Sequence[Request]) -> None:
        moves = []
        for request in requests:
            queue, _ = keys.split_list(request.home_list)
            moves.append((request.claim.field, queue, request.home_list))
            self._serve([queue])
        await self._hand_back(requests, lambda: self._store.route(moves))

    async def _schedule(self, requests: Sequence[Request]) -> None:
        tasks = [(request.claim.field, request.task_id, request.times.eta) for request in requests]
        try:
            verdicts = await persist(lambda: self._store.schedule(tasks))
        except SamphireError as error:
            for request in requests:
                self._endings.fail(request, error)
            return
        due: list[Request] = []
        for request, verdict in zip(requests, verdicts, strict=True):
            if verdict == CANCELLED:
                self._endings.revoke(request, "cancelled")
            elif verdict == DUE:  # by the broker's clock, which is the one that counts
                request.times = request.times._replace(eta=0.0)
                due.append(request)
            else:
                if verdict == REPLACED:
                    logger.warning("task %s was scheduled twice", request.task_id, extra={"action": "replaced"})
                self._let_go([request.claim.field])
        self._sort_out(due)

    async def _release(
        self, requests: Sequence[Request], *, blamed: SamphireError | None = None, endpoint_died: bool = False
    ) -> None:
        attempt = "" if blamed is None else outcome.attempt_text(self._hostname, blamed)
        if len(requests) == 1 and requests[0].infer is not None and requests[0].sequence_id is not None:
            requests = [*requests, *self._sequences.went_back(requests[0])]
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
                self._endings.fail(request, error)
        else:
            self._let_go([request.claim.field for request in requests])

    async def _dispatch_checked(self, model: str, requests: list[Request]) -> None:
        """Dispatch what fits the model as it is now, and fail what does not, in the order of the claims."""
        async with self._in_order[model]:
            await self._dispatch_in_order(model, requests)

    async def _dispatch_in_order(self, model: str, requests: list[Request]) -> None:
        try:
            checker = await self._catalogue.checker(model)
        except EndpointUnavailableError as error:
            logger.warning("model %s is away: %s", model, error, extra={"action": "model_away"})
            await self._release(requests)
            return
        except SamphireError as error:
            for request in requests:
                self._endings.fail(request, error)
            return
        valid: list[Request] = []
        for request in requests:
            try:
                try:
                    checker.check(request)
                except UnknownModelError:  # a version that was loaded a moment ago
                    checker = await self._catalogue.checker(model, fresh=True)
                    checker.check(request)
            except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
                if checker.signature.sequence_batching and request.sequence_id is not None:
                    request.refusal = our_error(error)
                    valid.append(request)
                else:
                    self._endings.fail(request, our_error(error))
            else:
                valid.append(request)
        self._dispatch(model, valid, checker)

    def _dispatch(self, model: str, requests: Sequence[Request], checker: Checker) -> None:
        if checker.signature.sequence_batching:
            self._sequences.add(requests)
            return
        for batch in batching.group(requests, checker.signature):
            self._spawn(self._run_batch(model, batch))

    def _run_batch(self, model: str, batch: list[Request]) -> Coroutine[Any, Any, None]:
        self._dispatcher.under_way[model] += 1
        return self._dispatcher.run_batch(model, batch)
