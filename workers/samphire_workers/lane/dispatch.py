"""From micro-batch to answer: load, start, ask Triton; and what follows when it does not answer."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from samphire.errors import (
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    ModelFaultError,
    QueueFullError,
    SamphireError,
    TaskCancelledError,
    UnknownModelError,
    WorkerCrashError,
)
from samphire_broker.retry import policy_for
from samphire_broker.settings import Settings
from samphire_broker.store import CANCELLED, NOT_YET, Store, Tried, WorkerInfo
from samphire_workers.endpoints import Endpoints
from samphire_workers.lane import batching
from samphire_workers.lane.alone import LOOK_LEAST_S, LOOK_S
from samphire_workers.lane.answers import UnevenRowsError, check_answer
from samphire_workers.lane.budget import ByteBudget
from samphire_workers.lane.catalogue import Catalogue
from samphire_workers.lane.checking import MICRO_BATCH
from samphire_workers.lane.endings import Endings
from samphire_workers.lane.events import TaskEvents
from samphire_workers.lane.faults import ShortageError, our_error
from samphire_workers.lane.outcome import TimeLimitError
from samphire_workers.lane.pace import Pace
from samphire_workers.lane.persist import persist
from samphire_workers.lane.request import Request, fetch, has_refs, load
from samphire_workers.lane.suspects import LOSSES_MAX, Suspects, is_suspect
from samphire_workers.lane.turnstile import Turnstile
from samphire_workers.lane.unwritten import Unwritten
from samphire_workers.triton import Endpoint, Running, Tensor
from samphire_workers.triton_errors import EndpointDiedError, StubDiedError

logger = logging.getLogger(__name__)

BEYOND_RELOAD_S = 10.0
"""Between two tries of a model whose process has died, where the worker may not reload it."""
BUSY_S = 1.0
"""Longest rest of a model whose queue at Triton is full, where Triton does not say how long."""


def _continues_sequence(request: Request) -> bool:
    """Whether what a request asks depends on the model's state; such a one is never in company."""
    return request.sequence_id is not None and not request.request.parameters.get("sequence_start")


class Release(Protocol):
    """Hands requests back to their queues."""

    async def __call__(
        self, requests: Sequence[Request], *, blamed: SamphireError | None = None, endpoint_died: bool = False
    ) -> None:
        """With `blamed` it counts as an attempt of those that had started: one of them may have caused that."""


@dataclass(eq=False, slots=True)
class Asked:
    """A micro-batch that an endpoint works on."""

    batch: list[Request]
    running: Running = field(default_factory=Running)
    clock: asyncio.TimerHandle | None = None
    """Rings when the next of its members' deadlines passes."""

    def stop_if_over(self, why: SamphireError) -> None:
        """Cancel it at the endpoint once nobody waits for it."""
        if all(request.over for request in self.batch):
            self.running.stop(why)


