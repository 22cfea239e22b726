"""Who is told of tasks while they move: Celery's monitors, metrics.

What they get are records that nobody changes. An observer is called on the lane's event loop, so it must return at
once, and does what takes time elsewhere. One that fails is logged, and the lane goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from msgspec import UnsetType

from samphire.errors import SamphireError
from samphire.wire import keys
from samphire.wire.contract import Headers, InferRequest
from samphire.wire.envelope import describe
from samphire.wire.timings import Timings
from samphire_workers.intake.request import Request

logger = logging.getLogger(__name__)


class TaskSeen(NamedTuple):
    """A task at one moment."""

    claim: str
    task_id: str
    version: str
    attempts: int
    """Those before this one."""
    started_at: float | None
    """In s since 1970, by this machine's clock."""
    at: float
    """When this was seen, at its start if it has one, in s since 1970, by the broker's clock."""
    headers: Headers | None
    infer: InferRequest | None

    @property
    def name(self) -> str:
        """In Celery; "" where the message is not understood."""
        return self.headers.task if self.headers is not None else ""

    @property
    def list_key(self) -> str:
        """Name of the list that it was claimed from."""
        return keys.claim_list(self.claim)

    @property
    def model(self) -> str:
        """As far as it is known."""
        if self.infer is not None:
            return self.infer.model_name
        return keys.parse_queue(keys.split_list(self.list_key)[0])[0]

    def described(self) -> str:
        """The request without its numbers."""
        return describe(self.infer) if self.infer is not None else ""


class BatchSeen(NamedTuple):
    """A call of Triton that has ended."""

    model: str
    tasks: int
    seconds: float
    error: str
    """Name of the error's class; "" for an answer."""


class LaneSeen(NamedTuple):
    """A lane at one moment."""

    held: int
    held_bytes: int
    endpoints: Mapping[str, bool]
    """Whether each answers, by address."""
    breakers: Sequence[tuple[str, str]]
    """Addresses and models whose breakers are open."""


class QueueSeen(NamedTuple):
    """The tasks of one priority of a queue at one moment."""

    queue: str
    priority: int
    depth: int
    oldest_age_s: float | None
    """Since the one that is next was submitted; None where that is not known."""


class Observer:
    """What may be told; each takes what it needs, and returns at once."""

    enabled = True
    """Whether task events are wanted (Celery's `enable_events`)."""
    wants_states = False
    """Whether `looked` and `counted` are wanted."""

    def claimed(self, list_key: str, tasks: int) -> None:
        """Tasks were claimed from a list."""

    def started(self, tasks: Sequence[TaskSeen]) -> None:
        """These begin to run."""

    def answered(self, batch: BatchSeen) -> None:
        """Triton has answered a micro-batch, or has not."""

    def progress(self, task: TaskSeen, fraction: float | None, message: str) -> None:
        """A running task tells how far it is: from 0 to 1, as far as that is known, and in words."""

    def streamed(self, model: str, outputs: int, nbytes: int) -> None:
        """A stream has ended, however; so many outputs and bytes of it are written."""

    def succeeded(self, tasks: Sequence[TaskSeen], timings: Sequence[Timings | UnsetType]) -> None:
        """These have their answers; where the time of each went, if Triton has answered it."""

    def released(self, task: TaskSeen) -> None:
        """A task goes back to its queue."""

    def dropped(self, task: TaskSeen) -> None:
        """A task is not to be run here: it has ended, or is another worker's by now."""

    def failed(self, task: TaskSeen, error: SamphireError, reason: str) -> None:
        """A task ends as a dead letter, for a reason by which these are filtered."""

    def retried(self, task: TaskSeen, error: SamphireError) -> None:
        """An attempt failed; the task will be tried again."""

    def revoked(self, task: TaskSeen, expired: bool) -> None:
        """A task was cancelled, or has expired, and is dropped."""

    def cancelled(self, task_id: str) -> None:
        """A task is cancelled whose message lies in a queue."""

    def settled(self, tasks: int, seconds: float) -> None:
        """The broker has taken so many ends with one call."""

    def lease_lost(self) -> None:
        """The lease of this worker had lapsed."""

    def served(self, model: str) -> None:
        """A model is served that was not known."""

    def looked(self, lane: LaneSeen) -> None:
        """What the lane holds, every second."""

    def counted(self, queues: Sequence[QueueSeen]) -> None:
        """What lies in the queues, every few seconds."""

    def letters(self, count: int) -> None:
        """How many dead letters there are."""

    async def run(self) -> None:
        """What it does beside the lane, for ever or until it is done."""


