"""Asking Triton for one micro-batch, as long as somebody waits for it; and what an error means for the endpoint."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf

from samphire.errors import EndpointTimeoutError, EndpointUnavailableError, SamphireError
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference import batching
from samphire_workers.inference.locks import ModelLocks
from samphire_workers.inference.reloading import Reloads
from samphire_workers.inference.streaming import Starting, Streaming
from samphire_workers.intake.request import Answered, Request
from samphire_workers.intake.served import ServedModels
from samphire_workers.monitoring.observers import BatchSeen, Observers
from samphire_workers.settlement.consequences import Model, consequence_of
from samphire_workers.settlement.endings import Endings
from samphire_workers.settlement.outcome import TimeLimitError
from samphire_workers.triton.answers import check_answer
from samphire_workers.triton.calls import Running
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.triton.errors import GivenUpError, StalledError
from samphire_workers.triton.messages import Tensor
from samphire_workers.triton.statistics import Statistics
from samphire_workers.unexpected import our_error
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

BUSY_S = 1.0
"""Longest rest of a model whose queue at Triton is full, where Triton does not say how long."""

CLOCKS_S = 0.1
"""A call that gRPC ends at its deadline may be so much too early by the broker's clock, by which deadlines go."""


@dataclass(eq=False, slots=True)
class _Asked:
    """A micro-batch that an endpoint works on, or that waits at the model's lock."""

    model: str
    batch: list[Request]
    endpoint: Endpoint
    running: Running = field(default_factory=Running)
    at: float = field(default_factory=time.monotonic)
    timeout_s: float = 0.0
    clock: asyncio.TimerHandle | None = None
    """Rings when the next of its members' deadlines passes."""

    def stop_if_over(self, why: SamphireError) -> None:
        """Cancel it at the endpoint once nobody waits for it."""
        if all(request.over for request in self.batch):
            self.running.stop(why)


