"""Requests of a sequence: one at a time, in the order in which they were queued, on one endpoint, over all workers.

A model with sequence_batching keeps state between the requests of a sequence (Triton's "stateful models"), so their
order is part of the question. One worker at a time leads such a model: it alone claims from its queues, in their order,
and asks for one request of a sequence after the other. Where one of them does not succeed, the model's state is not
what those after it were meant for: they fail, until one begins the sequence again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from samphire.errors import EndpointUnavailableError, InvalidInputError, SamphireError
from samphire.wire import keys
from samphire_broker.store import Led, Store
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference.dispatcher import Dispatcher
from samphire_workers.intake.request import Request
from samphire_workers.intake.served import ServedModels
from samphire_workers.settlement.endings import Endings
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

LEAD_S = 0.25
"""Between two looks at who leads."""
REMEMBERED_MAX = 10_000
"""Sequences without a request under way whose endpoint and state are remembered; the longest unused are forgotten."""

Key = tuple[str, str]


@dataclass
class _Sequence:
    """What is known of one sequence."""

    waiting: deque[Request] = field(default_factory=deque)
    returned: set[str] = field(default_factory=set)
    """Ids of those that went back to their queue: they come again, and before all others."""
    behind: deque[Request] = field(default_factory=deque)
    """Those that have come meanwhile."""
    endpoint: Endpoint | None = None
    version: str = ""
    broken: str = ""
    """Why its later requests cannot be right."""
    runs: bool = False

    def take_waiting(self) -> list[Request]:
        """Those that have not had their turn; they are not waited for any more."""
        taken = [*self.waiting, *self.behind]
        self.waiting.clear()
        self.behind.clear()
        return taken


class Sequences:
    """The sequences of the models that this worker leads."""

    def __init__(
        self,
        store: Store,
        served: ServedModels,
        endpoints: Endpoints,
        endings: Endings,
        ledger: Ledger,
        work: Work,
        dispatcher: Dispatcher,
    ) -> None:
        self._store = store
        self._served = served
        self._endpoints = endpoints
        self._endings = endings
        self._ledger = ledger
        self._work = work
        self._dispatcher = dispatcher
        ledger.order = self
        self._known: OrderedDict[Key, _Sequence] = OrderedDict()
        self._own: set[str] = set()
        """Models that no other worker leads."""
        self._led: set[str] = set()
        """Those of them of which no other worker holds anything any more."""

    def not_led(self) -> set[str]:
        """Models whose tasks this worker must not claim, since another leads them or none does yet."""
        return self._served.stateful() - self._led

    async def lead(self, on_led: Callable[[], None], holds: Callable[[str], bool]) -> None:
        """Lead what nobody leads, and give back what this worker cannot serve, for ever.

        Args:
            on_led: called when there is a model more to claim from.
            holds: whether this worker holds tasks of a model.
        """
        while True:
            for model in self._served.stateful() | self._own:
                away = self._endpoints.is_away(model)
                if away and (model not in self._own or holds(model)):
                    continue
                try:
                    verdict = await self._store.lead(model, give_back=away)
                except SamphireError as error:
                    logger.warning(
                        "who leads model %s is not known, so nothing of it is claimed now: %s",
                        model,
                        error,
                        extra={"action": "lead_failed"},
                    )
                    continue
                if await self._note(model, verdict):
                    on_led()
            await asyncio.sleep(LEAD_S)

    async def _note(self, model: str, verdict: Led) -> bool:
        """Note what `Store.lead` has said; whether there is a model more to claim from."""
        if verdict is not Led.ALONE:
            self._led.discard(model)
        if verdict is Led.NOT_HERE and model in self._own:
            self._own.discard(model)
            await self._forget_model(model)
        if verdict is not Led.NOT_HERE:
            self._own.add(model)
        if verdict is not Led.ALONE or model in self._led:
            return False
        logger.info("this worker leads model %s", model, extra={"action": "leads"})
        self._led.add(model)
        return True

    async def _forget_model(self, model: str) -> None:
        """Forget where the sequences of a model run, and what has to come back: that is another's now."""
        while waiting := [request for _, sequence in self._of(model) for request in sequence.take_waiting()]:
            await self._ledger.release(sorted(waiting, key=lambda request: keys.claim_number(request.claim.field)))
        for key, sequence in self._of(model):
            del self._known[key]
            if sequence.broken:  # should this worker lead again: rather an error too many than a wrong answer
                self._known[key] = _Sequence(broken=sequence.broken)

    def _of(self, model: str) -> list[tuple[Key, _Sequence]]:
        return [(key, sequence) for key, sequence in self._known.items() if key[0] == model]

    def refuse(self, request: Request, error: SamphireError) -> None:
        """Fail a request that cannot be asked; one of a sequence when its turn comes, so that those after it know."""
        if request.keeps_order:
            request.refusal = error
            self.add([request])
        else:
            self._endings.fail(request, error)

    def add(self, requests: Sequence[Request]) -> None:
        """Ask for these after those of their sequences that came before."""
        for request in requests:
            if request.sequence_id is None:  # Triton says what is missing
                self._dispatcher.begin(request.model, [request])
                continue
            key = (request.model, str(request.sequence_id))
            sequence = self._known.setdefault(key, _Sequence())
            self._known.move_to_end(key)
            if request.task_id in sequence.returned:
                sequence.returned.discard(request.task_id)
                sequence.waiting.append(request)
            else:
                (sequence.behind if sequence.returned else sequence.waiting).append(request)
            if not sequence.returned:
                sequence.waiting += sequence.behind
                sequence.behind.clear()
            if not sequence.runs:
                sequence.runs = True
                self._work.begin(self._run(key, sequence))
        self._forget()

    def went_back(self, request: Request) -> list[Request]:
        """A request of a sequence goes back to its queue: those behind it, which must go with it, in their order."""
        sequence = self._known.get((request.model, str(request.sequence_id)))
        if sequence is None:
            return []
        together = [other for other in sequence.waiting if other is not request]
        sequence.waiting.clear()
        sequence.returned |= {request.task_id, *(other.task_id for other in together)}
        return together

    async def _run(self, key: Key, sequence: _Sequence) -> None:
        while sequence.waiting:
            request = sequence.waiting.popleft()
            await self._run_one(request, sequence)
            await asyncio.sleep(0)  # what goes back because the worker is short of something does so in the background
            if request.outcome != "succeeded" and request.task_id not in sequence.returned:
                sequence.broken = (
                    f"sequence {request.sequence_id!r} of model {request.model!r} is broken: its request "
                    f"{request.task_id} did not succeed, so the model's state is not what this one was sent for; begin "
                    "it again with sequence_start"
                )
        sequence.runs = False

    async def _run_one(self, request: Request, sequence: _Sequence) -> None:
        if request.over:  # it has ended before its turn came
            return
        if request.times.expires <= self._store.clock.now():
            self._endings.revoke(request, "expired")
            return
        begins = bool(request.request.parameters.get("sequence_start"))
        if request.refusal is not None:
            self._endings.fail(request, request.refusal)
            return
        if begins:
            sequence.broken, sequence.endpoint, sequence.version = "", None, ""
        elif sequence.broken:
            self._endings.fail(request, InvalidInputError(sequence.broken))
            return
        try:
            request.endpoint = self._endpoints.pick_for(request.model, str(request.sequence_id), sequence.endpoint)
        except EndpointUnavailableError:
            await self._ledger.release([request])
            return
        if sequence.version and request.request.model_version in ("", "champion"):
            request.version = sequence.version  # a newer one knows nothing of it
        sequence.endpoint, sequence.version = request.endpoint, request.version
        await self._dispatcher.run(request.model, [request])

    def _forget(self) -> None:
        for key in list(self._known)[: max(0, len(self._known) - REMEMBERED_MAX)]:
            sequence = self._known[key]
            if not (sequence.runs or sequence.waiting or sequence.returned):
                del self._known[key]
