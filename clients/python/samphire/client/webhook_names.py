"""Which endpoints of webhooks there are, as far as producers may know: what cannot be told is refused at submit."""

from __future__ import annotations

import math
import time

import msgspec

from samphire.errors import BrokerRightError, BrokerUnavailableError
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection
from samphire.webhooks.targets import TargetPolicy, check_url, is_url
from samphire.wire.endpoints import (
    POLICY,
    Public,
    ad_hoc_name,
    check_webhook,
    decode_policy,
    decode_public,
    default_secret_name,
    name_of,
)
from samphire.wire.keys import Keys

FRESH_S = 5.0


class WebhookNames:
    """What stands of webhooks, kept for a few seconds."""

    def __init__(self, connection: DirectConnection, keys: Keys) -> None:
        self._connection = connection
        self._key = keys.webhook_names
        self._known: dict[str, tuple[Public | None, TargetPolicy, float]] = {}

    async def check(self, webhook: str, tenant: str) -> None:
        """Check what a task is to name as its webhook; who may not look leaves it to the worker.

        Raises:
            InvalidInputError: see `samphire.wire.endpoints.check_webhook`.
        """
        name = name_of(webhook, tenant)
        found, policy, at = self._known.get(name, (None, TargetPolicy(), -math.inf))
        if found is None or time.monotonic() - at > FRESH_S:
            try:
                found, policy = await self._look_up(name)
            except (BrokerRightError, BrokerUnavailableError):
                return
            self._known[name] = (found, policy, time.monotonic())
        check_webhook(webhook, tenant, found, policy)

    async def all(self) -> dict[str, Public]:
        """All that stands, by name; what another version has written is left out."""
        raw = await self._connection.ask("HGETALL", self._key)
        pairs = zip(map(key_text, raw[::2]), raw[1::2], strict=True)
        return {name: public for name, value in pairs if name != POLICY and (public := _public(value)) is not None}

    async def has_default_secret(self, tenant: str) -> bool:
        """Whether there is one."""
        found, _ = await self._look_up(default_secret_name(tenant))
        return found is not None and found.has_secret

    async def target(self, webhook: str, tenant: str) -> tuple[str, str]:
        """Under which name the deliveries go that a webhook means, and their URL where it is one.

        Raises:
            InvalidInputError: no webhook is sent to such a URL.
        """
        if not is_url(webhook):
            return webhook, ""
        _, policy = await self._look_up(default_secret_name(tenant))
        target = check_url(webhook, policy)
        return ad_hoc_name(tenant, target), target.url

    async def _look_up(self, name: str) -> tuple[Public | None, TargetPolicy]:
        public, policy = await self._connection.ask("HMGET", self._key, name, POLICY)
        try:
            targets = TargetPolicy() if policy is None else decode_policy(policy).targets()
        except msgspec.MsgspecError:
            targets = TargetPolicy()
        # What is of another version the worker knows.
        return None if public is None else _public(public) or Public(has_secret=True), targets


def _public(value: bytes) -> Public | None:
    try:
        return decode_public(value)
    except msgspec.MsgspecError:
        return None
