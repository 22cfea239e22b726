"""How tasks end: what is settled, with the claim checks and next steps that go with it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Literal

from samphire.errors import EndpointTimeoutError, InternalError, InvalidInputError, SamphireError
from samphire.wire import keys
from samphire.wire.contract import CanvasStart, ChordPart, InferResponse, Ref
from samphire_broker.retry import GiveUp, Retry, decide, policy_for, reason_of
from samphire_broker.settings import Settings
from samphire_broker.store import OtherEnd, Settlement, Store
from samphire_workers.intake.request import Request
from samphire_workers.monitoring.celery_events import TaskEvents
from samphire_workers.repeat import persist
from samphire_workers.settlement import outcome
from samphire_workers.settlement.canvas import Canvas
from samphire_workers.settlement.outcome import PASSED_ON_BYTES, NextSteps, takes_claim_checks, with_steps
from samphire_workers.settlement.settler import Settler
from samphire_workers.triton.endpoint import Tensor
from samphire_workers.unexpected import ShortageError, our_error

logger = logging.getLogger(__name__)


class Endings:
    """Ends tasks. What takes more than a moment (a canvas) goes on in a task of the lane's own."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        settler: Settler,
        canvas: Canvas,
        events: TaskEvents,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        release: Callable[[Sequence[Request]], Coroutine[Any, Any, None]],
        worker: str,
    ) -> None:
        self._settings = settings
        self._store = store
        self._settler = settler
        self._canvas = canvas
        self._events = events
        self._spawn = spawn
        self._release = release
        self._worker = worker
        self.shortages = 0
        """Tasks that went back to their queues since the last success, because this worker was short of something."""

    async def succeed(self, answered: Sequence[tuple[Request, list[Tensor]]]) -> None:
        """End tasks that Triton has answered."""
        done = outcome.now_text()
        for request, outputs in answered:
            if request.over:
                continue
            try:
                refs = await self._claim_checks(request, outputs)
                answer = outcome.response(request, outputs, refs)
                settlement = outcome.success(request, answer, done)
                passed_on = answer if request.canvas is None else await self._passed_on(request, outputs, answer)
            except Exception as error:  # noqa: BLE001 - an answer that cannot be written is this task's alone
                self.fail(request, our_error(error))
                continue
            request.tensors = []
            request.outcome = "succeeded"
            self.shortages = 0
            if request.canvas is None:
                self._settler.add(settlement)
                self._events.succeeded(request)
            else:
                self._spawn(self._succeed_with_steps(request, settlement, passed_on))

    def fail(self, request: Request, error: SamphireError) -> None:
        """End an attempt that failed: there will be another, or the task, or unreadable message, is a dead letter."""
        if isinstance(error, ShortageError):
            logger.warning("task %s goes back to its queue: %s", request.task_id, error, extra={"action": "shortage"})
            self.shortages += 1
            self._spawn(self._release([request]))
            return
        if isinstance(error, InternalError) and request.task_id and request.started_at is None:
            self._spawn(self._fail_unstarted(request, error))
        else:
            self._fail(request, error)

    async def _fail_unstarted(self, request: Request, error: SamphireError) -> None:
        """End an attempt that failed before it was started: what was tried before is not known yet."""
        (before,) = await persist(lambda: self._store.tried([request.task_id]))
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
            self._settler.add(outcome.retry(request, error, decision.at - now, self._worker))
            self._tell(lambda: self._events.retried(request, error))
            return
        logger.info("task %s failed: %s", request.task_id or "(unreadable)", error, extra={"action": "task_failed"})
        settlement = outcome.failure(request, error, decision.reason, self._worker)
        if request.canvas is None:
            self._settler.add(settlement)
        else:
            self._spawn(self._end_with_steps(request, settlement, lambda: self._canvas.after_failure(request, error)))
        self._tell(lambda: self._events.failed(request, error))

    @staticmethod
    def _tell(event: Callable[[], None]) -> None:
        try:
            event()  # it describes what may be no valid request at all
        except Exception:
            logger.exception("a task has no event", extra={"action": "event_failed"})

    def revoke(self, request: Request, state: Literal["cancelled", "expired"]) -> None:
        """End a task that is not to be run, or, cancelled, not to its end."""
        settlement = outcome.revoked(request, state)
        if request.canvas is None:
            self._settler.add(settlement)
        else:
            self._spawn(
                self._end_with_steps(request, settlement, lambda: self._canvas.after_revocation(request, state))
            )
        self._events.revoked(request, expired=state == "expired")

    def cancel_running(self, request: Request) -> None:
        """End a task that Triton works on."""
        request.over = True
        self.revoke(request, "cancelled")

    def give_up_late(self, requests: Iterable[Request]) -> None:
        """End those tasks whose deadline has passed while they are held; Triton may work on them."""
        now = self._store.clock.now()
        for request in requests:
            if request.times.deadline <= now and not request.over:
                request.over = True
                self.fail(request, EndpointTimeoutError("the deadline has passed before the model has answered"))

    async def run_errand(self, request: Request, errand: ChordPart | CanvasStart) -> None:
        """Do what a message that is no inference asks for, and end it; it has no result of its own."""
        done = Settlement(request.claim.field, "", "succeeded", "", "")
        try:
            if isinstance(errand, ChordPart):
                await persist(lambda: self._canvas.chords.return_part(errand, self._end_other))
            elif await persist(lambda: self._store.is_cancelled(request.task_id)):
                self.revoke(request, "cancelled")
                return
            else:
                done = with_steps(done, await persist(lambda: self._canvas.start(request.task_id, errand)))
        except SamphireError as error:
            self.fail(request, error)
        else:
            self._settler.add(done)

    def not_pushed(self, request: Request, settlement: Settlement) -> None:
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
        self._settler.add(settlement._replace(pushes=pushes))

    async def _end_other(self, end: OtherEnd) -> None:
        await persist(lambda: self._store.end_others([end]))

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

    async def _succeed_with_steps(self, request: Request, settlement: Settlement, answer: InferResponse) -> None:
        try:
            steps = await persist(lambda: self._canvas.after_success(request, answer))
        except SamphireError as error:
            self.fail(request, error)
        else:
            self._settler.add(with_steps(settlement, steps))
            self._events.succeeded(request)

    async def _end_with_steps(
        self, request: Request, settlement: Settlement, find_steps: Callable[[], Awaitable[NextSteps]]
    ) -> None:
        try:
            settlement = with_steps(settlement, await persist(find_steps))
        except ShortageError as error:
            self.fail(request, error)
            return
        except SamphireError as error:
            logger.warning("task %s: %s", settlement.task_id, error, extra={"action": "no_steps"})
            settlement = await self._with_fewer_steps(request, settlement, find_steps)
        self._settler.add(settlement)

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
                logger.warning("task %s: %s", settlement.task_id, error, extra={"action": "not_told"})
        return settlement
