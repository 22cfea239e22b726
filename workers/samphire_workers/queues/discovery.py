"""The queues that a lane serves: finding them, and finding out what their models are before anything is claimed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from samphire.errors import SamphireError
from samphire.wire import keys
from samphire_broker.store import Looked, Store
from samphire_workers.intake.served import ServedModels
from samphire_workers.queues.round_robin import RoundRobin
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

INTAKE_MODEL = ""
"""What `keys.parse_queue` calls the model of the intake."""

DISCOVER_S = 1.0
DISCOVER_MAX_S = 5.0
REST_TIMES = 20
"""Between two looks at the names, in the time that a look takes."""
SCANS_A_LOOK = 20
"""Steps of a thousand keys: a plain producer's queue for a tenant is found although there are many results."""

LOOKUPS_AT_ONCE = 8

# To look a member up in its class takes longer than what is done with it, and this is done for every queue.
_HOLDS_SOMETHING, _FORGOTTEN = Looked.HOLDS_SOMETHING, Looked.FORGOTTEN

FORGET_S = 60.0
"""A queue that is empty and was not used for so long is forgotten, until its next message."""
COLD_S = 2.0
"""Where there are many, claims look no more into one that is empty and was not used for so long."""
LOOK_S = 0.25
LOOKS_A_TURN = 4
QUEUES_A_LOOK = 500

FORGOTTEN_KEPT = 50_000
"""Names of forgotten queues that are kept: what a plain producer sends there is seen sooner than a scan finds it."""
FORGOTTEN_LOOK_S = 1.0
"""Between two looks into `QUEUES_A_LOOK` of them."""


