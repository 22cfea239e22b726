"""Which endpoints of webhooks this worker leads, and how much may be sent to each now.

One worker at a time leads an endpoint, as with models that keep state: it alone claims from the endpoint's queue, so
its limits, its breaker and the one delivery that a half-open breaker lets through hold over all workers. A leader
that is lost is none any more once what it held is back in its queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from samphire.errors import SamphireError
from samphire.wire import keys
from samphire.wire.endpoints import AD_HOC
from samphire_broker.settings import Settings
from samphire_broker.store import Led, Store
from samphire_broker.webhooks.endpoint import Endpoint
from samphire_workers.claims.ledger import Ledger
from samphire_workers.outbox.book import EndpointBook
from samphire_workers.queues.wake import QueueWatch
from samphire_workers.webhooks.health import Health, Rate, decode_health

logger = logging.getLogger(__name__)

LOOK_S = 0.25
LOOK_AGAIN_S = 1.0
"""Between two looks at who leads one endpoint."""
LOOKS_A_ROUND = 100
REMOVED_AT_ONCE = 256
"""Deliveries to an endpoint that was removed become dead letters so many at a time."""
PAUSE_S = 15.0
"""How long nothing is sent after a fault of this side's: a secret that cannot be read."""


class LedEndpoint:
    """An endpoint whose queue is known here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = keys.parse_queue(keys.delivery_queue(name))[0]
        self.is_led = self.is_own = False
        self.look_at = 0.0
        self.health = Health()
        self.rate: Rate | None = None
        self.paused_until = 0.0
        """By the monotonic clock."""
        self.was_gone = False
        """It has answered 410, and what is set of it does not say so yet."""
        self.timer: asyncio.TimerHandle | None = None


class Leading:
    """The endpoints that this worker leads, or would.

    Args:
        settings, store, ledger: of the lane.
        book: what is set of endpoints.
        watch: is woken when there may be something to claim.
    """

    def __init__(self, settings: Settings, store: Store, ledger: Ledger, book: EndpointBook, watch: QueueWatch) -> None:
        self._settings = settings
        self._store = store
        self._ledger = ledger
        self._book = book
        self._watch = watch
        self._known: dict[str, LedEndpoint] = {}
        """By the name that the claim loop has for a queue's model."""
        self._gone: set[str] = set()
        """Those whose queues are forgotten: their lead is given back."""
        self._some = asyncio.Event()
        self._stopping = False
        book.on_change = watch.wake

    def note(self, queue: str, is_used: bool) -> None:
        """A queue of deliveries is known now; or it is empty, and nobody uses it."""
        name = keys.endpoint_of(queue)
        if name is None:
            return
        found = LedEndpoint(name)
        if is_used:
            self._known.setdefault(found.model, found)
            self._gone.discard(found.model)
            self._some.set()
        else:
            self._gone.add(found.model)

    def get(self, model: str) -> LedEndpoint | None:
        """An endpoint, by what the claim loop calls the model of its queue."""
        return self._known.get(model)

    @property
    def room(self) -> int:
        """How many deliveries more this worker may have under way."""
        return self._settings.webhook_inflight_max - self._ledger.deliveries

    def open_queues(self) -> set[str]:
        """The queues of those that may be sent to now."""
        return {keys.delivery_queue(led.name) for model, led in self._known.items() if self.room_of(model, 1)}

    def closed(self) -> set[str]:
        """Models of those that nothing is claimed for now."""
        if not self._known:
            return set()
        return {model for model in self._known if not self.room_of(model, 1)}

    def room_of(self, model: str, most: int) -> int:
        """How many deliveries to claim for an endpoint now."""
        led = self._known[model]
        if not led.is_led or not self._book.is_read or time.monotonic() < led.paused_until:
            return 0
        endpoint = self._book.get(led.name)
        if endpoint is None and not led.name.startswith(AD_HOC):
            return min(most, REMOVED_AT_ONCE) if self._book.is_gone(led.name) else 0
        if endpoint is not None and (endpoint.disabled or led.was_gone):
            return 0
        if endpoint is not None and endpoint.enabled_at > led.health.last_failure_at:
            led.health.succeeded()  # an operator says so
        room = min(most, self._at_once(led, endpoint) - self._ledger.limits.held(model))
        rate = self._rate_of(led, endpoint.rate_per_s if endpoint is not None else 0.0)
        if room <= 0 or rate is None:
            return max(0, room)
        allowed = rate.allowed(time.monotonic())
        if not allowed:
            self.wake_in(led, rate.next_s())
        return min(room, allowed)

    def _at_once(self, led: LedEndpoint, endpoint: Endpoint | None) -> int:
        """How many deliveries may be under way to an endpoint."""
        concurrency = (endpoint.concurrency if endpoint is not None else 0) or self._settings.webhook_concurrency
        allowed = led.health.may_send(self._store.clock.now())
        return concurrency if allowed is None else min(concurrency, allowed)

    def _rate_of(self, led: LedEndpoint, per_s: float) -> Rate | None:
        if not per_s:
            led.rate = None
        elif led.rate is None or led.rate.per_s != per_s:
            led.rate = Rate(per_s)
        return led.rate

    async def look_at_endpoints(self) -> None:
        """See what is set of endpoints now, before more is claimed for them."""
        await self._book.look()

    def claimed(self, model: str, count: int) -> None:
        """So many deliveries were claimed."""
        led = self._known.get(model)
        if led is not None and led.rate is not None:
            led.rate.take(count)

    def pause(self, led: LedEndpoint) -> None:
        """Send nothing for a while, for a reason that is not the endpoint's."""
        led.paused_until = time.monotonic() + PAUSE_S
        self.wake_in(led, PAUSE_S)

    def wake_in(self, led: LedEndpoint, seconds: float) -> None:
        """Look for something to claim when it may be sent again."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, seconds) + 0.001
        if led.timer is not None and not led.timer.cancelled() and loop.time() < led.timer.when() <= at:
            return
        if led.timer is not None:
            led.timer.cancel()
        led.timer = loop.call_at(at, self._watch.wake)

    async def lead(self) -> None:
        """Lead what nobody leads, and give back what is not used any more, for ever."""
        while True:
            self._some.clear()
            for model in list(self._gone):
                await self._give_back(model)
            now = time.monotonic()
            due = sorted((led for led in self._known.values() if led.look_at <= now), key=lambda led: led.look_at)
            due = due[:LOOKS_A_ROUND]  # those that have waited longest
            for led in due:
                led.look_at = time.monotonic() + LOOK_AGAIN_S
                if await self._look_at(led):
                    self._watch.wake()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._some.wait()

    async def _look_at(self, led: LedEndpoint) -> bool:
        """Whether there is an endpoint more to claim for."""
        if self._stopping:
            return False
        try:
            verdict = await self._store.lead(led.model, is_alone=led.is_led)
            if verdict is not Led.NOT_HERE and not led.is_own:
                led.health = await self._health_of(led.name)
        except SamphireError as error:
            logger.warning(
                "who leads the webhook endpoint %s is not known, so nothing is sent there now: %s",
                led.name,
                error,
                extra={"action": "lead_failed"},
            )
            return False
        led.is_own = verdict is not Led.NOT_HERE
        was_led, led.is_led = led.is_led, verdict is Led.ALONE
        if verdict is Led.BESIDE_OTHERS:
            led.look_at = time.monotonic() + LOOK_S
        if led.is_led and led.health.waits_s(self._store.clock.now()) > 0:
            self.wake_in(led, led.health.waits_s(self._store.clock.now()))
        return led.is_led and not was_led

    async def _health_of(self, name: str) -> Health:
        raw = await self._store.endpoint_health(name)
        try:
            return decode_health(raw) if raw else Health()
        except msgspec.MsgspecError:
            return Health()

    async def _give_back(self, model: str) -> None:
        led = self._known.get(model)
        if led is None:
            self._gone.discard(model)
            return
        if self._ledger.limits.held(model):
            return
        if not await self._lead_no_more(led):
            return  # it is tried again
        if led.timer is not None:
            led.timer.cancel()
        if model in self._gone:
            self._gone.discard(model)
            del self._known[model]

    async def stop(self) -> None:
        """Claim nothing more: another worker may lead, once what is held here has ended."""
        self._stopping = True
        for led in self._known.values():
            if not await self._lead_no_more(led):
                return  # whoever takes over does so once this worker has left

    async def _lead_no_more(self, led: LedEndpoint) -> bool:
        """Claim nothing more for an endpoint, and tell the broker so; False where the broker is not reached."""
        led.is_led = False
        if led.is_own:
            try:
                await self._store.lead(led.model, give_back=True)
            except SamphireError:
                return False
        return True
