"""Which endpoints of webhooks there are, as far as producers may know: what cannot be told is refused at submit."""

from __future__ import annotations

import math
import time

import msgspec

from samphire.errors import BrokerRightError, BrokerUnavailableError
from samphire.transport.direct import DirectConnection
from samphire.webhooks.targets import TargetPolicy
from samphire.wire.endpoints import POLICY, Public, check_webhook, decode_policy, decode_public, name_of
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

    async def _look_up(self, name: str) -> tuple[Public | None, TargetPolicy]:
        public, policy = await self._connection.ask("HMGET", self._key, name, POLICY)
        try:
            found = None if public is None else decode_public(public)
            return found, TargetPolicy() if policy is None else decode_policy(policy).targets()
        except msgspec.MsgspecError:  # of another version: the worker knows
            return Public(has_secret=True), TargetPolicy()