class Dispatcher:
    """Runs micro-batches on the endpoints, and ends their tasks."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endpoints: Endpoints,
        catalogue: Catalogue,
        endings: Endings,
        info: WorkerInfo,
        events: TaskEvents,
        pace: Pace,
        *,
        release: Release,
        let_go: Callable[[Sequence[str]], None],
        room_again: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._endpoints = endpoints
        self._catalogue = catalogue
        self._endings = endings
        self._info = info
        self._events = events
        self._pace = pace
        self._release = release
        self._let_go = let_go
        self._room_again = room_again
        self._budget = ByteBudget(settings.inflight_max_bytes // 2)
        self._turnstiles: defaultdict[str, Turnstile] = defaultdict(Turnstile)
        self._all_models = Turnstile()
        self._unwritten = Unwritten()
        self._suspects = Suspects(
            store,
            self._all_models,
            self._turnstiles,
            self._unwritten,
            settings.triton_timeout_s,
            lambda: bool(self._ending),
        )
        self._beyond_reload: set[tuple[str, str]] = set()
        """Models, by endpoint, whose process has died and that may not be reloaded from here."""
        self._reloads: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._reloaded_at: dict[tuple[str, str], float] = {}
        self._asked: set[Asked] = set()
        self._ending: SamphireError | None = None
        self.under_way: Counter[str] = Counter()
        """Micro-batches under way, by model."""

    def cancel(self, requests: Iterable[Request]) -> None:
        """End tasks that are under way; Triton is told where it works for nobody else."""
        for request in requests:
            if not request.over:
                self._endings.cancel_running(request)
        for asked in list(self._asked):
            asked.stop_if_over(TaskCancelledError())

    def hand_back(self) -> None:
        """Give up what is under way, and ask for nothing more: it goes back to its queues as if it had not begun."""
        self._ending = EndpointUnavailableError("the worker is ending")
        for asked in list(self._asked):
            asked.running.stop(self._ending)

    def written(self, fields: Sequence[str]) -> None:
        """These claims are not held any more: their ends are written, or they are back in their queues."""
        self._unwritten.discard(fields)

    async def run_batch(self, model: str, batch: list[Request]) -> None:
        """Bring one micro-batch to its end; it was counted as under way by who made it."""
        began = time.monotonic()
        for request in batch:
            request.taken_in_at = began
        nbytes = sum(request.nbytes for request in batch)
        try:
            async with self._budget.hold(nbytes):
                loaded = await self._load(batch)
                if self._store.some_tried or not all(request.claim.is_first for request in loaded):
                    await self._run_carefully(model, loaded)
                else:
                    await self._run(model, loaded)
        finally:
            self.under_way[model] -= 1
            self._room_again()

    async def _run(self, model: str, batch: list[Request]) -> None:
        if self._store.some_cancelled:
            await self._start_then_infer(model, batch)
        elif batch:
            await self._start_and_infer(model, batch)

    async def _start_then_infer(self, model: str, batch: list[Request]) -> None:
        await self._infer(model, await self._start(batch))

    async def _start_and_infer(self, model: str, batch: list[Request]) -> None:
        """Ask the model while the start is written: no task here was ever tried before."""
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
        await self._endings.succeed(
            [
                (request, outputs)
                for request, outputs in zip(batch, answers, strict=True)
                if request.claim.field in started
            ]
        )

    async def _run_carefully(self, model: str, batch: list[Request]) -> None:
        """Run a micro-batch that may have members that were tried before, apart from the others.

        A suspect is alone with its model, and is not started until then: if a worker or a process goes down again, it
        is this one's doing, and nobody's budget suffers but its own. Where what went down is shared by all workers it
        is alone among all of them. What failed before runs by itself.
        """
        if not batch:
            return
        tried = await persist(lambda: self._store.tried([request.task_id for request in batch]))
        calm: list[Request] = []
        again: list[Request] = []
        async with asyncio.TaskGroup() as group:
            for request, before in zip(batch, tried, strict=True):
                most = policy_for(request.infer, self._settings).max_attempts
                if before.attempts >= most:
                    self._exhausted(request, before)
                elif before.losses >= LOSSES_MAX or is_suspect(before, most):
                    group.create_task(self._run_alone(model, request, before))
                elif before.attempts:
                    again.append(request)
                else:
                    calm.append(request)
            # Who is alone among workers waits for what was claimed before anything was tried: that waits for nobody.
            group.create_task(self._start_then_infer(model, [request for request in calm if request.claim.is_first]))
            group.create_task(self._start_then_infer(model, [r for r in calm if not r.claim.is_first]))
            await self._start_then_infer(model, again)

    async def _run_alone(self, model: str, request: Request, before: Tried) -> None:
        async def run() -> bool:
            self._give_up_late([request])
            if request.over:
                return True
            started = await self._try_start([request])
            if started is not None:
                await self._infer(model, started, alone=True)
            return started is not None

        all_models = before.losses >= LOSSES_MAX
        if not await self._suspects.run(
            model, run, all_models=all_models, among_workers=all_models or before.shared > 0
        ):
            await self._release([request])

    def _exhausted(self, request: Request, before: Tried) -> None:
        """Fail a task that has had all its attempts; this one is not made."""
        request.attempts, request.crashes, request.losses, _ = before
        request.started_at = None
        message = f"{request.crashes} of {request.attempts} attempts took a worker, the model or Triton down"
        self._endings.fail(request, WorkerCrashError(message))

    async def _load(self, batch: Sequence[Request]) -> list[Request]:
        loaded: list[Request] = []
        for request in batch:
            try:
                fetched: dict[str, bytes] = {}
                if has_refs(request):
                    fetched = await persist(lambda r=request: fetch(r, self._store))  # type: ignore[misc]
                load(request, fetched)
            except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
                self._endings.fail(request, our_error(error))
            else:
                loaded.append(request)
        return loaded

    async def _start(self, batch: Sequence[Request]) -> list[Request]:
        look_s = LOOK_S
        while (started := await self._try_start(batch)) is None:
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, LOOK_LEAST_S)
            self._give_up_late(batch)
            batch = [request for request in batch if not request.over]
            for request in batch:
                request.taken_in_at = time.monotonic()  # it is not the model that is slow
            if self._ending is not None:
                await self._release(batch)
                return []
        return started

    def _give_up_late(self, batch: Sequence[Request]) -> None:
        now = self._store.clock.now()
        for request in batch:
            if request.times.deadline <= now and not request.over:
                self._endings.give_up(request)

    async def _try_start(self, batch: Sequence[Request]) -> list[Request] | None:
        """Start what may be started; None: another worker is alone with the model."""
        if not batch:
            return []
        marks = [(request.claim.field, request.task_id) for request in batch]
        verdicts = await persist(lambda: self._store.start(marks, self._info))
        if NOT_YET in verdicts:
            return None
        started: list[Request] = []
        dropped: list[str] = []
        for request, verdict in zip(batch, verdicts, strict=True):
            if request.over:
                continue
            if verdict == CANCELLED:
                self._endings.revoke(request, "cancelled")
                continue
            if isinstance(verdict, Tried):
                request.attempts, request.crashes, request.losses, _ = verdict
                if request.attempts >= policy_for(request.infer, self._settings).max_attempts:
                    self._exhausted(request, verdict)
                    continue
            elif verdict < 0:
                # Not ours any more, or a duplicate of a task that has ended: there is nothing to write.
                logger.info("task %s dropped (%d)", request.task_id, verdict, extra={"action": "dropped"})
                dropped.append(request.claim.field)
                self._events.dropped(request)
                continue
            request.started_at = request.started_at or time.time()
            self._events.started(request)
            started.append(request)
        self._let_go(dropped)
        return started

    async def _infer(self, model: str, batch: list[Request], *, alone: bool = False) -> None:
        batch = [request for request in batch if not request.over]
        failed = [request for request in batch if request.attempts > request.crashes]
        if failed and len(batch) > 1:
            # Something was wrong with them before: each runs by itself, so their neighbours are safe.
            parts = [[request] for request in failed]
            parts.append([request for request in batch if request.attempts == request.crashes])
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(self._infer(model, part))
            return
        if not batch:
            return
        try:
            answers = await self._ask(model, batch, alone=alone)
        except SamphireError as error:
            await self._ended_badly(model, batch, error, alone=alone)
        else:
            await self._endings.succeed(list(zip(batch, answers, strict=True)))

    async def _ended_badly(
        self, model: str, batch: list[Request], error: SamphireError, *, alone: bool = False
    ) -> None:
        batch = [request for request in batch if not request.over]
        if not batch:
            return
        if isinstance(error, StubDiedError | EndpointDiedError) and _continues_sequence(batch[0]):
            self._endings.fail(batch[0], ModelFaultError(f"the state of its sequence is lost: {error}"))
        elif isinstance(error, StubDiedError):
            # One of them has taken the model's process down: they come back apart from the rest, with an attempt less.
            logger.error("model %s has lost its process: %s", model, error, extra={"action": "stub_died"})
            await self._release(batch, blamed=WorkerCrashError(f"the model's process died: {error}"))
        elif isinstance(error, EndpointDiedError):
            # That is an outage, and no attempt; but of one that is alone and was there whenever it happened.
            guilty = alone and batch[0].losses >= LOSSES_MAX
            blamed = WorkerCrashError(f"the endpoint died with this task alone: {error}") if guilty else None
            await self._release(batch, blamed=blamed, endpoint_died=True)
        elif isinstance(error, EndpointUnavailableError | QueueFullError):
            await self._release(batch)
        elif len(batch) == 1 or isinstance(error, EndpointTimeoutError | ShortageError):
            for request in batch:  # a time-out is nobody's content, and asking again at once piles up
                self._endings.fail(request, error)
        elif isinstance(error, UnevenRowsError):
            if (signature := batch[0].signature) is not None:
                self._catalogue.join_no_more(signature, error)
            async with asyncio.TaskGroup() as group:
                for request in batch:
                    group.create_task(self._infer(model, [request]))
        else:  # somebody's content: find out whose
            middle = len(batch) // 2
            await self._infer(model, batch[:middle])
            await self._infer(model, batch[middle:])

    async def _ask(self, model: str, batch: list[Request], *, alone: bool = False) -> list[list[Tensor]]:
        infer = batch[0].request
        parameters = {name: value for name, value in infer.parameters.items() if name != MICRO_BATCH}
        endpoint = batch[0].endpoint or self._endpoints.pick(model)
        asked, asked_at, timeout_s = Asked(batch), time.monotonic(), 0.0
        fields = [request.claim.field for request in batch]
        self._unwritten.discard(fields)  # halves of a micro-batch that has failed are asked again
        self._asked.add(asked)  # before the turnstile: who waits there can be cancelled, and expires
        self._watch_deadlines(asked)
        try:
            async with nullcontext() if alone else self._through(model):
                if self._ending is not None:
                    raise self._ending
                if asked.running.why is not None:
                    raise asked.running.why
                asked_at, timeout_s = time.monotonic(), self._timeout_s(batch)
                self._unwritten.add(model, fields)
                outputs = await endpoint.infer(
                    model,
                    batch[0].version,
                    batching.merge(batch),
                    [output.name for output in infer.outputs],
                    parameters,
                    timeout_s,
                    asked.running,
                )
        except EndpointTimeoutError as error:
            if error is asked.running.why:
                raise  # nobody waits for it any more
            waiting = next((request for request in batch if not request.over), batch[0])
            found = self._time_error(waiting, timeout_s, error)
            if found is error and not await endpoint.is_ready():  # it is not the model that hangs
                self._endpoints.mark_away(endpoint)
                raise EndpointUnavailableError(f"endpoint {endpoint.url} does not answer") from error
            raise found from error
        except StubDiedError as error:
            key = (endpoint.url, model)
            if await self._reload(endpoint, model, asked_at):
                self._beyond_reload.discard(key)
                raise
            self._catalogue.lost(endpoint, model, BEYOND_RELOAD_S)
            if key in self._beyond_reload:  # it was dead already: nobody here is to blame
                raise EndpointUnavailableError(f"somebody has to reload model {model!r}: {error}") from error
            self._beyond_reload.add(key)
            raise
        except QueueFullError as error:
            # Triton has more than it can do: nobody's attempt, but it is to be left alone for a while.
            self._catalogue.lost(endpoint, model, error.retry_after_s or BUSY_S * random.random())
            raise
        except EndpointUnavailableError:
            if self._ending is None:
                await self._catalogue.no_answer(endpoint, model)
            raise
        except UnknownModelError as error:
            # It was known a moment ago: unloaded, or retired, under way.
            self._catalogue.lost(endpoint, model)
            raise EndpointUnavailableError(str(error)) from error
        except InvalidInputError as error:
            signature = batch[0].signature
            if signature is not None and await self._catalogue.has_changed(endpoint, signature):
                raise EndpointUnavailableError(f"model {model!r} has changed on {endpoint.url}: {error}") from error
            raise
        except SamphireError:
            raise
        except Exception as error:
            raise our_error(error) from error
        finally:
            self._asked.discard(asked)
            if asked.clock is not None:
                asked.clock.cancel()
            self._pace.took(model, time.monotonic() - batch[0].taken_in_at)
        if self._beyond_reload:
            self._beyond_reload.discard((endpoint.url, model))
        self._check(batch, outputs)
        return batching.split(batch, outputs)

    def _check(self, batch: Sequence[Request], outputs: Sequence[Tensor]) -> None:
        signature, infer = batch[0].signature, batch[0].request
        assert signature is not None
        rows = sum(request.rows for request in batch)
        even = len(batch) > 1 or self._catalogue.joins(signature.name)
        check_answer(signature, [output.name for output in infer.outputs], rows, outputs, even=even)

    @asynccontextmanager
    async def _through(self, model: str) -> AsyncIterator[None]:
        async with self._all_models.through(alone=False), self._turnstiles[model].through(alone=False):
            yield

    def _watch_deadlines(self, asked: Asked) -> None:
        """Give up each member of a micro-batch when its own deadline passes; the others go on."""
        earliest = min([request.times.deadline for request in asked.batch if not request.over], default=inf)
        if earliest != inf:
            left_s = max(0.001, earliest - self._store.clock.now())
            asked.clock = asyncio.get_running_loop().call_later(left_s, self._deadline_passed, asked)

    def _deadline_passed(self, asked: Asked) -> None:
        self._give_up_late(asked.batch)
        asked.stop_if_over(EndpointTimeoutError())
        self._watch_deadlines(asked)

    async def _reload(self, endpoint: Endpoint, model: str, asked_at: float) -> bool:
        """Bring a model back whose process has died; whoever finds it first, the others wait. Whether it is back."""
        async with self._reloads[model]:
            if self._reloaded_at.get((endpoint.url, model), 0.0) > asked_at:
                return True  # it was the process before
            try:
                await endpoint.reload(model)
            except SamphireError as error:  # the control API is closed to us: somebody else has to
                logger.error(
                    "model %s has lost its process on %s and may not be reloaded from here: do it: %s",
                    model,
                    endpoint.url,
                    error,
                    extra={"action": "reload_failed"},
                )
                return False
            logger.info("model %s was reloaded", model, extra={"action": "reloaded"})
            self._reloaded_at[endpoint.url, model] = time.monotonic()
            return True

    def _timeout_s(self, batch: Sequence[Request]) -> float:
        """How long Triton may take: as long as the member that can wait longest."""
        times = batch[0].times  # the limits are those of all members
        deadline_s = max(request.times.deadline for request in batch) - self._store.clock.now()
        return max(0.001, min(self._settings.triton_timeout_s, times.limit, times.soft_limit, deadline_s))

    def _time_error(self, request: Request, timeout_s: float, error: EndpointTimeoutError) -> EndpointTimeoutError:
        times = request.times
        if timeout_s == times.soft_limit:
            return TimeLimitError(times.soft_limit, soft=True)
        if timeout_s == times.limit:
            return TimeLimitError(times.limit, soft=False)
        if times.deadline <= self._store.clock.now():
            return EndpointTimeoutError(f"the deadline has passed while the model worked: {error}")
        return error
