"""How tasks end: what is settled, with the claim checks and next steps that go with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from samphire.errors import EndpointTimeoutError, InternalError, InvalidInputError, SamphireError, TaskCancelledError
from samphire.wire import keys
from samphire.wire.contract import CanvasStart, ChordPart, InferResponse, Ref
from samphire_broker.retry import GiveUp, Retry, decide, policy_for, reason_of
from samphire_broker.settings import Settings
from samphire_broker.store import OtherEnd, Settled, Settlement, Store, Webhook
from samphire_workers.claims.ledger import Ledger
from samphire_workers.intake.request import Request, Run
from samphire_workers.monitoring.observers import Observers
from samphire_workers.outbox.outbox import Outbox
from samphire_workers.repeat import persist
from samphire_workers.settlement import outcome
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.settlement.log_writer import LogWriter
from samphire_workers.settlement.outcome import PASSED_ON_BYTES, NextSteps, takes_claim_checks, with_steps
from samphire_workers.settlement.settler import Settler
from samphire_workers.triton.messages import Tensor
from samphire_workers.unexpected import ShortageError, our_error
from samphire_workers.work import Work

logger = logging.getLogger(__name__)


WEBHOOK_ERROR_CHARACTERS = 500
PROGRESS_S = 1.0
"""Between two webhooks of a task's progress."""


