"""What operators set: endpoints, their secrets, and the default secrets of tenants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import redis

from samphire.errors import InvalidInputError, SamphireError
from samphire.transport.connection import key_text
from samphire.webhooks.signing import new_key_pair, new_secret
from samphire.webhooks.targets import check_url
from samphire.wire.contract import check_tenant
from samphire.wire.endpoints import POLICY, Policy, decode_policy, default_secret_name
from samphire.wire.keys import WEBHOOKS, delivery_queue
from samphire_broker.inspection.overview import broker_connection
from samphire_broker.settings import Settings
from samphire_broker.store.calls import script_text
from samphire_broker.store.outbox import OPERATOR_EVENTS_MAX, endpoint_keys
from samphire_broker.webhooks.endpoint import (
    RESULT_BYTES_MAX,
    Endpoint,
    Secret,
    check_name,
    decode_endpoint,
    encode,
    public_of,
)

GRACE_S = 86_400.0
GRACE_MOST_S = 30 * 86_400.0
SIGNATURES = {"v1": ("v1",), "v1a": ("v1a",), "both": ("v1", "v1a")}
"""What an endpoint may be signed with."""
TRIES = 5


class NoSuchEndpointError(InvalidInputError):
    """There is no such endpoint."""

    default_message = "There is no such endpoint."


class ChangedMeanwhileError(SamphireError):
    """Somebody else has changed the endpoint."""

    default_message = "Somebody else has changed the endpoint."


class Shown(NamedTuple):
    """Secrets that were made: they are shown once."""

    secrets: tuple[str, ...]
    """`whsec_…` for `v1`, `whpk_…` for `v1a`: what a receiver is given."""


class EndpointState(NamedTuple):
    """An endpoint, and how it fares."""

    endpoint: Endpoint
    waiting: int
    """Deliveries that have not ended."""
    health: dict[str, Any]


class Registry:
    """The endpoints of a deployment, for an operator. Use `open_registry`.

    Args:
        client: a connection with an operator's rights.
        settings: of the deployment.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client: Any = client  # redis-py's types leave open what it answers with
        self._settings = settings
        self.keys = settings.broker.keys
        """Names of the deployment's keys."""
        self._box = settings.secret_box()
        self._change = client.register_script(script_text("endpoint", self.keys))

    @property
    def client(self) -> redis.Redis:
        """The connection."""
        found: redis.Redis = self._client
        return found

    def endpoints(self) -> list[EndpointState]:
        """All endpoints, and the default secrets (their names begin with `@`), by name."""
        names = sorted(key_text(name) for name in self._client.hkeys(self.keys.webhook_config))
        return [self.state(name) for name in names]

    def state(self, name: str) -> EndpointState:
        """One of them; raises NoSuchEndpointError."""
        endpoint, _ = self._read(name)
        health = self._client.hget(self.keys.webhook_health, name)
        waiting = int(self._client.zcard(self.keys.waiting_deliveries(name)))
        return EndpointState(endpoint, waiting, msgspec.json.decode(health) if health else {})

    def add(self, endpoint: Endpoint, signature: str) -> Shown:
        """Make an endpoint, with secrets of its own.

        Args:
            endpoint: what is set; its secrets and times are filled in.
            signature: `v1`, `v1a` or `both`.

        Raises:
            InvalidInputError: a name or a URL that cannot be one, or the endpoint is there already.
        """
        check_name(endpoint.name)
        check_tenant(endpoint.tenant)
        if not 0 <= endpoint.result_bytes <= RESULT_BYTES_MAX:
            raise InvalidInputError(
                f"expected results of at most 0 to {RESULT_BYTES_MAX} bytes to go along, given {endpoint.result_bytes}"
            )
        target = check_url(endpoint.url, self._policy().targets())
        self._check_keys()
        shown, secrets = self._new_secrets(endpoint.name, SIGNATURES[signature])
        made = msgspec.structs.replace(endpoint, url=target.url, secrets=secrets, created_at=self._now())
        if not self._write(endpoint.name, b"", made):
            raise InvalidInputError(f"there is a webhook endpoint {endpoint.name!r} already: remove it, or rotate it")
        return shown

    def rotate(self, name: str, grace_s: float = GRACE_S) -> Shown:
        """Give an endpoint new secrets; those in use sign beside them for so long, and then no more.

        Raises:
            InvalidInputError: a time that cannot be one.
            ChangedMeanwhileError: somebody else has changed the endpoint just now; nothing was done.
        """
        if not 0 <= grace_s <= GRACE_MOST_S:
            raise InvalidInputError(f"expected a grace period from 0 to {GRACE_MOST_S:g} s, given {grace_s:g}")
        self._check_keys()
        endpoint, raw = self._read(name)
        now = self._now()
        versions = tuple(dict.fromkeys(secret.version for secret in endpoint.secrets if not secret.expires_at))
        shown, secrets = self._new_secrets(name, versions or ("v1",))
        kept = [
            secret if secret.expires_at else msgspec.structs.replace(secret, expires_at=now + grace_s)
            for secret in endpoint.signing(now)
            if secret.expires_at or grace_s
        ]
        if not self._write(name, raw, msgspec.structs.replace(endpoint, secrets=(*secrets, *kept))):
            raise ChangedMeanwhileError(
                f"{name!r} was changed by somebody else just now, and its secrets are not rotated by this: look, and "
                "try again"
            )
        return shown

    def rotate_default(self, tenant: str, grace_s: float = GRACE_S) -> Shown:
        """Make the default secret of a tenant, or give it a new one; raises as `rotate` does."""
        check_tenant(tenant)
        name = default_secret_name(tenant)
        try:
            return self.rotate(name, grace_s)
        except NoSuchEndpointError:
            shown, secrets = self._new_secrets(name, ("v1",))
        made = Endpoint(name, tenant=tenant, secrets=secrets, created_at=self._now())
        if not self._write(name, b"", made):
            raise ChangedMeanwhileError(f"the default secret of {tenant!r} was made by somebody else just now")
        return shown

    def disable(self, name: str) -> None:
        """Send nothing to an endpoint; its deliveries wait."""
        self._update(name, lambda endpoint: msgspec.structs.replace(endpoint, disabled="operator"), "disabled")

    def enable(self, name: str) -> int:
        """Send to it again, at once and what waits too, whatever had failed before; how many those are."""
        now = self._now()
        self._client.hdel(self.keys.webhook_health, name)
        self._update(
            name,
            lambda endpoint: msgspec.structs.replace(endpoint, disabled="", enabled_at=now),
            "enabled",
            forget=True,
        )
        self.wake(name)
        return int(self._client.zcard(self.keys.waiting_deliveries(name)))

    def remove(self, name: str) -> int:
        """Remove an endpoint; each of its deliveries becomes a dead letter, and how many those are is returned."""
        for _ in range(TRIES):
            _, raw = self._read(name)
            if self._write(name, raw, None, event=self._event(name, "removed"), forget=True):
                break
        else:
            raise ChangedMeanwhileError(f"{name!r} is changed by others again and again: try again")
        self._client.hdel(self.keys.webhook_health, name)
        waiting = self.keys.waiting_deliveries(name)
        ids = self._client.zrange(waiting, 0, -1)
        for first in range(0, len(ids), 500):  # what waits for its next attempt ends now, with the rest
            now = dict.fromkeys(ids[first : first + 500], self._now())
            self._client.zadd(self.keys.scheduled, now, xx=True)
        self.wake(name)
        return len(ids)

    def wake(self, name: str = "") -> None:
        """Tell workers that there is something to deliver to an endpoint, or (without a name) by hand."""
        queue = delivery_queue(name) if name else WEBHOOKS
        self._client.sadd(self.keys.queues, queue)
        self._client.publish(self.keys.wake_channel, queue)

    # -- the parts ----------------------------------------------------------------------------------

    def _now(self) -> float:
        seconds, microseconds = self._client.time()
        now: float = seconds + microseconds / 1e6
        return now

    def _policy(self) -> Policy:
        """Which URLs are taken: as the workers say it, since they send; else as it is set here."""
        told = self._client.hget(self.keys.webhook_names, POLICY)
        return decode_policy(told) if told else self._settings.webhook_policy()

    def _check_keys(self) -> None:
        """Refuse to encrypt what no worker could read."""
        self._box.make_key()
        told = self._policy().key_ids
        if told and not set(told) & set(self._box.key_ids[:1]):
            raise InvalidInputError(
                f"the workers cannot read secrets that are encrypted with the key in {self._box.where}: give them and "
                "this command the same SAMPHIRE_SECRET_KEY, or SAMPHIRE_DATA_DIR"
            )

    def _new_secrets(self, name: str, versions: tuple[str, ...]) -> tuple[Shown, tuple[Secret, ...]]:
        shown, secrets = [], []
        for version in versions:
            if version == "v1a":
                private, public = new_key_pair()
                shown.append(public)
                secrets.append(Secret(self._box.seal(name, private), version, public))
            else:
                secret = new_secret()
                shown.append(secret)
                secrets.append(Secret(self._box.seal(name, secret), version))
        return Shown(tuple(shown)), tuple(secrets)

    def _read(self, name: str) -> tuple[Endpoint, bytes]:
        raw = self._client.hget(self.keys.webhook_config, name)
        if raw is None:
            raise NoSuchEndpointError(
                f"no webhook endpoint {name[:100]!r}; `samphire webhooks endpoints list` shows them"
            )
        return decode_endpoint(raw), raw

    def _update(self, name: str, change: Callable[[Endpoint], Endpoint], what: str, *, forget: bool = False) -> None:
        for _ in range(TRIES):
            endpoint, raw = self._read(name)
            if self._write(name, raw, change(endpoint), event=self._event(name, what), forget=forget):
                return
        raise ChangedMeanwhileError(f"{name!r} is changed by others again and again: try again")

    def _event(self, name: str, what: str) -> bytes:
        return encode({"type": f"webhook.endpoint.{what}", "endpoint": name, "at": time.time()})

    def _write(
        self, name: str, before: bytes, after: Endpoint | None, *, event: bytes = b"", forget: bool = False
    ) -> bool:
        made = (b"", b"") if after is None else (encode(after), encode(public_of(after)))
        done = bool(
            self._change(endpoint_keys(self.keys), [name, before, *made, event, OPERATOR_EVENTS_MAX, int(forget)])
        )
        if done:
            self.wake()
        return done


@contextmanager
def open_registry(settings: Settings) -> Iterator[Registry]:
    """The registry of a deployment; raises as `broker_connection` does."""
    with broker_connection(settings.broker) as client:
        yield Registry(client, settings)