class QueueDiscovery:
    """The queues that a lane claims from; what it learns goes to the round robin and the watch."""

    def __init__(
        self,
        store: Store,
        endpoints: Endpoints,
        served: ServedModels,
        round_robin: RoundRobin,
        watch: QueueWatch,
        work: Work,
    ) -> None:
        self._store = store
        self._endpoints = endpoints
        self._served = served
        self._round_robin = round_robin
        self._watch = watch
        self.unseen: set[str] = set()
        """Models that nothing is claimed of before it is known what they are."""
        self._work = work
        self._fixed = {keys.INTAKE}
        """Queues that are always served, and of no model."""
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._looking = asyncio.Lock()
        self._cursor = 0
        self._used: set[str] = set()
        """Queues that were used since the last look at all names."""
        self._since: dict[str, float] = {}
        """For each queue the time since when it is not used; nobody knows that of one that was just found."""
        self.on_deliveries: Callable[[str, bool], None] = lambda queue, is_used: None
        """Called with a queue of deliveries that is found, or (False) forgotten."""
        self._turn: deque[str] = deque()
        """The same queues, in the order in which they are looked into."""
        self._forgotten: dict[str, None] = {}
        """Names of queues that are forgotten, in the order in which they are looked into."""
        self._next_look_at_forgotten = 0.0
        self.serve(self._fixed)

    def serve(self, queues: Collection[str]) -> None:
        """Claim from these queues, which are used just now, once it is known what their models are."""
        if queues:
            now = time.monotonic()
            self._serve(queues, now)
            self._take_up(queues)
            self._used.update(queue for queue in queues if queue not in self._fixed)
            self._since.update(dict.fromkeys(queues, now))

    def serve_always(self, queues: Collection[str]) -> None:
        """Claim from these, which are of no model, however long they are empty."""
        self._fixed.update(queues)
        self.serve(queues)

    def _take_up(self, queues: Collection[str]) -> None:
        if back := self._round_robin.take_up(queues):
            self._look_at_models(keys.parse_queue(queue)[0] for queue in back)

    def _serve(self, queues: Collection[str], since: float, may_be_empty: Collection[str] = ()) -> list[str]:
        """Returns those that are new. Nobody asks for the models of those that may be empty, where there are many."""
        new = self._round_robin.add(queues)
        for queue in new:
            self._since[queue] = since
            self._forgotten.pop(queue, None)
            if keys.endpoint_of(queue) is not None:
                self.on_deliveries(queue, True)
        self._turn.extend(new)
        aside = set(new).intersection(may_be_empty) if new and self._round_robin.are_many else set[str]()
        self._round_robin.set_aside(aside)
        if new:
            without = aside | self._fixed
            self._look_at_models(keys.parse_queue(queue)[0] for queue in new if queue not in without)
        return new

    def _look_at_models(self, models: Iterable[str]) -> None:
        """Find out what models are before anything is claimed of them: of some the order of requests must be kept."""
        new = {
            model
            for model in models
            if model != INTAKE_MODEL and not keys.is_of_deliveries(model) and self._served.known(model) is None
        }
        for model in new - self.unseen:
            self.unseen.add(model)
            self._work.keep(self._look_at(model))

    async def _look_at(self, model: str) -> None:
        async with self._lookups:
            await self._endpoints.some_ready.wait()
            with contextlib.suppress(SamphireError):  # away, or unknown: that is found out again when it is claimed
                await self._served.checker(model)
        self.unseen.discard(model)
        self._watch.wake()

    async def discover(self, may_claim: Callable[[str], bool]) -> None:
        """Find queues: the SDK names those it uses; a slow scan finds those of plain producers."""
        for queue in self._fixed - {keys.WEBHOOKS}:
            self._watch.add(queue, self._work, may_claim)
        while True:
            began = time.monotonic()
            async with self._looking:  # else what was read before it was forgotten would be served again
                await self._find()
            for queue in itertools.takewhile(lambda _: not self._watch.is_full, self._round_robin.in_use):
                if not keys.is_of_deliveries(keys.parse_queue(queue)[0]):  # who puts a delivery there says so
                    self._watch.add(queue, self._work, may_claim)
            # The more names there are, the longer it takes: it is not to be all that this worker does.
            await asyncio.sleep(min(max(DISCOVER_S, REST_TIMES * (time.monotonic() - began)), DISCOVER_MAX_S))

    async def _find(self) -> None:
        used, self._used = self._used, set()
        try:
            queues = await self._store.known_queues()
            found: set[str] = set()
            for _ in range(SCANS_A_LOOK):
                self._cursor, some = await self._store.find_queues(self._cursor)
                found |= some
                if not self._cursor:
                    break
        except SamphireError as error:
            logger.warning(
                "new queues are not found now; it is tried again: %s", error, extra={"action": "discovery_failed"}
            )
            queues, found = set(), set()
        try:
            if new := (found | used) - queues:  # another worker may have forgotten what this one uses
                await self._store.name_queues(new)
        except SamphireError as error:
            logger.warning(
                "other workers are not told of new queues now; it is tried again: %s",
                error,
                extra={"action": "discovery_failed"},
            )
        self._take_up(found)
        full = found | self._served.queues
        if self._serve(queues | full, time.monotonic() - COLD_S, may_be_empty=queues - full):
            self._watch.wake()

    async def look(self) -> None:
        """Look which queues are empty, so that claims need not, and forget those that nobody uses, for ever."""
        while True:
            try:
                async with self._looking:
                    for _ in range(min(LOOKS_A_TURN, -(-len(self._turn) // QUEUES_A_LOOK))):
                        await self._look_at_some()
                    await self._look_at_forgotten()
            except SamphireError as error:
                logger.warning(
                    "queues are not looked into, so plain tasks may wait; it is tried again: %s",
                    error,
                    extra={"action": "look_failed"},
                )
            await asyncio.sleep(LOOK_S)

    async def _look_at_some(self) -> None:
        now = time.monotonic()
        old, others = list[str](), list[str]()
        for _ in range(min(QUEUES_A_LOOK, len(self._turn))):
            queue = self._turn.popleft()
            self._turn.append(queue)
            unused_s = now - self._since[queue]
            if queue in self._fixed or queue in self._served.queues:
                continue
            if unused_s > FORGET_S:
                old.append(queue)
            elif unused_s > COLD_S and self._round_robin.are_many:
                others.append(queue)
        if not old and not others:
            return
        verdicts = await self._store.look_at_queues(old, others)
        # A message may have come since the broker has answered, and then it has told so.
        answered = [
            (queue, verdict)
            for queue, verdict in zip([*old, *others], verdicts, strict=True)
            if self._since[queue] < now
        ]
        self._note(answered, now)

    async def _look_at_forgotten(self) -> None:
        """Serve those that hold something again: plain producers name no queue."""
        now = time.monotonic()
        if not self._forgotten or now < self._next_look_at_forgotten:
            return
        self._next_look_at_forgotten = now + FORGOTTEN_LOOK_S
        queues = list(itertools.islice(self._forgotten, QUEUES_A_LOOK))
        for queue in queues:  # to the end
            del self._forgotten[queue]
            self._forgotten[queue] = None
        verdicts = await self._store.look_at_queues([], queues)
        full = [queue for queue, verdict in zip(queues, verdicts, strict=True) if verdict is _HOLDS_SOMETHING]
        if full:
            self.serve(full)
            self._watch.wake()

    def _note(self, answered: Collection[tuple[str, Looked]], now: float) -> None:
        full = [queue for queue, verdict in answered if verdict is _HOLDS_SOMETHING]
        for queue in full:
            self._since[queue] = now - COLD_S
        self._take_up(full)
        if self._round_robin.are_many:
            self._round_robin.set_aside([queue for queue, verdict in answered if verdict is not _HOLDS_SOMETHING])
        if gone := {queue for queue, verdict in answered if verdict is _FORGOTTEN}:
            self._round_robin.forget(gone)
            self._watch.forget(gone)
            for queue in gone:
                del self._since[queue]
                self._forgotten[queue] = None
                if keys.endpoint_of(queue) is not None:
                    self.on_deliveries(queue, False)
            for queue in list(itertools.islice(self._forgotten, max(0, len(self._forgotten) - FORGOTTEN_KEPT))):
                del self._forgotten[queue]
            self._turn = deque(queue for queue in self._turn if queue not in gone)
            if not self._round_robin.are_many:
                self._take_up(self._turn)
            logger.debug("%d queues are forgotten", len(gone), extra={"action": "forgotten"})
