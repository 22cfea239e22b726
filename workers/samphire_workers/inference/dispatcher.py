"""From micro-batch to answer: load, start, ask Triton; and what follows when it does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from samphire.errors import ModelFaultError, SamphireError, TaskCancelledError, WorkerCrashError
from samphire_broker.retry import policy_for
from samphire_broker.settings import Settings
from samphire_broker.store import Store, Tried
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference.asking import Asker
from samphire_workers.inference.budget import ByteBudget
from samphire_workers.inference.locks import ModelLocks
from samphire_workers.inference.starting import Starter
from samphire_workers.inference.streaming import Streaming
from samphire_workers.inference.suspects import LOSSES_MAX, Suspects, is_suspect
from samphire_workers.intake.loading import fetch, has_refs, load, takes_long
from samphire_workers.intake.request import Request
from samphire_workers.intake.served import ServedModels
from samphire_workers.monitoring.observers import Observers
from samphire_workers.repeat import persist
from samphire_workers.settlement.consequences import Attempt, Consequence, Tasks, consequence_of
from samphire_workers.settlement.endings import Endings
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.unexpected import our_error
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

BATCHES_A_MODEL = 4
"""Micro-batches of one model under way at once. While that many are, its queue fills up, so the next
claim makes fuller batches: load itself sets the batch size, and no timer does."""


def _continues_sequence(request: Request) -> bool:
    """Whether what a request asks depends on the model's state; such a one is never in company."""
    return request.sequence_id is not None and not request.request.parameters.get("sequence_start")


