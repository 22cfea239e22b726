"""The lane's way: claim, route, check, batch, start, dispatch, settle.

    claim loop -> read -> (route | dead letter) -> per model: check -> micro-batches
               -> per batch: load -> start -> Triton -> split -> settle loop

Everything runs on one event loop. Every background task belongs to one TaskGroup, so none can end
unnoticed: an error in any of them ends the lane, and whoever runs it starts a new one, which adopts what
the old one held. At most `inflight_max` tasks and `inflight_max_bytes` bytes are held at any time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Literal, TypeVar

from samphire import keys
from samphire.contract import CanvasStart, ChordPart, InferResponse, Ref
from samphire.errors import (
    BrokerMemoryFullError,
    BrokerUnavailableError,
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    ModelFaultError,
    SamphireError,
    UnknownModelError,
    WorkerCrashError,
)
from samphire_broker.settings import Settings
from samphire_broker.store import CANCELLED, Claimed, LeaseLostError, Settlement, Store, WorkerInfo
from samphire_workers.lane import batching, outcome
from samphire_workers.lane.budget import ByteBudget
from samphire_workers.lane.canvas import Canvas
from samphire_workers.lane.catalogue import Catalogue
from samphire_workers.lane.events import TaskEvents
from samphire_workers.lane.outcome import PASSED_ON_BYTES, Steps, TimeLimitError, takes_claim_checks, with_steps
from samphire_workers.lane.pace import Pace
from samphire_workers.lane.planner import QueuePlanner
from samphire_workers.lane.request import Checker, Request, fetch, has_refs, home_of, load, read
from samphire_workers.lane.settler import Settler
from samphire_workers.lane.wake import QueueWatch
from samphire_workers.triton import Endpoints, Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

BATCHES_A_MODEL = 4
"""Micro-batches of one model under way at once. While that many are, its queue fills up, so the next
claim makes fuller batches: load itself sets the batch size, and no timer does."""

INTAKE_MODEL = ""
"""What `keys.parse_queue` calls the model of the intake."""

CLOCK_S = 0.1
"""Between two looks at the scheduled tasks and at what is to be cancelled."""

CATALOGUE_S = 10.0
"""The catalogue is published when it changes, and again after this long."""

IDLE_CHECK_S = 0.25
"""An idle lane that nothing woke looks into the queues again after this long: a plain producer's message of
another priority than the highest wakes nobody."""

DISCOVER_S = 1.0

LOOK_EVERYWHERE_S = 0.05
"""A lane that is woken for one queue again and again looks into all of them after this long."""

ADOPT_S = 5.0
"""A claim that the broker carried out after its caller had given up is found after this long."""

BROKER_RETRY_S = 0.25


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
        self._canvas = canvas
        self._settings = settings
        self._store = store
        self._endpoints = endpoints
        self._info = info
        self._events = events
        self._watch = watch
        self._planner = QueuePlanner(settings.queue_weights)
        self._planner.add([keys.INTAKE])
        self._catalogue = Catalogue(endpoints, settings.max_request_bytes)
        self._budget = ByteBudget(settings.inflight_max_bytes // 2)
        self._held: dict[str, tuple[str, int]] = {}
        """Model and bytes of what is between claim and settlement, by claim."""
        self._requests: dict[str, Request] = {}
        """The same, as far as it is read."""
        self._held_bytes = 0
        self._pace = Pace(settings.inflight_max)
        self._batches: Counter[str] = Counter()
        self._settler = Settler(store, self._let_go)
        self._more = False
        """The last claim may have left something in the queues it looked into."""
        self._held_up = False
        """The last claim left out what there was no room for."""
        self._looked_everywhere = 0.0
        self._stopping = False
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
                group.create_task(self._events.run()),
                group.create_task(self._keep_clock()),
                group.create_task(self._tell_clients()),
            ]
            await self._claim_loop()
            while self._work:
                await asyncio.wait(self._work)
            await self._settler.drain()
            for task in background:
                task.cancel()
            self._watch.close()

    def requests(self) -> list[Request]:
        """What this lane holds, claimed and not yet settled."""
        return list(self._requests.values())

    async def cancel(self, task_ids: Sequence[str]) -> dict[str, str]:
        """End tasks that have not started; see `Store.cancel`."""
        verdicts = await self._store.cancel(outcome.revoked_meta("", "revoked"), task_ids)
        for task_id, verdict in verdicts.items():
            if verdict == "cancelled":
                self._events.cancelled(task_id)
        return verdicts

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
            named = self._watch.clear()  # before looking, so that no wake-up is lost
            self._planner.add(named)  # a queue may be new
            if not self._endpoints.some_ready.is_set():
                await self._watch.wait(IDLE_CHECK_S)
                continue
            try:
                if adopt or time.monotonic() - adopted_at > ADOPT_S:
                    claimed = await self._store.adopt(set(self._held))
                    adopt, adopted_at, self._more = False, time.monotonic(), True
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

    async def _claim(self, named: set[str]) -> list[Claimed]:
        """Claim from the queues that a wake-up named, which is quicker, but every so often from all."""
        now = time.monotonic()
        if now - self._looked_everywhere > LOOK_EVERYWHERE_S:
            named = set()
        if not named:
            self._looked_everywhere = now
        busy = {model for model, batches in self._batches.items() if batches >= BATCHES_A_MODEL}
        room = min(self._settings.claim_max, self._settings.inflight_max - len(self._held))
        room_bytes = self._settings.inflight_max_bytes // 2 - self._held_bytes
        self._more = False
        held_up = bool(busy) or room <= 0 or room_bytes <= 0
        self._held_up = held_up or (bool(named) and self._held_up)  # of the queues not named it still holds
        plan = self._planner.plan(room, busy | self._catalogue.away, named)
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

    def _may_claim(self, queue: str) -> bool:
        model, _ = keys.parse_queue(queue)
        return model not in self._catalogue.away and self._batches[model] < BATCHES_A_MODEL

    async def _discover(self, group: asyncio.TaskGroup) -> None:
        """Find queues: the SDK names those it uses; a slow scan finds those of plain producers."""
        cursor = 0
        self._watch.add(keys.INTAKE, group, self._may_claim)
        while True:
            try:
                queues = await self._store.known_queues()
                cursor, found = await self._store.find_queues(cursor)
            except SamphireError as error:
                logger.warning("queues were not looked up: %s", error, extra={"action": "discovery_failed"})
                queues, found = set(), set()
            if self._planner.add(queues | found | self._catalogue.queues):
                self._watch.wake()
            for queue in self._planner.queues:
                self._watch.add(queue, group, self._may_claim)
            await asyncio.sleep(DISCOVER_S)

    async def _keep_clock(self) -> None:
        """Return scheduled tasks when they are due, and do what clients ask for beside the queues, for ever."""
        while True:
            done = 0
            try:
                done += await self._store.return_due()
                done += len(await self.cancel(()))
                done += await self._store.delete_results()
            except SamphireError as error:
                logger.warning("the clock stands: %s", error, extra={"action": "clock_failed"})
            if not done:
                await asyncio.sleep(CLOCK_S)

    async def _tell_clients(self) -> None:
        """Publish what the models take, so that clients can refuse what does not fit, for ever."""
        published: dict[str, bytes] = {}
        told_at = 0.0
        while True:
            signatures = self._catalogue.signatures()
            if signatures != published or time.monotonic() - told_at > CATALOGUE_S:
                try:
                    await self._store.publish_catalogue(signatures, published.keys() - signatures.keys())
                    published, told_at = signatures, time.monotonic()
                except SamphireError as error:
                    logger.warning("the catalogue was not published: %s", error, extra={"action": "catalogue_failed"})
            await asyncio.sleep(IDLE_CHECK_S)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._group.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _hold(self, claim: Claimed) -> None:
        model, _ = home_of(claim.list_key)
        self._held[claim.field] = (model, len(claim.message))
        self._held_bytes += len(claim.message)
        self._pace.claimed(model)

    def _let_go(self, fields: Sequence[str]) -> None:
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
        at_home: defaultdict[str, list[Request]] = defaultdict(list)
        elsewhere: list[Request] = []
        later: list[Request] = []
        now = time.time()
        for claim in claimed:
            request, error = self._read(claim)
            self._requests[claim.field] = request
            if error is not None:
                self._fail(request, error)
            elif request.times.expires <= now:
                self._revoke(request, "expired")
            elif request.times.eta > now:
                later.append(request)
            elif request.errand is not None:
                self._spawn(self._run_errand(request, request.errand))
            elif not request.at_home:
                elsewhere.append(request)
            else:
                at_home[request.model].append(request)
        if later:
            self._spawn(self._schedule(later))
        if elsewhere:
            self._spawn(self._route(elsewhere))
        for model, requests in at_home.items():
            checker = self._catalogue.known(model)
            if checker is not None and all(self._fits(checker, request) for request in requests):
                self._dispatch(model, requests, checker)
            else:
                self._spawn(self._dispatch_checked(model, requests))

    def _fits(self, checker: Checker, request: Request) -> bool:
        try:
            checker.check(request)
        except Exception:  # noqa: BLE001 - it is checked again, with time to say what is wrong
            return False
        return True

    def _read(self, claim: Claimed) -> tuple[Request, SamphireError | None]:
        try:
            return read(claim, self._settings)
        except Exception as error:
            logger.exception("a message could not be read", extra={"action": "read_failed"})
            return Request(claim), InvalidInputError(f"the message cannot be read: {error!r}")

    async def _route(self, requests: Sequence[Request]) -> None:
        moves = []
        for request in requests:
            queue, _ = keys.split_list(request.home_list)
            moves.append((request.claim.field, queue, request.home_list))
            self._planner.add([queue])
        await self._persist(lambda: self._store.route(moves))
        self._let_go([request.claim.field for request in requests])

    async def _schedule(self, requests: Sequence[Request]) -> None:
        tasks = [(request.claim.field, request.task_id, request.times.eta) for request in requests]
        verdicts = await self._persist(lambda: self._store.schedule(tasks))
        for request, verdict in zip(requests, verdicts, strict=True):
            if verdict == CANCELLED:
                self._revoke(request, "cancelled")
            else:
                self._let_go([request.claim.field])

    async def _run_errand(self, request: Request, errand: ChordPart | CanvasStart) -> None:
        done = Settlement(request.claim.field, "", "succeeded", "", "")  # it has no result of its own
        try:
            if isinstance(errand, ChordPart):
                await self._persist(lambda: self._canvas.return_part(errand))
                self._watch.wake()  # the chord's body may have been sent, in Celery's way
            else:
                steps = await self._persist(lambda: self._canvas.start(request.task_id, errand))
                done = with_steps(done, steps)
        except SamphireError as error:
            self._fail(request, error)
        else:
            self._settler.add(done)

    async def _release(self, requests: Sequence[Request]) -> None:
        fields = [request.claim.field for request in requests]
        for request in requests:
            self._events.dropped(request)
        await self._persist(lambda: self._store.release(fields))
        self._let_go(fields)

    async def _persist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call of the store, one that may be repeated, until the broker has answered."""
        while True:
            try:
                return await action()
            except (BrokerUnavailableError, BrokerMemoryFullError) as error:
                logger.warning("the broker is away: %s", error, extra={"action": "broker_away"})
                await asyncio.sleep(BROKER_RETRY_S)

    async def _dispatch_checked(self, model: str, requests: list[Request]) -> None:
        """Dispatch what fits the model as it is now, and fail what does not."""
        try:
            checker = await self._catalogue.checker(model)
        except EndpointUnavailableError as error:
            logger.warning("model %s is away: %s", model, error, extra={"action": "model_away"})
            await self._release(requests)
            return
        except SamphireError as error:
            for request in requests:
                self._fail(request, error)
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
                self._fail(request, _our_error(error))
            else:
                valid.append(request)
        self._dispatch(model, valid, checker)

    def _dispatch(self, model: str, requests: Sequence[Request], checker: Checker) -> None:
        for batch in batching.group(requests, checker.signature):
            self._batches[model] += 1
            self._spawn(self._run_batch(model, batch))

    # -- from micro-batch to settlement -------------------------------------------------------------

    async def _run_batch(self, model: str, batch: list[Request]) -> None:
        began = time.monotonic()
        nbytes = sum(request.nbytes for request in batch)
        try:
            async with self._budget.hold(nbytes):
                loaded = await self._load(batch)
                if self._store.suspects:
                    await self._infer(model, await self._start(loaded))
                elif loaded:
                    await self._start_and_infer(model, loaded)
        finally:
            self._batches[model] -= 1
            self._pace.took(model, time.monotonic() - began)
            self._room_again()

    async def _start_and_infer(self, model: str, batch: list[Request]) -> None:
        """Ask the model while the start is written: no task here was ever started by a lost worker."""
        now = time.time()
        for request in batch:
            request.started_at = now
        starting = asyncio.create_task(self._start(batch))
        try:
            answers = await self._ask(model, batch)
        except SamphireError as error:
            await self._ended_badly(model, await starting, error)
            return
        started = {request.claim.field for request in await starting}
        await self._succeed(
            [
                (request, outputs)
                for request, outputs in zip(batch, answers, strict=True)
                if request.claim.field in started
            ]
        )

    async def _load(self, batch: Sequence[Request]) -> list[Request]:
        loaded: list[Request] = []
        for request in batch:
            try:
                fetched: dict[str, bytes] = {}
                if has_refs(request):
                    fetched = await self._persist(lambda r=request: fetch(r, self._store))  # type: ignore[misc]
                load(request, fetched)
            except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
                self._fail(request, _our_error(error))
            else:
                loaded.append(request)
        return loaded

    async def _start(self, batch: Sequence[Request]) -> list[Request]:
        if not batch:
            return []
        marks = [(request.claim.field, request.task_id) for request in batch]
        verdicts = await self._persist(lambda: self._store.start(marks, self._info))
        started: list[Request] = []
        dropped: list[str] = []
        for request, verdict in zip(batch, verdicts, strict=True):
            if verdict == CANCELLED:
                self._revoke(request, "cancelled")
                continue
            if verdict < 0:
                # Not ours any more, or a duplicate of a task that has ended: there is nothing to write.
                logger.info("task %s dropped (%d)", request.task_id, verdict, extra={"action": "dropped"})
                dropped.append(request.claim.field)
                self._events.dropped(request)
                continue
            request.attempts = verdict
            if verdict >= self._settings.max_attempts:
                self._fail(request, WorkerCrashError(f"{verdict} workers were lost with this task started"))
                continue
            request.started_at = request.started_at or time.time()
            self._events.started(request)
            started.append(request)
        self._let_go(dropped)
        return started

    async def _infer(self, model: str, batch: list[Request]) -> None:
        suspects = [request for request in batch if request.attempts]
        if suspects and len(batch) > 1:
            # A worker was lost with them: they run alone, so their neighbours are safe.
            calm = [request for request in batch if not request.attempts]
            for part in ([calm] if calm else []) + [[suspect] for suspect in suspects]:
                await self._infer(model, part)
            return
        if not batch:
            return
        try:
            answers = await self._ask(model, batch)
        except SamphireError as error:
            await self._ended_badly(model, batch, error)
        else:
            await self._succeed(list(zip(batch, answers, strict=True)))

    async def _ended_badly(self, model: str, batch: list[Request], error: SamphireError) -> None:
        if isinstance(error, EndpointUnavailableError):
            self._catalogue.forget(model)
            logger.warning("model %s is away: %s", model, error, extra={"action": "model_away"})
            await self._release(batch)
        elif len(batch) == 1 or isinstance(error, EndpointTimeoutError):
            for request in batch:  # a time-out is nobody's content, and asking again piles up
                self._fail(request, error)
        else:  # somebody's content: find out whose
            middle = len(batch) // 2
            await self._infer(model, batch[:middle])
            await self._infer(model, batch[middle:])

    async def _ask(self, model: str, batch: list[Request]) -> list[list[Tensor]]:
        infer = batch[0].request
        parameters = {name: value for name, value in infer.parameters.items() if name != "micro_batch"}
        timeout_s = self._timeout_s(batch)
        endpoint = self._endpoints.pick()
        try:
            outputs = await endpoint.infer(
                model,
                batch[0].version,
                batching.merge(batch),
                [output.name for output in infer.outputs],
                parameters,
                timeout_s,
            )
        except EndpointTimeoutError as error:
            raise self._time_error(batch[0], timeout_s, error) from error
        except EndpointUnavailableError:
            if not await endpoint.is_ready():
                self._endpoints.mark_away(endpoint)
            raise
        except UnknownModelError as error:
            # It was known a moment ago: unloaded, or retired, under way.
            raise EndpointUnavailableError(str(error)) from error
        except SamphireError:
            raise
        except Exception as error:
            logger.exception("a micro-batch failed", extra={"action": "batch_failed"})
            raise ModelFaultError(f"the request could not be sent: {error!r}") from error
        return batching.split(batch, outputs)

    def _timeout_s(self, batch: Sequence[Request]) -> float:
        """How long Triton may take: as long as the member that can wait longest."""
        times = batch[0].times  # the limits are those of all members
        deadline_s = max(request.times.deadline for request in batch) - time.time()
        return max(0.001, min(self._settings.triton_timeout_s, times.limit, times.soft_limit, deadline_s))

    @staticmethod
    def _time_error(request: Request, timeout_s: float, error: EndpointTimeoutError) -> EndpointTimeoutError:
        times = request.times
        if timeout_s == times.soft_limit:
            return TimeLimitError(times.soft_limit, soft=True)
        if timeout_s == times.limit:
            return TimeLimitError(times.limit, soft=False)
        if times.deadline <= time.time():
            return EndpointTimeoutError(f"the deadline has passed while the model worked: {error}")
        return error

    async def _succeed(self, answered: Sequence[tuple[Request, list[Tensor]]]) -> None:
        done = outcome.now_text()
        for request, outputs in answered:
            try:
                refs = await self._claim_checks(request, outputs)
                answer = outcome.response(request, outputs, refs)
                settlement = outcome.success(request, answer, done)
                passed_on = answer if request.canvas is None else await self._passed_on(request, outputs, answer)
            except Exception as error:  # noqa: BLE001 - an answer that cannot be written is this task's alone
                self._fail(request, ModelFaultError(f"the answer cannot be read: {_our_error(error)}"))
                continue
            request.tensors = []
            if request.canvas is None:
                self._settler.add(settlement)
                self._events.succeeded(request)
            else:
                self._spawn(self._succeed_with_steps(request, settlement, passed_on))

    async def _claim_checks(self, request: Request, outputs: Sequence[Tensor]) -> dict[str, Ref]:
        above = self._settings.inline_output_bytes
        if not takes_claim_checks(request) or all(len(tensor.data) <= above for tensor in outputs):
            return {}
        return await self._persist(lambda: outcome.store_large(request, outputs, self._store, above))

    async def _passed_on(self, request: Request, outputs: Sequence[Tensor], answer: InferResponse) -> InferResponse:
        """The answer as the next steps get it: what is large as a claim check, so that messages stay small."""
        if takes_claim_checks(request) or all(len(tensor.data) <= PASSED_ON_BYTES for tensor in outputs):
            return answer
        refs = await self._persist(lambda: outcome.store_large(request, outputs, self._store, PASSED_ON_BYTES))
        return outcome.response(request, outputs, refs)

    async def _succeed_with_steps(self, request: Request, settlement: Settlement, answer: InferResponse) -> None:
        try:
            steps = await self._persist(lambda: self._canvas.after_success(request, answer))
        except SamphireError as error:
            self._fail(request, error)
        else:
            self._settler.add(with_steps(settlement, steps))
            self._events.succeeded(request)

    def _fail(self, request: Request, error: SamphireError) -> None:
        logger.info("task %s failed: %s", request.task_id or "(unreadable)", error, extra={"action": "task_failed"})
        settlement = outcome.failure(request, error)
        if request.canvas is None:
            self._settler.add(settlement)
        else:
            self._spawn(self._end_with_steps(settlement, lambda: self._canvas.after_failure(request, error)))
        try:
            self._events.failed(request, error)
        except Exception:
            logger.exception("no event for task %s", request.task_id, extra={"action": "event_failed"})

    def _revoke(self, request: Request, state: Literal["cancelled", "expired"]) -> None:
        settlement = outcome.revoked(request, state)
        if request.canvas is None:
            self._settler.add(settlement)
        else:
            self._spawn(self._end_with_steps(settlement, lambda: self._canvas.after_revocation(request, state)))
        self._events.revoked(request, expired=state == "expired")

    async def _end_with_steps(self, settlement: Settlement, find_steps: Callable[[], Awaitable[Steps]]) -> None:
        try:
            settlement = with_steps(settlement, await self._persist(find_steps))
        except SamphireError as error:  # it ends all the same
            logger.warning("task %s: %s", settlement.task_id, error, extra={"action": "no_steps"})
        self._settler.add(settlement)


def _our_error(error: Exception) -> SamphireError:
    """The error as one of ours: what a message made our code stumble over is that message's fault."""
    if isinstance(error, SamphireError):
        return error
    logger.error("unexpected error", exc_info=error, extra={"action": "unexpected"})
    return InvalidInputError(f"the request cannot be processed: {type(error).__name__}: {str(error)[:500]}")