def seen(request: Request, now: float) -> TaskSeen:
    """A request as observers get it; `now` is the broker's time, in s since 1970."""
    headers = request.envelope.headers if request.envelope is not None else None
    attempts, started_at = request.attempts, request.started_at
    return TaskSeen._make(
        (request.claim.field, request.task_id, request.version, attempts, started_at, now, headers, request.infer)
    )


class Observers:
    """All observers of a lane, told one after the other.

    Args:
        observers: who is told.
        now: the broker's clock, in s since 1970.
    """

    def __init__(self, *observers: Observer, now: Callable[[], float] = time.time) -> None:
        self._all = observers
        self._now = now
        self._calls = {name: _those_who_take(observers, name) for name in _TOLD}
        """By what is told: who takes it, and how."""

    @property
    def want_states(self) -> bool:
        """Whether any of them wants to know what the lane holds, and what lies in the queues."""
        return any(observer.wants_states for observer in self._all)

    def enable(self, wanted: bool) -> None:
        """Send task events to monitors, or none."""
        for observer in self._all:
            observer.enabled = wanted

    def claimed(self, list_key: str, tasks: int) -> None:
        """See `Observer`."""
        self._tell("claimed", list_key, tasks)

    def started(self, requests: Sequence[Request]) -> None:
        """See `Observer`; one call for many tasks, since this is done for every task there is."""
        now = self._now()
        for request in requests:
            request.seen = seen(request, now)
        self._tell("started", [request.seen for request in requests])

    def answered(self, batch: BatchSeen) -> None:
        """See `Observer`."""
        self._tell("answered", batch)

    def progress(self, request: Request, fraction: float | None, message: str) -> None:
        """See `Observer`."""
        self._tell_of("progress", request, fraction, message)

    def streamed(self, model: str, outputs: int, nbytes: int) -> None:
        """See `Observer`."""
        self._tell("streamed", model, outputs, nbytes)

    def succeeded(self, requests: Sequence[Request]) -> None:
        """See `Observer`."""
        tasks = [request.seen or seen(request, self._now()) for request in requests]
        self._tell("succeeded", tasks, [request.timings for request in requests])

    def released(self, request: Request) -> None:
        """See `Observer`."""
        self._tell_of("released", request)

    def dropped(self, request: Request) -> None:
        """See `Observer`."""
        self._tell_of("dropped", request)

    def failed(self, request: Request, error: SamphireError, reason: str) -> None:
        """See `Observer`."""
        self._tell_of("failed", request, error, reason)

    def retried(self, request: Request, error: SamphireError) -> None:
        """See `Observer`."""
        self._tell_of("retried", request, error)

    def revoked(self, request: Request, *, expired: bool) -> None:
        """See `Observer`."""
        self._tell_of("revoked", request, expired)

    def cancelled(self, task_id: str) -> None:
        """See `Observer`."""
        self._tell("cancelled", task_id)

    def settled(self, tasks: int, seconds: float) -> None:
        """See `Observer`."""
        self._tell("settled", tasks, seconds)

    def lease_lost(self) -> None:
        """See `Observer`."""
        self._tell("lease_lost")

    def served(self, model: str) -> None:
        """See `Observer`."""
        self._tell("served", model)

    def looked(self, lane: LaneSeen) -> None:
        """See `Observer`."""
        self._tell("looked", lane)

    def counted(self, queues: Sequence[QueueSeen]) -> None:
        """See `Observer`."""
        self._tell("counted", queues)

    def letters(self, count: int) -> None:
        """See `Observer`."""
        self._tell("letters", count)

    async def run(self) -> None:
        """Run what each observer does beside the lane."""
        await asyncio.gather(*(self._run(observer) for observer in self._all))

    async def _run(self, observer: Observer) -> None:
        try:
            await observer.run()
        except Exception:
            logger.exception(
                "%s has ended: what it shows stands still, the lane goes on",
                type(observer).__name__,
                extra={"action": "observer_failed"},
            )

    def _tell(self, what: str, *told: object) -> None:
        for observer, call in self._calls[what]:
            try:
                call(*told)
            except Exception:
                logger.exception(
                    "%s has failed in %s(): what it shows lacks that, the lane goes on",
                    type(observer).__name__,
                    what,
                    extra={"action": "observer_failed"},
                )

    def _tell_of(self, what: str, request: Request, *told: object) -> None:
        if self._calls[what]:
            self._tell(what, request.seen or seen(request, self._now()), *told)


_TOLD = [name for name, member in vars(Observer).items() if callable(member) and name not in ("run", "__init__")]


def _those_who_take(observers: Sequence[Observer], name: str) -> list[tuple[Observer, Callable[..., None]]]:
    base = getattr(Observer, name)
    return [(observer, getattr(observer, name)) for observer in observers if getattr(type(observer), name) is not base]


NOBODY = Observers()
"""Where nobody watches."""