class Asker:
    """Asks the endpoints, and gives up what nobody waits for any more.

    Args:
        settings: those of the worker.
        store: has the broker's clock.
        endpoints: who is asked.
        served: is told what is away.
        endings: ends tasks whose deadline passes meanwhile.
        ledger: is told how long it took, and what has been at Triton.
        locks: what all go through that are not alone with the model.
        streaming: asks models that stream.
        observers: are told of each call.
        work: owns what goes on beside.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endpoints: Endpoints,
        served: ServedModels,
        endings: Endings,
        ledger: Ledger,
        locks: ModelLocks,
        streaming: Streaming,
        observers: Observers,
        work: Work,
    ) -> None:
        self._settings = settings
        self._store = store
        self._endpoints = endpoints
        self._served = served
        self._endings = endings
        self._ledger = ledger
        self._locks = locks
        self._streaming = streaming
        self._observers = observers
        self._reloads = Reloads(served)
        self._statistics = Statistics(work.begin, time.monotonic)
        self._asked: set[_Asked] = set()
        self._ending: SamphireError | None = None

    def stop_over(self, why: SamphireError) -> None:
        """Tell Triton of what it works on for nobody any more."""
        for asked in list(self._asked):
            asked.stop_if_over(why)

    def end(self) -> None:
        """Give up what is asked, and ask for nothing more."""
        self._ending = EndpointUnavailableError("the worker is ending")
        for asked in list(self._asked):
            asked.running.stop(GivenUpError("the worker is ending"))

    async def ask(
        self, model: str, batch: list[Request], *, alone: bool = False, starting: Starting | None = None
    ) -> list[list[Tensor]]:
        """The outputs of each member of a micro-batch; of one that streams those that its result collects.

        Args:
            model: that is asked.
            batch: whose members go together; one that streams is by itself.
            alone: they are past the model's lock already.
            starting: their start, where it is not written yet.

        Raises:
            SamphireError: whatever has happened, as it is to be told to those who wait.
        """
        asked = _Asked(model, batch, batch[0].endpoint or self._endpoints.pick(model))
        self._ledger.unwritten.discard(_fields(batch))  # halves of a micro-batch that has failed are asked again
        self._asked.add(asked)  # before the lock: who waits there can be cancelled, and expires
        self._watch_deadlines(asked)
        try:
            async with nullcontext() if alone else self._locks.hold(model):
                outputs = await self._send(asked, starting)
        except SamphireError as error:
            if (told := await self._what_to_tell(asked, error)) is error:
                raise
            raise told from error
        except Exception as error:
            raise our_error(error) from error
        finally:
            self._asked.discard(asked)
            if asked.clock is not None:
                asked.clock.cancel()
            self._ledger.limits.took(model, time.monotonic() - batch[0].taken_in_at)
        answered_at = time.monotonic()
        self._reloads.has_answered(asked.endpoint, model)
        if not batch[0].streams:  # each of its outputs is checked by itself
            self._check(batch, outputs)
        averages = await self._statistics.averages(asked.endpoint, model, batch[0].version)
        answered = Answered(asked.at, answered_at, len(batch), averages)
        for request in batch:
            request.answered = answered
        return batching.split(batch, outputs)

    async def _send(self, asked: _Asked, starting: Starting | None) -> list[Tensor]:
        if self._ending is not None:
            raise self._ending
        if asked.running.why is not None:
            raise asked.running.why
        batch = asked.batch
        asked.at, asked.timeout_s = time.monotonic(), self._timeout_s(batch)
        # Who is over has waited at the lock until then: its end may be written already.
        self._ledger.unwritten.add(asked.model, _fields([request for request in batch if not request.over]))
        failed = ""
        try:
            if batch[0].streams:
                return await self._streaming.run(batch[0], asked.endpoint, asked.running, asked.timeout_s, starting)
            return await asked.endpoint.infer(batching.merge(batch), asked.timeout_s, asked.running)
        except BaseException as error:
            failed = type(error).__name__
            raise
        finally:
            self._observers.answered(BatchSeen(asked.model, len(batch), time.monotonic() - asked.at, failed))

    async def _what_to_tell(self, asked: _Asked, error: SamphireError) -> SamphireError:
        """The error that those who asked get; what is served is told first what it says of the model."""
        model, endpoint = asked.model, asked.endpoint
        match consequence_of(error).model:
            case Model.SLOW:
                return await self._after_timeout(asked, error)
            case Model.DEAD:
                return await self._reloads.after(error, endpoint, model, asked.at)
            case Model.BUSY:
                self._served.lost(endpoint, model, error.retry_after_s or BUSY_S * random.random())
            case Model.AWAY if self._ending is None:
                await self._served.no_answer(endpoint, model)
            case Model.GONE:
                self._served.lost(endpoint, model)
                return EndpointUnavailableError(str(error))
            case Model.CHANGED:
                signature = asked.batch[0].signature
                if signature is not None and await self._served.has_changed(endpoint, signature):
                    return EndpointUnavailableError(f"model {model!r} has changed on {endpoint.url}: {error}")
        return error

    async def _after_timeout(self, asked: _Asked, error: SamphireError) -> SamphireError:
        waiting = next((request for request in asked.batch if not request.over), None)
        if waiting is None:
            return error
        found = self._time_error(waiting, asked.timeout_s, error)
        if found is error and not await asked.endpoint.is_ready():  # it is not the model that hangs
            self._endpoints.mark_away(asked.endpoint)
            return GivenUpError(f"endpoint {asked.endpoint.url} does not answer")
        return found

    def _check(self, batch: Sequence[Request], outputs: Sequence[Tensor]) -> None:
        signature, infer = batch[0].signature, batch[0].request
        assert signature is not None
        rows = sum(request.rows for request in batch)
        even = len(batch) > 1 or self._served.joins(signature.name)
        check_answer(signature, [output.name for output in infer.outputs], rows, outputs, even=even)

    def _watch_deadlines(self, asked: _Asked) -> None:
        """Give up each member of a micro-batch when its own deadline passes; the others go on."""
        earliest = min([request.times.deadline for request in asked.batch if not request.over], default=inf)
        if earliest != inf:
            left_s = max(0.001, earliest - self._store.clock.now())
            asked.clock = asyncio.get_running_loop().call_later(left_s, self._deadline_passed, asked)

    def _deadline_passed(self, asked: _Asked) -> None:
        self._endings.give_up_late(asked.batch)
        asked.stop_if_over(EndpointTimeoutError())
        self._watch_deadlines(asked)

    def _timeout_s(self, batch: Sequence[Request]) -> float:
        """How long Triton may take: as long as the member that can wait longest, and a stream as long as it goes on."""
        times = batch[0].times  # the limits are those of all members
        deadline_s = max(request.times.deadline for request in batch) - self._store.clock.now()
        most_s = inf if batch[0].streams else self._settings.triton_timeout_s
        return max(0.001, min(most_s, times.limit, times.soft_limit, deadline_s))

    def _time_error(self, request: Request, timeout_s: float, error: SamphireError) -> SamphireError:
        times = request.times
        if isinstance(error, StalledError):
            return error
        if timeout_s == times.soft_limit != inf:
            return TimeLimitError(times.soft_limit, soft=True)
        if timeout_s == times.limit != inf:
            return TimeLimitError(times.limit, soft=False)
        if times.deadline <= self._store.clock.now() + CLOCKS_S:
            return EndpointTimeoutError(f"the deadline has passed while the model worked: {error}")
        return error


def _fields(batch: Sequence[Request]) -> list[str]:
    return [request.claim.field for request in batch]