class Dispatcher:
    """Runs micro-batches on the endpoints, and ends their tasks."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endpoints: Endpoints,
        served: ServedModels,
        ledger: Ledger,
        work: Work,
        endings: Endings,
        starter: Starter,
        observers: Observers,
    ) -> None:
        self._settings = settings
        self._store = store
        self._served = served
        self._ledger = ledger
        self._work = work
        self._endings = endings
        self._starter = starter
        self._budget = ByteBudget(settings.inflight_max_bytes // 2)
        self._observers = observers
        locks = ModelLocks()
        streaming = Streaming(settings, store, endings, observers)
        self._asker = Asker(settings, store, endpoints, served, endings, ledger, locks, streaming, observers, work)
        self._suspects = Suspects(store, locks, ledger.unwritten, settings.triton_timeout_s, work)
        self._under_way: Counter[str] = Counter()
        """Micro-batches under way, by model."""
        self._streamed: set[str] = set()
        """Models that stream, as far as they are known."""

    def stop_over(self) -> None:
        """Tell Triton of what it works on for nobody any more."""
        self._asker.stop_over(TaskCancelledError())

    def hand_back(self) -> None:
        """Give up what is under way, and ask for nothing more: it goes back to its queues as if it had not begun."""
        self._asker.end()

    def is_busy(self, model: str) -> bool:
        """Whether as much of a model is under way as should be at once."""
        most = self._settings.streams_per_model if model in self._streamed else BATCHES_A_MODEL
        return self._under_way[model] >= most

    def busy(self) -> set[str]:
        """Such models."""
        return {model for model in self._under_way if self.is_busy(model)}

    def begin(self, model: str, batch: list[Request]) -> None:
        """Begin to bring one micro-batch to its end."""
        if batch[0].streams and model not in self._streamed:
            self._streamed.add(model)
            self._ledger.limits.fix(model, self._settings.streams_per_model)
        self._under_way[model] += 1
        self._work.begin(self._run_batch(model, batch))

    async def run(self, model: str, batch: list[Request]) -> None:
        """Bring one micro-batch to its end."""
        self._under_way[model] += 1
        await self._run_batch(model, batch)

    async def _run_batch(self, model: str, batch: list[Request]) -> None:
        began = time.monotonic()
        for request in batch:
            request.taken_in_at = began
        nbytes = sum(request.nbytes for request in batch)
        try:
            async with self._budget.hold(nbytes):
                loaded = await self._load(batch)
                if not batch[0].streams:
                    await self._run_loaded(model, loaded)
            if batch[0].streams:  # it goes on for long, and its inputs are sent at once: the budget is not held for it
                await self._run_loaded(model, loaded)
        finally:
            self._under_way[model] -= 1
            self._ledger.has_room()

    async def _run_loaded(self, model: str, batch: list[Request]) -> None:
        if self._store.some_tried or not all(request.claim.is_first for request in batch):
            await self._run_carefully(model, batch)
        else:
            await self._run(model, batch)

    async def _run(self, model: str, batch: list[Request]) -> None:
        if not batch:
            return
        # Asked twice, a request of a sequence (which is never in company) would change the model's state twice: its
        # start is written first, so that it has counted an attempt.
        if self._store.some_cancelled or batch[0].sequence_id is not None:
            await self._start_then_infer(model, batch)
        else:
            await self._start_and_infer(model, batch)

    async def _start_then_infer(self, model: str, batch: list[Request]) -> None:
        await self._infer(model, await self._starter.start(batch))

    async def _start_and_infer(self, model: str, batch: list[Request]) -> None:
        """Ask the model while the start is written: no task here was ever tried before."""
        now = time.time()
        for request in batch:
            request.started_at = now
        starting = asyncio.create_task(self._starter.start(batch))
        try:
            answers = await self._asker.ask(model, batch, starting=starting)
        except SamphireError as error:
            await self._ended_badly(model, await starting, error)
            return
        except BaseException:
            starting.cancel()
            raise
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
                    self._starter.exhausted(request, before)
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
            self._endings.give_up_late([request])
            if request.over:
                return True
            started = await self._starter.try_start([request])
            if started is not None:
                await self._infer(model, started, alone=True)
            return started is not None

        all_models = before.losses >= LOSSES_MAX
        if not await self._suspects.run(
            model, run, all_models=all_models, among_workers=all_models or before.shared > 0
        ):
            await self._ledger.release([request])

    async def _load(self, batch: Sequence[Request]) -> list[Request]:
        loaded: list[Request] = []
        for request in batch:
            try:
                fetched: dict[str, bytes] = {}
                if has_refs(request):
                    fetched = await persist(lambda r=request: fetch(r, self._store))  # type: ignore[misc]
                if request.json_values and takes_long(request):
                    await asyncio.to_thread(load, request, fetched)
                else:
                    load(request, fetched)
            except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
                self._endings.fail(request, our_error(error))
            else:
                loaded.append(request)
        return loaded

    async def _infer(self, model: str, batch: list[Request], *, alone: bool = False) -> None:
        batch = [request for request in batch if not request.over]
        failed = [request for request in batch if request.attempts > request.crashes]
        if failed and len(batch) > 1:
            # Something was wrong with them before: each runs by itself, so their neighbours are safe.
            parts = [[request] for request in failed]
            parts.append([request for request in batch if request.attempts == request.crashes])
            await self._infer_each(model, parts)
            return
        if not batch:
            return
        try:
            answers = await self._asker.ask(model, batch, alone=alone)
        except SamphireError as error:
            await self._ended_badly(model, batch, error, alone=alone)
        else:
            await self._endings.succeed(list(zip(batch, answers, strict=True)))

    async def _infer_each(self, model: str, parts: Iterable[list[Request]]) -> None:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(self._infer(model, part))

    async def _ended_badly(
        self, model: str, batch: list[Request], error: SamphireError, *, alone: bool = False
    ) -> None:
        batch = [request for request in batch if not request.over]
        if not batch:
            return
        row = consequence_of(error, len(batch))
        if row.state_is_lost and _continues_sequence(batch[0]):
            self._endings.fail(batch[0], ModelFaultError(f"the state of its sequence is lost: {error}"))
        elif row.tasks is Tasks.RELEASE:
            attempt = self._attempt_of(row, batch, error, alone=alone)
            await self._ledger.release(batch, attempt=attempt, endpoint_died=row.endpoint_died)
        elif row.tasks is Tasks.DROP:
            for request in batch:
                request.over = True
                self._observers.dropped(request)
            self._ledger.let_go([request.claim.field for request in batch])
        elif row.tasks in (Tasks.FAIL, Tasks.REST):
            for request in batch:
                self._endings.fail(request, error)
        elif row.tasks is Tasks.EACH:
            if (signature := batch[0].signature) is not None:
                self._served.join_no_more(signature, error)
            await self._infer_each(model, [[request] for request in batch])
        else:
            middle = len(batch) // 2
            await self._infer(model, batch[:middle])
            await self._infer(model, batch[middle:])

    def _attempt_of(self, row: Consequence, batch: Sequence[Request], error: SamphireError, *, alone: bool) -> str:
        """What is kept of an attempt that goes back to its queue; "" where it counts as none."""
        if row.attempt is Attempt.COUNTS:
            logger.error(
                "model %s has lost its process: its tasks run again, apart from the others: %s",
                batch[0].model,
                error,
                extra={"action": "stub_died"},
            )
            return self._endings.attempt_of(WorkerCrashError(f"the model's process died: {error}"))
        if row.attempt is Attempt.IF_ALONE and alone and batch[0].losses >= LOSSES_MAX:
            return self._endings.attempt_of(WorkerCrashError(f"the endpoint died with this task alone: {error}"))
        return ""
