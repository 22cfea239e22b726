"""From message to micro-batch: what each is, whether it fits its model as it is now, and whom it may go with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Sequence

from samphire.errors import EndpointUnavailableError, InvalidInputError, SamphireError, UnknownModelError
from samphire.wire import keys
from samphire.wire.contract import CanvasStart, InferRequest
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed, Scheduled, Store
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference import batching
from samphire_workers.inference.dispatcher import Dispatcher
from samphire_workers.inference.sequences import Sequences
from samphire_workers.intake.checking import Checker
from samphire_workers.intake.kinds import Kinds
from samphire_workers.intake.reading import find_who_waits, read
from samphire_workers.intake.request import Kind, Request, Run
from samphire_workers.intake.served import ServedModels
from samphire_workers.lane.running import Runner
from samphire_workers.outbox.book import EndpointBook
from samphire_workers.outbox.outbox import named_in
from samphire_workers.queues.discovery import QueueDiscovery
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.repeat import persist
from samphire_workers.settlement.endings import Endings
from samphire_workers.unexpected import our_error
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

READ_S = 0.05
"""For so long messages are read without a pause: a claim may hold many large ones, and the worker has to beat."""


def read_or_error(claim: Claimed, settings: Settings, kinds: Kinds) -> tuple[Request, SamphireError | None]:
    """Read a message; where it is not understood, what is known of who waits for it, and why."""
    try:
        return read(claim, settings, kinds)
    except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
        request = Request(claim)
        try:
            find_who_waits(request, claim, settings, kinds)
        except Exception:
            logger.exception(
                "who waits for a message is not known: it becomes a dead letter, and nobody is told",
                extra={"action": "who_waits_failed"},
            )
            request = Request(claim)
        return request, our_error(error)


class Sorter:
    """Takes in what was claimed; each message is routed, scheduled, ended, run as an errand, or dispatched.

    Args:
        settings, store, kinds, served, ledger, work: of the lane.
        discovery: is told of queues that messages are moved to.
        watch: is woken when there may be something to claim.
        endings: ends what is not run.
        sequences: takes the requests of models that keep state.
        dispatcher: takes micro-batches.
        runner: takes tasks of other kinds.
        book: knows who is told of a task.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        kinds: Kinds,
        served: ServedModels,
        discovery: QueueDiscovery,
        watch: QueueWatch,
        ledger: Ledger,
        work: Work,
        endings: Endings,
        sequences: Sequences,
        dispatcher: Dispatcher,
        runner: Runner,
        book: EndpointBook,
    ) -> None:
        self._settings = settings
        self._store = store
        self._kinds = kinds
        self._served = served
        self._discovery = discovery
        self._watch = watch
        self._ledger = ledger
        self._work = work
        self._endings = endings
        self._sequences = sequences
        self._dispatcher = dispatcher
        self._runner = runner
        self._book = book
        self._in_order: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take_in(self, claimed: Sequence[Claimed]) -> None:
        """Read what was claimed, and start what each message asks for."""
        requests: list[Request] = []
        claimed_at = began = time.monotonic()
        for claim in claimed:
            if time.monotonic() - began > READ_S:
                await asyncio.sleep(0)
                began = time.monotonic()
            request, error = read_or_error(claim, self._settings, self._kinds)
            request.claimed_at = claimed_at
            if request.infer is not None and request.infer.webhook:
                error = await self._find_destination(request, request.infer, error)
            if isinstance(request.payload, CanvasStart):
                await self._look_for_endpoint(request.payload)
            self._ledger.has_read(request)
            if error is not None and not request.keeps_order:
                self._refuse(request, error)
            else:
                request.refusal = error  # of a sequence: it fails in its turn, so that those after it know
                requests.append(request)
        self._sort_out(requests)

    async def _find_destination(
        self, request: Request, infer: InferRequest, error: SamphireError | None
    ) -> SamphireError | None:
        """Find who is told of a task; what is wrong with it, also where it names nobody that there is."""
        try:
            request.destination = await self._book.resolve_fresh(infer.webhook, infer.tenant)
        except InvalidInputError as unknown:
            return error or unknown
        return error

    async def _look_for_endpoint(self, start: CanvasStart) -> None:
        """Have the book know the endpoint of a chain that may never begin."""
        if (named := named_in(start.last_arguments())) is not None:
            webhook, tenant, _ = named
            with contextlib.suppress(InvalidInputError):
                await self._book.resolve_fresh(webhook, tenant)

    def _refuse(self, request: Request, error: SamphireError) -> None:
        try:
            self._endings.fail(request, error)
        except Exception:  # one message must not end the lane for all
            logger.exception(
                "who waits for a message cannot be told: it becomes a dead letter", extra={"action": "refusal_failed"}
            )
            nobody = Request(request.claim)
            self._ledger.has_read(nobody)
            self._endings.fail(nobody, error)

    def _sort_out(self, requests: Sequence[Request]) -> None:
        at_home: defaultdict[str, list[Request]] = defaultdict(list)
        elsewhere: list[Request] = []
        later: list[Request] = []
        now = self._store.clock.now()
        for request in requests:
            is_over = request.refusal is not None or request.times.expires <= now
            if is_over and not request.keeps_order:  # else it ends in its turn, so that those after it know
                self._endings.revoke(request, "expired")
            elif request.times.eta > now and not is_over:
                later.append(request)
            elif request.kind is not None and request.kind.run is not None:
                self._work.begin(self._run(request, request.kind, request.kind.run))
            elif not request.at_home:
                elsewhere.append(request)
            else:
                at_home[request.model].append(request)
        if later:
            self._work.begin(self._schedule(later))
        if routable := [request for request in elsewhere if self._may_be_routed(request)]:
            self._work.begin(self._route(routable))
        for model, fitting in at_home.items():
            checker = self._served.known(model)
            in_order = checker is not None and checker.signature.sequence_batching
            if checker is not None and not in_order and all(self._fits(checker, request) for request in fitting):
                self._dispatch(model, fitting, checker)
            else:
                self._work.begin(self._dispatch_checked(model, fitting))

    def _may_be_routed(self, request: Request) -> bool:
        if request.sequence_id is None:
            return True
        queue = keys.queue_name(request.model, request.request.tenant)
        why = f"requests of a sequence keep their order only in their model's queue: send them to {queue}"
        self._endings.fail(request, InvalidInputError(why))
        return False

    def _fits(self, checker: Checker, request: Request) -> bool:
        try:
            checker.check(request)
        except Exception:  # noqa: BLE001 - it is checked again, with time to say what is wrong
            return False
        return True

    async def _run(self, request: Request, kind: Kind, run: Run) -> None:
        if kind.ends_itself:
            await run(request)
        elif kind.is_errand:
            await self._endings.run_errand(request, run)
            self._watch.wake()  # the body of a chord may have been sent, in Celery's way
        else:
            await self._runner.run(request, run)

    async def _route(self, requests: Sequence[Request]) -> None:
        moves = []
        for request in requests:
            queue, _ = keys.split_list(request.home_list)
            moves.append((request.claim.field, queue, request.home_list))
            self._discovery.serve([queue])
        await self._ledger.hand_back(requests, lambda: self._store.route(moves))

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
            if verdict is Scheduled.CANCELLED:
                self._endings.revoke(request, "cancelled")
            elif verdict is Scheduled.DUE:  # by the broker's clock, which is the one that counts
                request.times = request.times._replace(eta=0.0)
                due.append(request)
            else:
                if verdict is Scheduled.REPLACED:
                    logger.warning(
                        "task %s was scheduled twice: the later message has replaced the earlier one",
                        request.task_id,
                        extra={"action": "replaced"},
                    )
                self._ledger.let_go([request.claim.field])
        self._sort_out(due)

    async def _dispatch_checked(self, model: str, requests: list[Request]) -> None:
        """Dispatch what fits the model as it is now, and fail what does not, in the order of the claims."""
        async with self._in_order[model]:
            await self._dispatch_in_order(model, requests)

    async def _dispatch_in_order(self, model: str, requests: list[Request]) -> None:
        try:
            checker = await self._served.checker(model)
        except EndpointUnavailableError as error:
            await self._wait_for(model, requests, error)
            return
        except SamphireError as error:
            for request in requests:
                self._sequences.refuse(request, error)
            return
        valid: list[Request] = []
        for request in requests:
            why = request.refusal
            try:
                try:
                    checker.check(request)
                except UnknownModelError:  # a version that was loaded a moment ago
                    checker = await self._served.checker(model, fresh=True)
                    checker.check(request)
            except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
                why = why or our_error(error)
            if why is None:
                valid.append(request)
            elif checker.signature.sequence_batching and request.keeps_order:
                request.refusal = why
                valid.append(request)
            else:
                self._sequences.refuse(request, why)
        self._dispatch(model, valid, checker)

    async def _wait_for(self, model: str, requests: Sequence[Request], error: SamphireError) -> None:
        """Give back what a model is asked that is away; where it was not loaded in time, end it."""
        if model in self._served.given_up():
            for request in requests:
                self._endings.fail(request, self._served.why_given_up(model))
            return
        logger.warning(
            "model %s is away: its tasks wait in their queue, without an attempt: %s",
            model,
            error,
            extra={"action": "model_away"},
        )
        await self._ledger.release(requests)

    def _dispatch(self, model: str, requests: Sequence[Request], checker: Checker) -> None:
        if checker.signature.sequence_batching:
            self._sequences.add(requests)
            return
        for batch in batching.group(requests, checker.signature):
            self._dispatcher.begin(model, batch)
