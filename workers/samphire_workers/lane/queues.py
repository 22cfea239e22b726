"""The queues that a lane serves: finding them, and finding out what their models are before anything is claimed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any

from samphire import keys
from samphire.errors import SamphireError
from samphire_broker.store import Store
from samphire_workers.endpoints import Endpoints
from samphire_workers.lane.catalogue import Catalogue
from samphire_workers.lane.planner import QueuePlanner
from samphire_workers.lane.wake import QueueWatch

logger = logging.getLogger(__name__)

INTAKE_MODEL = ""
"""What `keys.parse_queue` calls the model of the intake."""

DISCOVER_S = 1.0
SCANS_A_LOOK = 20
"""Steps of a thousand keys: a plain producer's queue for a tenant is found although there are many results."""

LOOKUPS_AT_ONCE = 8


class Queues:
    """The queues that a lane claims from; what it learns goes to the planner and the watch."""

    def __init__(
        self,
        store: Store,
        endpoints: Endpoints,
        catalogue: Catalogue,
        planner: QueuePlanner,
        watch: QueueWatch,
        *,
        in_background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._store = store
        self._endpoints = endpoints
        self._catalogue = catalogue
        self._planner = planner
        self._watch = watch
        self.unseen: set[str] = set()
        """Models that nothing is claimed of before it is known what they are."""
        self._in_background = in_background
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    def serve(self, queues: Collection[str]) -> list[str]:
        """Claim from these queues too, once it is known what their models are; returns those that are new."""
        new = self._planner.add(queues)
        if new:
            self._look_at_models(keys.parse_queue(queue)[0] for queue in new)
        return new

    def _look_at_models(self, models: Iterable[str]) -> None:
        """Find out what models are before anything is claimed of them: of some the order of requests must be kept."""
        new = {model for model in models if model != INTAKE_MODEL and self._catalogue.known(model) is None}
        for model in new - self.unseen:
            self.unseen.add(model)
            self._in_background(self._look_at(model))

    async def _look_at(self, model: str) -> None:
        async with self._lookups:
            await self._endpoints.some_ready.wait()
            with contextlib.suppress(SamphireError):  # away, or unknown: that is found out again when it is claimed
                await self._catalogue.checker(model)
        self.unseen.discard(model)
        self._watch.wake()

    async def discover(self, group: asyncio.TaskGroup, may_claim: Callable[[str], bool]) -> None:
        """Find queues: the SDK names those it uses; a slow scan finds those of plain producers."""
        cursor = 0
        self._watch.add(keys.INTAKE, group, may_claim)
        while True:
            try:
                queues = await self._store.known_queues()
                found: set[str] = set()
                for _ in range(SCANS_A_LOOK):
                    cursor, some = await self._store.find_queues(cursor)
                    found |= some
                    if not cursor:
                        break
            except SamphireError as error:
                logger.warning("queues were not looked up: %s", error, extra={"action": "discovery_failed"})
                queues, found = set(), set()
            try:
                if new := found - queues:
                    await self._store.name_queues(new)
            except SamphireError as error:
                logger.warning("queues were not noted: %s", error, extra={"action": "discovery_failed"})
            if self.serve(queues | found | self._catalogue.queues):
                self._watch.wake()
            for queue in self._planner.queues:
                self._watch.add(queue, group, may_claim)
            await asyncio.sleep(DISCOVER_S)
