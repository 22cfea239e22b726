"""The endpoints of webhooks as a worker knows them, kept fresh, and what a task means that names one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from samphire.errors import InvalidInputError, SamphireError
from samphire.webhooks.targets import check_url, is_url
from samphire.wire.endpoints import AD_HOC, ad_hoc_name, check_webhook, default_secret_name, name_of
from samphire_broker.settings import Settings
from samphire_broker.store import Store
from samphire_broker.webhooks.endpoint import (
    Destination,
    Endpoint,
    decode_endpoint,
    encode,
    public_of,
)
from samphire_workers.repeat import persist

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""Between two looks at the endpoints."""
ASK_AGAIN_S = 0.2
"""A name that is unknown is looked for again, but no sooner than this after the last look."""
TELL_S = 30.0
"""Between two times that clients are told which URLs are taken."""


class EndpointBook:
    """What is set of all endpoints and default secrets.

    Args:
        store: where it is read.
        settings: which URLs are taken.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._policy = settings.webhook_policy().targets()
        self.box = settings.secret_box()
        self._raw: dict[str, bytes] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._looked_at = -ASK_AGAIN_S
        self._looking = asyncio.Lock()
        self.is_read = False
        """Whether all of it was read once: before, nobody knows what there is."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when something is set otherwise than before."""

    def get(self, name: str) -> Endpoint | None:
        """What is set of an endpoint."""
        return self._endpoints.get(name)

    def is_gone(self, name: str) -> bool:
        """Whether there is no such endpoint, not even one that is not understood here."""
        return self.is_read and name not in self._raw

    def raw(self, name: str) -> bytes:
        """The same as it is kept, b"" for nothing."""
        return self._raw.get(name, b"")

    def secret_of(self, name: str, tenant: str) -> Endpoint | None:
        """What signs for an endpoint: its own secrets, or the default ones of a tenant."""
        return self.get(default_secret_name(tenant) if name.startswith(AD_HOC) else name)

    def resolve(self, webhook: str, tenant: str) -> Destination:
        """Who is told of a task that names this.

        Args:
            webhook: a name or a URL.
            tenant: whose task it is.

        Raises:
            InvalidInputError: there is no such endpoint for this tenant, or no webhook is sent to such a URL.
        """
        found = self.get(name_of(webhook, tenant))
        if found is not None and not is_url(webhook) and not found.url:
            found = None  # a default secret is no endpoint
        check_webhook(webhook, tenant, None if found is None else public_of(found), self._policy)
        assert found is not None
        if is_url(webhook):
            target = check_url(webhook, self._policy)
            return Destination(ad_hoc_name(tenant, target), target.url, ("terminal",), found.result_bytes, False)
        return Destination(found.name, "", found.events, found.result_bytes, found.ordered)

    async def resolve_fresh(self, webhook: str, tenant: str) -> Destination:
        """The same, after another look where it is not known; raises as `resolve` does."""
        try:
            return self.resolve(webhook, tenant)
        except InvalidInputError:
            async with self._looking:  # those that come together share one look
                if time.monotonic() - self._looked_at >= ASK_AGAIN_S or not self.is_read:
                    await persist(self._read)
        return self.resolve(webhook, tenant)

    async def look(self) -> None:
        """Read all of it; what cannot be read stays as it was."""
        try:
            await self._read()
        except SamphireError as error:
            logger.warning(
                "the endpoints of webhooks are not read now, so changes are not seen; it is tried again: %s",
                error,
                extra={"action": "endpoints_not_read"},
            )

    async def _read(self) -> None:
        found = await self._store.endpoints()
        self._looked_at, self.is_read = time.monotonic(), True
        if found == self._raw:
            return
        self._endpoints = {name: endpoint for name, raw in found.items() if (endpoint := self._decoded(name, raw))}
        self._raw = found
        self.on_change()

    def _decoded(self, name: str, raw: bytes) -> Endpoint | None:
        if raw == self._raw.get(name) and name in self._endpoints:
            return self._endpoints[name]
        try:
            return decode_endpoint(raw)
        except msgspec.MsgspecError as error:
            logger.error(
                "what is set of the webhook endpoint %s is not understood, so nothing is sent there: %s",
                name,
                error,
                extra={"action": "endpoint_not_read"},
            )
            return None

    async def keep_fresh(self) -> None:
        """Look again and again, and tell clients which URLs are taken, for ever."""
        tell_at = 0.0
        while True:
            await self.look()
            if time.monotonic() >= tell_at:
                tell_at = time.monotonic() + TELL_S
                await self._tell()
            await asyncio.sleep(FRESH_S)

    async def _tell(self) -> None:
        try:
            policy = self._settings.webhook_policy(self.box.key_ids)
            await self._store.publish_webhook_policy(encode(policy))
        except SamphireError as error:
            logger.warning(
                "clients are not told which webhook URLs are taken; it is tried again: %s",
                error,
                extra={"action": "policy_not_told"},
            )
