"""Deliveries: each is a task that sends one webhook to its endpoint, again and again by a schedule until it arrives.

What is the receiver's counts as an attempt, and for the endpoint's health: no connection, a certificate, a status, no
answer in time. What is this side's does not: a worker that ends, a lost lease, a secret that cannot be read.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any
from urllib.parse import quote

import msgspec

from samphire.errors import SamphireError, TransientError
from samphire.webhooks.signing import SigningKey, signed_content
from samphire.wire.contract import DeliveryRequest
from samphire.wire.endpoints import AD_HOC
from samphire_broker.settings import Settings
from samphire_broker.store import Delivery, Store
from samphire_broker.webhooks.endpoint import Disabled, Endpoint, encode, public_of
from samphire_broker.webhooks.secrets import SecretUnreadableError
from samphire_workers.claims.ledger import Ledger
from samphire_workers.intake.request import Request
from samphire_workers.monitoring.observers import Observers
from samphire_workers.outbox.book import EndpointBook
from samphire_workers.outbox.payload import iso_time
from samphire_workers.repeat import persist
from samphire_workers.settlement import outcome
from samphire_workers.settlement.endings import Endings
from samphire_workers.unexpected import our_error
from samphire_workers.webhooks.health import THROTTLED_MOST_S
from samphire_workers.webhooks.leading import Leading, LedEndpoint
from samphire_workers.webhooks.sending import Answer, Sender
from samphire_workers.work import Work

logger = logging.getLogger(__name__)

THROTTLES = (429, 502, 504)
GONE = 410
JITTER = 0.2
"""Waits are longer than the schedule says by up to this part."""
USER_AGENT = "Samphire-Webhooks/1"


class DeliveryFailedError(TransientError):
    """A delivery has not arrived."""

    default_message = "The delivery has not arrived."


class Deliveries:
    """Delivers webhooks.

    Args:
        settings, store, ledger, work: of the lane.
        endings: writes ends.
        observers: are told of them.
        book: what is set of endpoints.
        leading: which of them this worker leads, and how they fare.
        worker: what this worker calls itself.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        ledger: Ledger,
        work: Work,
        endings: Endings,
        observers: Observers,
        book: EndpointBook,
        leading: Leading,
        worker: str,
    ) -> None:
        self._settings = settings
        self._store = store
        self._ledger = ledger
        self._work = work
        self._endings = endings
        self._observers = observers
        self._book = book
        self._leading = leading
        self._worker = worker
        self._sender: Sender | None = None
        self._running: dict[str, asyncio.Task[Answer]] = {}
        """By claim."""

    async def close(self) -> None:
        """Close all connections."""
        if self._sender is not None:
            await self._sender.close()

    def hand_back(self) -> None:
        """Give up what is under way: it goes back to its queue, and is sent again under the same id."""
        for running in self._running.values():
            running.cancel()

    async def run(self, request: Request) -> None:
        """Make one attempt of a delivery, and write what follows from it."""
        try:
            await self._run(request)
        except Exception as error:  # noqa: BLE001 - one delivery must not end the lane for all
            self._endings.fail(request, our_error(error))

    async def _run(self, request: Request) -> None:
        delivery: DeliveryRequest = request.payload
        led = self._leading.get(request.model)
        endpoint = self._book.get(delivery.endpoint)
        if self._store.some_cancelled and await persist(lambda: self._store.is_cancelled(request.task_id)):
            self._endings.revoke(request, "cancelled")
            return
        if endpoint is None and not delivery.endpoint.startswith(AD_HOC):
            removed = Answer(None, f"the endpoint {delivery.endpoint} was removed", 0.0)
            await self._fail(request, delivery, removed, "endpoint_removed", last=True)
            return
        try:
            headers = self._headers(request, delivery, endpoint)
        except SamphireError as error:
            await self._put_off(request, delivery, led, error)
            return
        answer = await self._send(request, delivery.url or (endpoint.url if endpoint is not None else ""), headers)
        if answer is None:
            await self._ledger.release([request])
            return
        if led is not None and not delivery.replay:
            try:
                await self._note(led, endpoint, answer)
            except SamphireError as error:
                logger.error(
                    "how the webhook endpoint %s fares is not kept: %s",
                    led.name,
                    error,
                    extra={"action": "health_not_kept"},
                )
        if answer.arrived:
            self._succeed(request, delivery, answer)
        else:
            gone = answer.status == GONE and endpoint is None
            await self._fail(request, delivery, answer, "undelivered", last=gone)

    # -- sending ------------------------------------------------------------------------------------

    def _headers(self, request: Request, delivery: DeliveryRequest, endpoint: Endpoint | None) -> dict[str, str]:
        """The headers of one attempt; raises SecretUnreadableError where it cannot be signed."""
        now = self._store.clock.now()
        signer = self._book.secret_of(delivery.endpoint, delivery.tenant)
        if signer is None or not signer.signing(now):
            raise SecretUnreadableError(f"there is no secret for the webhook endpoint {delivery.endpoint}")
        webhook_id, timestamp, body = delivery.webhook_id or request.task_id, str(int(now)), delivery.body.encode()
        content = signed_content(webhook_id, timestamp, body)
        keys = self._signing_keys(signer, now)
        headers = {
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "webhook-id": webhook_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(key.sign(content) for key in keys),
        }
        if request.envelope is not None and request.envelope.headers.samphire_watermark:
            headers["samphire-watermark"] = str(request.envelope.headers.samphire_watermark)
        if endpoint is not None and endpoint.cloud_events:
            headers |= self._cloud_event(webhook_id, delivery)
        return headers

    def _signing_keys(self, signer: Endpoint, now: float) -> list[SigningKey]:
        """Those that can be read; one that cannot, and is to be replaced anyway, holds nothing up."""
        keys, unread = list[SigningKey](), None
        for secret in signer.signing(now):
            try:
                keys.append(SigningKey.parse(self._book.box.open(signer.name, secret.sealed)))
            except SecretUnreadableError as error:
                unread = error
                logger.warning("a secret does not sign: %s", error, extra={"action": "secret_unread"})
        if unread is not None and not keys:
            raise unread
        return keys

    def _cloud_event(self, webhook_id: str, delivery: DeliveryRequest) -> dict[str, str]:
        """Headers of the binary content mode. Source: CloudEvents 1.0, HTTP protocol binding, 3.1."""
        return {
            "ce-specversion": "1.0",
            "ce-id": webhook_id,
            "ce-type": delivery.event,
            "ce-source": f"/samphire/{self._store.keys.namespace.rstrip(':')}",
            "ce-subject": quote(delivery.about, safe=""),
            "ce-time": str(msgspec.json.decode(delivery.body).get("timestamp", "")),
        }

    async def _send(self, request: Request, url: str, headers: dict[str, str]) -> Answer | None:
        """What came of it; None where this worker hands it back."""
        if self._sender is None:
            settings = self._settings
            policy = settings.webhook_policy().targets()
            self._sender = Sender(policy, settings.webhook_nameservers, settings.webhook_timeout_s)
        if self._work.is_handed_back:
            return None
        delivery: DeliveryRequest = request.payload
        running = asyncio.create_task(self._sender.send(url, headers, delivery.body.encode()))
        self._running[request.claim.field] = running
        try:
            await asyncio.wait([running])
        finally:
            running.cancel()
            del self._running[request.claim.field]
        return None if running.cancelled() else running.result()

    async def _put_off(
        self, request: Request, delivery: DeliveryRequest, led: LedEndpoint | None, error: SamphireError
    ) -> None:
        """Send it later, without an attempt: it is not the receiver's fault."""
        logger.error(
            "webhooks to %s wait, and nothing is lost: %s", delivery.endpoint, error, extra={"action": "unsigned"}
        )
        if led is None:  # somebody waits for what comes of it
            await self._fail(request, delivery, Answer(None, str(error), 0.0), "undelivered", last=True)
            return
        self._leading.pause(led)
        await self._ledger.release([request])

    # -- what follows -------------------------------------------------------------------------------

    def _succeed(self, request: Request, delivery: DeliveryRequest, answer: Answer) -> None:
        settlement = outcome.done(request)
        closed = self._closed(request, delivery, "delivered", answer)
        self._endings.settler.add(settlement._replace(delivery=closed))
        request.outcome = "succeeded"
        self._observers.succeeded([request])

    async def _fail(
        self, request: Request, delivery: DeliveryRequest, answer: Answer, reason: str, *, last: bool
    ) -> None:
        (before,) = await persist(lambda: self._store.tried([request.task_id], deliveries=True))
        request.attempts = before.attempts
        error = DeliveryFailedError(answer.error)
        wait_s = None if last else self._wait_s(delivery, request.attempts + 1)
        text = self._attempt(answer)
        if wait_s is not None:
            wait_s = max(wait_s * (1 + JITTER * random.random()), min(answer.retry_after_s or 0.0, THROTTLED_MOST_S))
            logger.info(
                "webhook %s to %s: attempt %d: %s; the next in %.0f s",
                request.task_id,
                delivery.endpoint,
                request.attempts + 1,
                answer.error,
                wait_s,
                extra={"action": "delivery_retried"},
            )
            self._endings.settler.add(outcome.put_off(request, wait_s, text))
            self._observers.retried(request, error)
            return
        logger.warning(
            "webhook %s to %s does not arrive, and is not tried again: %s; `samphire webhooks redeliver %s` sends it",
            request.task_id,
            delivery.endpoint,
            answer.error,
            delivery.webhook_id or request.task_id,
            extra={"action": "delivery_failed"},
        )
        closed = self._closed(request, delivery, "failed", answer)
        if delivery.replay:  # the letter of the delivery itself tells
            self._endings.settler.add(outcome.done(request)._replace(delivery=closed))
        else:
            request.started_at = self._store.clock.now()
            settlement = outcome.failure(request, error, reason, self._worker, text)
            self._endings.settler.add(settlement._replace(delivery=closed))
        self._observers.failed(request, error, reason)

    def _wait_s(self, delivery: DeliveryRequest, attempts: int) -> float | None:
        """How long until the attempt after so many; None: that was the last."""
        if delivery.replay in ("test", "once"):
            return None
        endpoint = self._book.get(delivery.endpoint)
        schedule = (endpoint.schedule_s if endpoint is not None else ()) or self._settings.webhook_schedule_s
        return schedule[attempts] if attempts < len(schedule) else None

    def close_as(self, request: Request, state: str, attempt: str) -> Delivery | tuple[()]:
        """What is kept of a delivery that is ended by others: it was cancelled, or a fault of ours has ended it."""
        if not isinstance(request.payload, DeliveryRequest):
            return ()
        return self._kept(request, request.payload, state, attempt)

    def _closed(self, request: Request, delivery: DeliveryRequest, state: str, answer: Answer) -> Delivery:
        return self._kept(request, delivery, state, self._attempt(answer))

    def _kept(self, request: Request, delivery: DeliveryRequest, state: str, attempt: str) -> Delivery:
        settings = self._settings
        return Delivery(
            delivery.webhook_id or request.task_id,
            delivery.endpoint,
            "" if delivery.replay else delivery.order,
            state,
            attempt,
            settings.webhook_keep_max,
            settings.webhook_keep_s,
            int(delivery.replay in ("once", "again")),
        )

    def _attempt(self, answer: Answer) -> str:
        """What is kept of an attempt, JSON."""
        kept: dict[str, Any] = {
            "at": iso_time(self._store.clock.now()),
            "worker": self._worker,
            "error": answer.error,
            "status": answer.status,
            "ms": answer.ms,
            "answer": answer.beginning,
        }
        return encode(kept).decode()

    # -- health -------------------------------------------------------------------------------------

    async def _note(self, led: LedEndpoint, endpoint: Endpoint | None, answer: Answer) -> None:
        now, health = self._store.clock.now(), led.health
        if answer.arrived:
            if health.succeeded():
                await self._keep(led, 0)
            return
        if answer.status in THROTTLES:
            health.throttle(now, answer.retry_after_s)
        health.failed(now, answer.error)
        self._leading.wake_in(led, health.waits_s(now))
        if endpoint is None:
            await self._keep(led, 0)
            return
        after_s = self._settings.webhook_disable_after_s
        await self._keep(led, health.warning_level(after_s))
        if answer.status == GONE:
            led.was_gone = True
            await self._disable(led, endpoint, "gone", "it answered 410")
        elif health.failing_part(after_s) >= 1:
            why = f"it has only failed since {iso_time(health.failing_since)}, {health.failures} times"
            await self._disable(led, endpoint, "failing", why)
        led.was_gone = False

    async def _keep(self, led: LedEndpoint, level: int) -> None:
        """Write how an endpoint fares, and warn operators, once of each level."""
        health = led.health
        state = b"" if health.is_well else encode(health)
        event = b""
        if level:
            event = encode(
                {
                    "type": "webhook.endpoint.failing",
                    "endpoint": led.name,
                    "percent": level,
                    "since": iso_time(health.failing_since),
                    "failures": health.failures,
                    "error": health.last_error,
                }
            )
        if await persist(lambda: self._store.keep_endpoint_health(led.name, state, level, event)):
            logger.warning(
                "the webhook endpoint %s has only failed for %d %% of the time after which it is disabled: %s",
                led.name,
                level,
                health.last_error,
                extra={"action": "endpoint_failing"},
            )

    async def _disable(self, led: LedEndpoint, endpoint: Endpoint, why: Disabled, told: str) -> None:
        await self._book.look()
        now, before = self._book.get(led.name), self._book.raw(led.name)
        same = now is not None and (now.url, now.enabled_at) == (endpoint.url, endpoint.enabled_at)
        if now is None or not same or now.disabled:
            return  # it was changed while the attempt was under way: what came of it says nothing of it now
        after = msgspec.structs.replace(now, disabled=why)
        event = encode({"type": "webhook.endpoint.disabled", "endpoint": led.name, "reason": why, "why": told})
        public = encode(public_of(after))
        if await persist(lambda: self._store.change_endpoint(led.name, before, encode(after), public, event)):
            logger.error(
                "the webhook endpoint %s is disabled: %s. Its deliveries wait; `samphire webhooks endpoints enable %s` "
                "sends them",
                led.name,
                told,
                led.name,
                extra={"action": "endpoint_disabled"},
            )
        await self._book.look()
