"""The ledger: what a lane holds, claimed and not yet settled, and how it goes back to its queues.

Everything that takes a claim, ends it or gives it back goes through here, so there is one place that knows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from samphire.errors import SamphireError
from samphire.wire import keys
from samphire_broker.store import Claimed, Store
from samphire_workers.claims.limits import AdaptiveLimits
from samphire_workers.claims.unwritten import Unwritten
from samphire_workers.intake.request import Request, home_of
from samphire_workers.monitoring.observers import Observers
from samphire_workers.queues.discovery import QueueDiscovery
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.repeat import persist


class Order(Protocol):
    """What keeps requests of sequences in their order, also when they go back."""

    def went_back(self, request: Request) -> list[Request]:
        """A request of a sequence goes back to its queue: those behind it, which must go with it, in their order."""

    def refuse(self, request: Request, error: SamphireError) -> None:
        """Fail a request that cannot be asked."""


class Ledger:
    """The claims of a lane, their requests as far as they are read, and their bytes.

    Args:
        store: where claims are given back.
        limits: how many of each model may be held.
        discovery: is told of queues that something goes back to.
        watch: is woken when there is room again.
        observers: are told of what goes back.
    """

    def __init__(
        self, store: Store, limits: AdaptiveLimits, discovery: QueueDiscovery, watch: QueueWatch, observers: Observers
    ) -> None:
        self._store = store
        self._discovery = discovery
        self._watch = watch
        self._observers = observers
        self._claims: dict[str, tuple[str, int]] = {}
        """Model and bytes, by claim."""
        self._requests: dict[str, Request] = {}
        self.limits = limits
        self.unwritten = Unwritten()
        """What has been at Triton, and whose end is not on the broker yet."""
        self.nbytes = 0
        self.deliveries = 0
        """Those that are deliveries of webhooks, which take no room of other tasks."""
        self.room_is_wanted = False
        """The last claim left out what there was no room for."""
        self.order: Order
        """Set by what keeps it, before anything is held."""

    def __len__(self) -> int:
        return len(self._claims)

    def fields(self) -> set[str]:
        """The claims."""
        return set(self._claims)

    def requests(self) -> list[Request]:
        """Those that are read."""
        return list(self._requests.values())

    def request(self, field: str) -> Request | None:
        """The request of a claim, if it is still held."""
        return self._requests.get(field)

    def some_of(self, model: str) -> bool:
        """Whether there are any of a model."""
        return any(held == model for held, _ in self._claims.values())

    @property
    def tasks(self) -> int:
        """How many there are beside deliveries."""
        return len(self._claims) - self.deliveries

    def add(self, claim: Claimed) -> None:
        """It was claimed."""
        model, _ = home_of(claim.list_key)
        self.deliveries += keys.is_of_deliveries(model)
        self._claims[claim.field] = (model, len(claim.message))
        self.nbytes += len(claim.message)
        self.limits.claimed(model)

    def has_read(self, request: Request) -> None:
        """The request of a claim is read."""
        self._requests[request.claim.field] = request

    def let_go(self, fields: Sequence[str]) -> None:
        """They are settled, or back in their queues."""
        self.unwritten.discard(fields)
        for field in fields:
            if field not in self._claims:
                continue
            model, nbytes = self._claims.pop(field)
            self.deliveries -= keys.is_of_deliveries(model)
            self._requests.pop(field, None)
            self.nbytes -= nbytes
            self.limits.let_go(model)
        self.has_room()

    def has_room(self) -> None:
        """There may be room again for what the last claim left out."""
        if self.room_is_wanted:
            self._watch.wake()

    async def release(self, requests: Sequence[Request], *, attempt: str = "", endpoint_died: bool = False) -> None:
        """Hand requests back to the heads of their queues.

        Args:
            requests: that are held; of a sequence those behind it go with it.
            attempt: what is kept of it, JSON, if it counts as an attempt of those that had started.
            endpoint_died: it died while it worked on them.
        """
        if len(requests) == 1 and requests[0].infer is not None and requests[0].sequence_id is not None:
            together = [*requests, *self.order.went_back(requests[0])]
            requests = sorted(together, key=lambda request: keys.claim_number(request.claim.field))
        fields = [request.claim.field for request in requests]
        for request in requests:
            self._observers.released(request)
        await self.hand_back(
            requests, lambda: self._store.release(fields, attempt=attempt, endpoint_died=endpoint_died)
        )

    async def hand_back(self, requests: Sequence[Request], action: Callable[[], Awaitable[int]]) -> None:
        """Let requests go once the broker has taken them back; `action` gives them to it, and may be repeated."""
        try:
            await persist(action)
        except SamphireError as error:  # the broker does not take them: they must not be stuck here
            for request in requests:
                self.order.refuse(request, error)
        else:
            self._discovery.serve({keys.split_list(request.claim.list_key)[0] for request in requests})
            self.let_go([request.claim.field for request in requests])
