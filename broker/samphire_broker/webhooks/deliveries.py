"""What became of deliveries, and how to send them again by hand."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from samphire.errors import InvalidInputError, ResultTimeoutError, SamphireError
from samphire.transport.connection import key_text
from samphire.wire import keys as names
from samphire.wire.contract import DELIVER_TASK, DeliveryRequest, Replay
from samphire.wire.envelope import decode_delivery, decode_envelope, encode_task
from samphire_broker.webhooks.registry import Registry

MESSAGE_BYTES = 4 * 2**20
PAGE = 200
CHECK_S = 0.05


class DeliveryGoneError(SamphireError):
    """There is no such delivery."""

    default_message = "There is no such delivery."


class DeliveryState(NamedTuple):
    """A delivery, as far as it is known."""

    id: str
    endpoint: str
    watermark: int
    state: str
    """`waiting`, `retrying`, `delivered` or `failed`."""
    event: str
    """The type of the event; "" of one that is under way just now."""
    task_id: str
    attempts: list[dict[str, Any]]
    """Each with `at`, `error`, `status`, `ms`, `answer`."""
    next_at: float | None
    """In s since 1970, of one that is tried again."""


class Deliveries:
    """The deliveries of a deployment, for an operator."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._client: Any = registry.client  # redis-py's types leave open what it answers with
        self._keys = registry.keys

    def of(self, endpoint: str, limit: int = 50) -> Iterator[DeliveryState]:
        """The newest deliveries to an endpoint, those first that have not ended."""
        waiting = self._client.zrevrange(self._keys.waiting_deliveries(endpoint), 0, limit - 1, withscores=True)
        queued = self._queued(endpoint) if waiting else {}
        for raw, mark in waiting:
            yield self._waiting(key_text(raw), endpoint, int(mark), queued)
        left = limit - len(waiting)
        if left <= 0:
            return
        for raw, mark in self._client.zrevrange(self._keys.ended_deliveries(endpoint), 0, left - 1, withscores=True):
            found = self._ended(key_text(raw), endpoint, int(mark))
            if found is not None:
                yield found

    def get(self, delivery_id: str) -> DeliveryState:
        """One that has ended; raises DeliveryGoneError."""
        request = self._request(delivery_id)
        found = self._ended(delivery_id, request.endpoint, 0)
        if found is None:
            raise _gone(delivery_id)
        return found

    def redeliver(self, delivery_id: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Send one again, once, under its id; what came of it. Its schedule and its endpoint's health stay.

        Raises:
            DeliveryGoneError: it is not there any more, or has not ended yet.
            ResultTimeoutError: no worker has sent it in time.
        """
        before = len(self.get(delivery_id).attempts)
        self._push([delivery_id], "once", names.WEBHOOKS)
        self._registry.wake()
        return self._wait(delivery_id, before, timeout_s)

    def test(self, endpoint: str, timeout_s: float = 30.0) -> dict[str, Any]:
        """Send an endpoint an event of the type `test`; what came of it. Raises as `redeliver` does."""
        self._registry.state(endpoint)
        body = msgspec.json.encode(
            {"type": "test", "timestamp": _now_text(), "data": {"endpoint": endpoint, "sequence": 0}}
        ).decode()
        delivery_id = f"msg_{uuid.uuid4().hex}"
        request = DeliveryRequest(endpoint, "test", "", body, "", "", "", "test")
        message = encode_task(DELIVER_TASK, delivery_id, request, names.WEBHOOKS, 0, headers={"ignore_result": True})
        self._client.lpush(self._keys.of_celery(names.WEBHOOKS), message)
        self._registry.wake()
        return self._wait(delivery_id, 0, timeout_s)

    def recover(self, endpoint: str, since: float) -> int:
        """Send again what has failed for good since a time (s since 1970), by the endpoint's schedule; how many."""
        self._check_enabled(endpoint)
        count = 0
        for page in self._pages(endpoint, "-inf"):
            with self._client.pipeline(transaction=False) as pipe:
                for delivery_id in page:
                    pipe.hmget(self._keys.delivery(delivery_id), "state", "at")
                states = pipe.execute()
            failed = [
                delivery_id
                for delivery_id, (state, at) in zip(page, states, strict=True)
                if state == b"failed" and float(at or 0) >= since
            ]
            count += self._push(failed, "again", names.delivery_queue(endpoint))
        self._registry.wake(endpoint)
        return count

    def replay_missing(self, endpoint: str, after: int) -> int:
        """Send again all that has ended, arrived or not, with a higher watermark than the receiver knows; how many."""
        self._check_enabled(endpoint)
        count = 0
        for page in self._pages(endpoint, f"({after}"):
            count += self._push(page, "again", names.delivery_queue(endpoint))
        self._registry.wake(endpoint)
        return count

    # -- the parts ----------------------------------------------------------------------------------

    def _check_enabled(self, endpoint: str) -> None:
        if self._registry.state(endpoint).endpoint.disabled:
            raise InvalidInputError(
                f"the webhook endpoint {endpoint} is disabled: `samphire webhooks endpoints enable {endpoint}` first"
            )

    def _pages(self, endpoint: str, least: str) -> Iterator[list[str]]:
        """Ids of deliveries that have ended, in the order of their watermarks."""
        key = self._keys.ended_deliveries(endpoint)
        ids = [key_text(raw) for raw in self._client.zrangebyscore(key, least, "+inf")]
        for first in range(0, len(ids), PAGE):
            yield ids[first : first + PAGE]

    def _push(self, delivery_ids: Sequence[str], replay: Replay, queue: str) -> int:
        """Queue replays; those are left out that are not kept any more."""
        count = 0
        for delivery_id in delivery_ids:
            try:
                request = self._request(delivery_id)
            except DeliveryGoneError:
                continue
            again = msgspec.structs.replace(request, replay=replay, webhook_id=delivery_id, order="")
            mark = self._client.zscore(self._keys.ended_deliveries(request.endpoint), delivery_id)
            message = encode_task(
                DELIVER_TASK,
                f"{delivery_id}~{uuid.uuid4().hex[:12]}",
                again,
                queue,
                0,
                kwargsrepr=f"{request.event} of {request.about} to {request.endpoint}, again",
                headers={"ignore_result": True, "samphire_watermark": int(mark or 0)},
            )
            self._client.lpush(self._keys.of_celery(queue), message)
            count += 1
        return count

    def _request(self, delivery_id: str) -> DeliveryRequest:
        message = self._client.hget(self._keys.delivery(delivery_id), "message")
        if message is None:
            message = self._client.hget(self._keys.dead_prefix + delivery_id, "message")
        if message is None:
            raise _gone(delivery_id)
        return decode_delivery(decode_envelope(message), MESSAGE_BYTES)

    def _wait(self, delivery_id: str, before: int, timeout_s: float) -> dict[str, Any]:
        give_up = time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            attempts = _attempts(self._client.hget(self._keys.delivery(delivery_id), "attempts"))
            if len(attempts) > before:
                return attempts[-1]
            time.sleep(CHECK_S)
        raise ResultTimeoutError(f"no worker has sent {delivery_id} in {timeout_s:g} s; it is queued")

    def _ended(self, delivery_id: str, endpoint: str, mark: int) -> DeliveryState | None:
        state, attempts, message = self._client.hmget(
            self._keys.delivery(delivery_id), ["state", "attempts", "message"]
        )
        if state is None or message is None:
            return None
        request = decode_delivery(decode_envelope(message), MESSAGE_BYTES)
        return DeliveryState(
            delivery_id, endpoint, mark, key_text(state), request.event, request.about, _attempts(attempts), None
        )

    def _waiting(self, delivery_id: str, endpoint: str, mark: int, queued: dict[str, bytes]) -> DeliveryState:
        next_at = self._client.zscore(self._keys.scheduled, delivery_id)
        history = self._client.hget(self._keys.task_prefix + delivery_id, "history")
        message = queued.get(delivery_id)
        if next_at is not None:
            value = self._client.hget(self._keys.scheduled_messages, delivery_id)
            message = value.partition(b" ")[2] if value else None
        event = task_id = ""
        if message:
            request = decode_delivery(decode_envelope(message), MESSAGE_BYTES)
            event, task_id = request.event, request.about
        attempts = _attempts(b"[" + history + b"]" if history else b"[]")
        state = "retrying" if attempts else "waiting"
        return DeliveryState(delivery_id, endpoint, mark, state, event, task_id, attempts, next_at)

    def _queued(self, endpoint: str) -> dict[str, bytes]:
        """Messages by id, of some that lie in the endpoint's queue."""
        found = self._client.lrange(self._keys.of_celery(names.delivery_queue(endpoint)), -PAGE, -1)
        return {decode_envelope(message).headers.id: message for message in found}


def _attempts(raw: Any) -> list[dict[str, Any]]:
    try:
        found = msgspec.json.decode(raw) if raw else []
    except msgspec.DecodeError:
        return []
    return [attempt for attempt in found if isinstance(attempt, dict)]


def _now_text() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _gone(delivery_id: str) -> DeliveryGoneError:
    return DeliveryGoneError(
        f"no delivery {delivery_id[:100]!r} that has ended: it is still on its way, or is not kept any more"
    )
