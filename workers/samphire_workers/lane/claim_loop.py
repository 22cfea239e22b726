"""The claim loop: whether to claim now, from which queues, and how much."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from samphire.errors import BrokerRightError, BrokerUnavailableError
from samphire.transport.repeat import Pauses
from samphire.wire import keys
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed, LeaseLostError, Store
from samphire_workers.claims.ledger import Ledger
from samphire_workers.inference.dispatcher import Dispatcher
from samphire_workers.inference.sequences import Sequences
from samphire_workers.intake.request import home_of
from samphire_workers.intake.served import ServedModels
from samphire_workers.lane.sorting import Sorter
from samphire_workers.monitoring.observers import Observers
from samphire_workers.queues.discovery import INTAKE_MODEL, QueueDiscovery
from samphire_workers.queues.round_robin import RoundRobin
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.repeat import RETRY_CAP_S, RETRY_S, RIGHT_RETRY_S
from samphire_workers.settlement.endings import Endings
from samphire_workers.triton.endpoints import Endpoints
from samphire_workers.unexpected import ShortageError
from samphire_workers.webhooks.leading import Leading

logger = logging.getLogger(__name__)

IDLE_CHECK_S = 0.25
"""An idle lane that nothing woke looks into the queues again after this long: a plain producer's message of
another priority than the highest wakes nobody."""

LOOK_EVERYWHERE_S = 0.05
"""A lane that is woken for one queue again and again looks into all of them after this long."""

ADOPT_S = 5.0
"""A claim that the broker carried out after its caller had given up is found after this long."""

SHORTAGE_REST_S = 1.0
RESTS_MAX = 8
"""Rests in a row without a task that was done in between: then the worker is of no use."""


class ClaimLoop:
    """Claims for a lane, as long as it runs."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        endpoints: Endpoints,
        served: ServedModels,
        watch: QueueWatch,
        round_robin: RoundRobin,
        discovery: QueueDiscovery,
        ledger: Ledger,
        endings: Endings,
        dispatcher: Dispatcher,
        sequences: Sequences,
        leading: Leading,
        sorter: Sorter,
        observers: Observers,
    ) -> None:
        self._settings = settings
        self._store = store
        self._endpoints = endpoints
        self._served = served
        self._watch = watch
        self._round_robin = round_robin
        self._discovery = discovery
        self._ledger = ledger
        self._endings = endings
        self._dispatcher = dispatcher
        self._sequences = sequences
        self._leading = leading
        self._sorter = sorter
        self._observers = observers
        self._more = False
        """The last claim may have left something in the queues it looked into."""
        self._looked_everywhere = 0.0
        self._shortages = 0
        """As of the last round."""
        self._rests = 0
        self._pauses = Pauses(RETRY_S, RETRY_CAP_S)
        self._stopping = False

    def stop(self) -> None:
        """Claim nothing more."""
        self._stopping = True
        self._watch.wake()

    async def run(self) -> None:
        """Claim until `stop`."""
        adopt = True  # an earlier lane of this worker may have left claims
        adopted_at = 0.0
        short_rounds = 0
        while not self._stopping:
            named = await self._hear()
            await self._rest_if_short()
            try:
                if not self._store.clock.is_known:
                    await self._store.clock.look()
                # Also while no endpoint is ready: what a lost reply has left here belongs back into its queue.
                if adopt or time.monotonic() - adopted_at > ADOPT_S:
                    claimed = await self._store.adopt(self._ledger.fields())
                    adopt, adopted_at, self._more = False, time.monotonic(), True
                elif self._endpoints.some_ready.is_set():
                    claimed = await self._claim(named)
                else:  # deliveries need no Triton
                    claimed = await self._claim(self._leading.open_queues() | {keys.WEBHOOKS}, only_these=True)
            except (BrokerUnavailableError, LeaseLostError) as error:
                # The reply of a claim may be lost: what it moved is found in the in-flight hash.
                adopt = True
                logger.warning(
                    "nothing is claimed now; it is tried again: %s",
                    error,
                    extra={"action": "claim_failed"},
                )
                await asyncio.sleep(self._pauses.next_s())
                continue
            except BrokerRightError as error:  # a script has written nothing then
                logger.error(
                    "nothing is claimed: %s. Give the worker's user that right; it is tried again every %.0f s",
                    error,
                    RIGHT_RETRY_S,
                    extra={"action": "right_missing"},
                )
                await asyncio.sleep(RIGHT_RETRY_S)
                continue
            self._pauses.reset()
            for claim in claimed:
                self._ledger.add(claim)
            await self._sorter.take_in(claimed)
            if self._more:
                short_rounds = 0
                await asyncio.sleep(0)  # let what was claimed get under way before more is claimed
                continue
            short_rounds += 1
            if short_rounds >= self._round_robin.rounds:
                short_rounds = 0
                await self._watch.wait(IDLE_CHECK_S)

    async def _hear(self) -> set[str]:
        """What the wake-ups since the last round have named: queues to look into, none for all."""
        heard, named = self._watch.clear()  # before looking, so that no wake-up is lost
        self._discovery.serve(heard)  # a queue may be new
        if keys.WEBHOOKS in heard:  # so says whoever changes an endpoint
            await self._leading.look_at_endpoints()
        return named

    async def _rest_if_short(self) -> None:
        """Claim nothing for a while where this worker is short of something; where that does not end, end instead."""
        shortages = self._endings.shortages
        if shortages > self._shortages:
            self._rests += 1
            if self._rests > RESTS_MAX:
                raise ShortageError(f"{shortages} tasks in a row could not be done")
            await asyncio.sleep(SHORTAGE_REST_S)
        elif not shortages:
            self._rests = 0
        self._shortages = shortages

    async def _claim(self, named: set[str], *, only_these: bool = False) -> list[Claimed]:
        """Claim from the queues that a wake-up named, which is quicker, but every so often from all.

        `only_these`: they are queues of deliveries, and nothing else can be done now.
        """
        now = time.monotonic()
        if now - self._looked_everywhere > LOOK_EVERYWHERE_S and not only_these:
            named = set()
        if not named:
            self._looked_everywhere = now
        busy = self._dispatcher.busy()
        room = min(self._settings.claim_max, self._settings.inflight_max - self._ledger.tasks)
        room_bytes = self._settings.inflight_max_bytes // 2 - self._ledger.nbytes
        self._more = False
        held_up = bool(busy) or room <= 0 or room_bytes <= 0
        if only_these or (room <= 0 and (named := self._leading.open_queues())):
            room = self._settings.claim_max  # deliveries have room of their own
        # For queues that this claim does not look into, the earlier answer stands.
        self._ledger.room_is_wanted = held_up or (bool(named) and self._ledger.room_is_wanted)
        away = self._endpoints.away() - self._served.given_up()
        skipped = busy | away | self._discovery.unseen | self._sequences.not_led()
        skipped |= self._leading.closed()
        plan = self._round_robin.plan(room, skipped, named)
        if room <= 0 or room_bytes <= 0 or not plan.turns:
            return []
        rooms = self._rooms(plan.models, room)
        claimed = await self._store.claim(plan.turns, rooms, room, room_bytes)
        # Fewer than there was room for: the queues that were looked into are empty now, or have had their part.
        self._more = len(claimed) == room or self._store.cut_short
        self._discovery.serve({keys.split_list(claim.list_key)[0] for claim in claimed})
        given: Counter[str] = Counter()
        for list_key, tasks in Counter(claim.list_key for claim in claimed).items():
            given[home_of(list_key)[0]] += tasks
            self._observers.claimed(list_key, tasks)
        for model in filter(keys.is_of_deliveries, given):
            self._leading.claimed(model, given[model])
        full = any(given[model] >= part for model, part in zip(plan.models, rooms, strict=True))
        self._ledger.room_is_wanted |= full or sum(len(claim.message) for claim in claimed) >= room_bytes
        return claimed

    def _rooms(self, models: Sequence[str], room: int) -> list[int]:
        """How many tasks of each model to claim, and deliveries of each endpoint.

        The places for deliveries are divided: an endpoint that has nothing must not take all of them.
        """
        rooms: list[int] = []
        left = sum(self._leading.get(model) is not None for model in models)
        deliveries = max(0, self._leading.room)
        for model in models:
            if model == INTAKE_MODEL:
                rooms.append(room)
            elif self._leading.get(model) is not None:
                rooms.append(max(0, self._leading.room_of(model, -(-deliveries // left))))
                deliveries -= rooms[-1]
                left -= 1
            else:
                rooms.append(self._ledger.limits.room(model))
        return rooms

    def may_claim(self, queue: str) -> bool:
        """Whether a message in a queue would be claimed now."""
        model, _ = keys.parse_queue(queue)
        if model in self._discovery.unseen or model in self._sequences.not_led():
            return False
        if self._endpoints.is_away(model) and model not in self._served.given_up():
            return False
        return not self._dispatcher.is_busy(model)