class Endings:
    """Ends tasks. What takes more than a moment (a canvas) goes on in a task of the lane's own."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        ledger: Ledger,
        work: Work,
        canvas: Canvas,
        observers: Observers,
        outbox: Outbox,
        worker: str,
    ) -> None:
        self._settings = settings
        self._store = store
        self._ledger = ledger
        self._work = work
        self._canvas = canvas
        self._observers = observers
        self._outbox = outbox
        canvas.webhooks_of = outbox.of_other_end
        self._worker = worker
        self.settler = Settler(store, ledger, observers, self._not_settled)
        """Writes ends, for as long as the lane runs."""
        self.log_writer = LogWriter(store)
        """Writes the logs of tasks that stream, for as long as the lane runs."""
        self.shortages = 0
        """Tasks that went back to their queues since the last success, because this worker was short of something."""

    async def succeed(self, answered: Sequence[tuple[Request, list[Tensor]]]) -> None:
        """End tasks that Triton has answered."""
        done, ended = outcome.now_text(), []
        now, clock_now = time.monotonic(), self._store.clock.now()
        for request, outputs in answered:
            if request.over:
                continue
            try:
                if refs := await self._claim_checks(request, outputs):
                    now, clock_now = time.monotonic(), self._store.clock.now()
                request.timings = outcome.timings(request, now, clock_now, self._worker)
                answer = outcome.response(request, outputs, refs)
                settlement = outcome.success(request, answer, done)
                passed_on = answer if request.canvas is None else await self._passed_on(request, outputs, answer)
            except Exception as error:  # noqa: BLE001 - an answer that cannot be written is this task's alone
                self.fail(request, our_error(error))
                continue
            request.tensors = []
            if self._succeed(request, settlement, passed_on):
                ended.append(request)
        self._observers.succeeded(ended)

    def succeed_with(self, request: Request, result: object) -> None:
        """End a task of another kind, with what it has for a result; JSON can hold it."""
        try:
            settlement = outcome.success(request, result, outcome.now_text())
        except Exception as error:  # noqa: BLE001 - a result that cannot be written is this task's alone
            self.fail(request, our_error(error))
        else:
            if self._succeed(request, settlement, result):
                self._observers.succeeded([request])

    def _succeed(self, request: Request, settlement: Settlement, passed_on: object) -> bool:
        """Whether its end is on its way; else its next steps have to be found out first."""
        request.outcome = "succeeded"
        self.shortages = 0
        if request.destination is not None:
            told = self._outbox.of_end(request, "succeeded", answer=passed_on)
            settlement = settlement._replace(webhooks=(*request.untold, *told))
        if request.canvas is None:
            self.settler.add(settlement)
            return True
        self._work.begin(self._succeed_with_steps(request, settlement, passed_on))
        return False

    def fail(self, request: Request, error: SamphireError) -> None:
        """End an attempt that failed: there will be another, or the task, or unreadable message, is a dead letter."""
        if isinstance(error, ShortageError):
            logger.warning(
                "task %s goes back to its queue, without an attempt: %s",
                request.task_id,
                error,
                extra={"action": "shortage"},
            )
            self.shortages += 1
            self._work.begin(self._ledger.release([request]))
            return
        if isinstance(error, InternalError) and request.task_id and request.started_at is None:
            self._work.begin(self._fail_unstarted(request, error))
        else:
            self._fail(request, error)

    async def _fail_unstarted(self, request: Request, error: SamphireError) -> None:
        """End an attempt that failed before it was started: what was tried before is not known yet."""
        is_delivery = request.kind is not None and request.kind.ends_itself
        (before,) = await persist(lambda: self._store.tried([request.task_id], deliveries=is_delivery))
        request.attempts = before.attempts
        self._fail(request, error)

    def _fail(self, request: Request, error: SamphireError) -> None:
        now, last = self._store.clock.now(), min(request.times.deadline, request.times.expires)
        policy = policy_for(request.infer, self._settings)
        if request.task_id:
            decision = decide(error, request.attempts + 1, last, policy, now=now)
        else:
            decision = GiveUp(reason_of(error))  # a message that is no task has no attempts
        if isinstance(decision, Retry):
            logger.info("task %s is tried again: %s", request.task_id, error, extra={"action": "task_retried"})
            again = outcome.retry(request, error, decision.at - now, self._worker)
            self.settler.add(again._replace(webhooks=tuple(request.untold)))
            self._observers.retried(request, error)
            return
        logger.info("task %s failed: %s", request.task_id or "(unreadable)", error, extra={"action": "task_failed"})
        settlement = outcome.failure(request, error, decision.reason, self._worker)
        described = {"type": outcome.public_name(error), "message": str(error)[:WEBHOOK_ERROR_CHARACTERS]}
        told = self._outbox.of_end(request, "failed", error=described)
        settlement = settlement._replace(webhooks=(*request.untold, *told))
        settlement = _closed(request, settlement, "failed", outcome.attempt_text(self._worker, error))
        if request.canvas is None:
            self.settler.add(settlement)
        else:
            after = partial(self._canvas.after_failure, request, error)
            self._work.begin(self._end_with_steps(request, settlement, after))
        self._observers.failed(request, error, decision.reason)

    def revoke(self, request: Request, state: Literal["cancelled", "expired"]) -> None:
        """End a task that is not to be run, or, cancelled, not to its end."""
        settlement = outcome.revoked(request, state)
        settlement = settlement._replace(webhooks=(*request.untold, *self._outbox.of_end(request, state)))
        settlement = _closed(request, settlement, state, self.attempt_of(TaskCancelledError(f"it is {state}")))
        if request.canvas is None:
            self.settler.add(settlement)
        else:
            after = partial(self._canvas.after_revocation, request, state)
            self._work.begin(self._end_with_steps(request, settlement, after))
        self._observers.revoked(request, expired=state == "expired")

    async def notify(self, webhooks: Sequence[tuple[Request, Webhook]]) -> None:
        """Put out webhooks that tell of tasks under way."""
        wishes = [(request.claim.field, request.task_id, webhook) for request, webhook in webhooks]
        try:
            if await persist(lambda: self._store.notify(wishes)):
                _log_lost(", ".join(sorted({request.task_id for request, _ in webhooks})))
        except SamphireError as error:
            logger.warning(
                "%d webhooks of tasks under way are not sent: %s", len(wishes), error, extra={"action": "not_notified"}
            )
        for request, webhook in webhooks:
            request.untold.remove(webhook)

    def tell_progress(self, request: Request, fraction: float | None, message: str) -> None:
        """A running task tells how far it is; of what it tells within `PROGRESS_S` only the first goes out."""
        now = time.monotonic()
        if request.destination is None or now < request.progress_told_at + PROGRESS_S:
            return
        # Numbers grow with the time: 1 is the attempt's start.
        number = 2 + int(10 * (time.time() - (request.started_at or time.time())))
        told = self._outbox.of_event(request, "progress", number, {"progress": fraction, "message": message[:500]})
        if told is not None:
            request.progress_told_at = now
            request.untold.append(told)
            self._work.begin(self.notify([(request, told)]))

    def tell_started(self, requests: Sequence[Request]) -> None:
        """Tasks begin to run."""
        told = []
        for request in requests:
            if (webhook := self._outbox.of_event(request, "started", 1, {})) is not None:
                told.append((request, webhook))
                request.untold.append(webhook)
        if told:
            self._work.begin(self.notify(told))

    def cancel_running(self, request: Request) -> None:
        """End a task that runs."""
        request.over = True
        self.revoke(request, "cancelled")

    def give_up_late(self, requests: Iterable[Request]) -> None:
        """End those tasks whose deadline has passed while they are held; Triton may work on them."""
        now = self._store.clock.now()
        for request in requests:
            if request.times.deadline <= now and not request.over:
                request.over = True
                self.fail(request, EndpointTimeoutError("the deadline has passed before the model has answered"))

    async def run_errand(self, request: Request, run: Run) -> None:
        """Do what a message that is no task of its own asks for, and end it; it has no result."""
        done = Settlement(request.claim.field, "", "succeeded", "", "")
        try:
            steps: NextSteps | None = await run(request)
            settlement = done if steps is None else with_steps(done, steps)
        except TaskCancelledError:
            self.revoke(request, "cancelled")
        except Exception as error:  # noqa: BLE001 - one message must not end the lane for all
            self.fail(request, our_error(error))
        else:
            self.settler.add(settlement)

    def attempt_of(self, error: SamphireError) -> str:
        """What is kept of an attempt that comes to nothing, JSON."""
        return outcome.attempt_text(self._worker, error)

    async def return_chord_part(self, request: Request) -> None:
        """Have Celery's backend count a part of a chord that has ended."""
        part: ChordPart = request.payload
        await persist(lambda: self._canvas.chords.return_part(part, self._end_other))

    async def start_canvas(self, request: Request) -> NextSteps:
        """The first tasks of a canvas that a client has sent; raises TaskCancelledError where it was cancelled."""
        start: CanvasStart = request.payload
        if await persist(lambda: self._store.is_cancelled(request.task_id)):
            raise TaskCancelledError
        return await persist(lambda: self._canvas.start(request.task_id, start))

    def _not_settled(self, settlement: Settlement, verdict: Settled) -> None:
        request = self._ledger.request(settlement.field)
        if request is None:  # it was settled otherwise meanwhile
            self._ledger.let_go([settlement.field])
        elif verdict is Settled.WAS_CANCELLED:
            self.revoke(request, "cancelled")
        elif verdict is Settled.OUTPUTS_LOST:
            self._work.begin(self._ledger.release([request]))
        elif verdict is Settled.WEBHOOKS_NOT_PUSHED:
            _log_lost(request.task_id)
            others = tuple(other._replace(webhooks=()) for other in settlement.others)
            self.settler.add(settlement._replace(webhooks=(), others=others))
        else:
            self._not_pushed(request, settlement)

    def _not_pushed(self, request: Request, settlement: Settlement) -> None:
        """End a task whose next steps cannot be pushed: as in Celery it has failed, and without these steps."""
        queues = ", ".join(sorted({name for name, _ in settlement.pushes}))
        error = InvalidInputError(
            f"its next steps cannot be pushed to {queues}: the worker's broker user has no right to, or keys that are "
            "no lists lie there"
        )
        if settlement.state == "succeeded":
            self.fail(request, error)
            return
        logger.error("task %s ends without its next steps: %s", request.task_id, error, extra={"action": "not_pushed"})
        own = tuple((name, message) for name, message in settlement.pushes if keys.known_form(name))
        pushes = own if len(own) < len(settlement.pushes) else ()
        self.settler.add(settlement._replace(pushes=pushes))

    async def _end_other(self, end: OtherEnd, kwargs: Mapping[str, Any]) -> None:
        told = end._replace(webhooks=self._outbox.of_other_end(end, kwargs))
        if await persist(lambda: self._store.end_others([told])) == [2]:
            _log_lost(end.task_id)

    async def _claim_checks(self, request: Request, outputs: Sequence[Tensor]) -> dict[str, Ref]:
        above = self._settings.inline_output_bytes
        if not takes_claim_checks(request) or all(len(tensor.data) <= above for tensor in outputs):
            return {}
        return await persist(lambda: outcome.store_large(request, outputs, self._store, above))

    async def _passed_on(self, request: Request, outputs: Sequence[Tensor], answer: InferResponse) -> InferResponse:
        """The answer as the next steps get it: what is large as a claim check, so that messages stay small."""
        if takes_claim_checks(request) or all(len(tensor.data) <= PASSED_ON_BYTES for tensor in outputs):
            return answer
        refs = await persist(lambda: outcome.store_large(request, outputs, self._store, PASSED_ON_BYTES))
        return outcome.response(request, outputs, refs)

    async def _succeed_with_steps(self, request: Request, settlement: Settlement, answer: object) -> None:
        try:
            steps = await persist(lambda: self._canvas.after_success(request, answer))
        except SamphireError as error:
            self.fail(request, error)
        else:
            self.settler.add(with_steps(settlement, steps))
            self._observers.succeeded([request])

    async def _end_with_steps(
        self, request: Request, settlement: Settlement, find_steps: Callable[[], Awaitable[NextSteps]]
    ) -> None:
        try:
            settlement = with_steps(settlement, await persist(find_steps))
        except ShortageError as error:
            self.fail(request, error)
            return
        except SamphireError as error:
            logger.warning(
                "task %s has ended, but not all of its next steps are sent: %s",
                settlement.task_id,
                error,
                extra={"action": "no_steps"},
            )
            settlement = await self._with_fewer_steps(request, settlement, find_steps)
        self.settler.add(settlement)

    async def _with_fewer_steps(
        self, request: Request, settlement: Settlement, find_steps: Callable[[], Awaitable[NextSteps]]
    ) -> Settlement:
        """For those who wait for the chain or the chord of the task, whatever else of its canvas is wrong."""
        for wrong in (("callbacks", "errbacks"), ("chain",)):
            request.canvas = {**(request.canvas or {}), **dict.fromkeys(wrong)}
            if not (request.canvas.get("chain") or request.canvas.get("chord")):
                break
            try:
                return with_steps(settlement, await persist(find_steps))
            except SamphireError as error:
                logger.warning(
                    "task %s has ended, and who waits for its chain or chord is not told: %s",
                    settlement.task_id,
                    error,
                    extra={"action": "not_told"},
                )
        return settlement


def _closed(request: Request, settlement: Settlement, state: str, attempt: str) -> Settlement:
    """The settlement with what its kind keeps of it."""
    if request.kind is None or request.kind.close is None:
        return settlement
    return settlement._replace(delivery=request.kind.close(request, state, attempt))


def _log_lost(task_id: str) -> None:
    logger.error(
        "a webhook of task %s is lost: keys of other types lie where deliveries are queued, or the worker's broker "
        "user has no right to push there",
        task_id,
        extra={"action": "webhook_lost"},
    )
