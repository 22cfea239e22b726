"""Webhooks as workers see them: what is set of endpoints, how they fare, and what is put out before a task's end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from samphire.transport.connection import key_text
from samphire.transport.direct import Argument
from samphire.wire.endpoints import POLICY
from samphire.wire.keys import Keys
from samphire_broker.store.calls import Calls
from samphire_broker.store.records import Webhook

OPERATOR_EVENTS_MAX = 1000

_pack = msgspec.msgpack.Encoder().encode


class Outbox(Calls):
    """All of it may be repeated after a lost reply."""

    async def notify(self, webhooks: Sequence[tuple[str, str, Webhook]]) -> int:
        """Put out webhooks (claim, task id, entry) of tasks under way; how many could not be pushed."""
        args: list[Argument] = [self.keys.task_prefix, self.keys.wake_channel, _pack(webhooks)]
        return int(await self._run("notify", [self._inflight], args))

    async def endpoints(self) -> dict[str, bytes]:
        """What is set of every endpoint and default secret, JSON by name."""
        found = await self._rest.execute("HGETALL", self.keys.webhook_config)
        return {key_text(name): value for name, value in zip(found[::2], found[1::2], strict=True)}

    async def publish_webhook_policy(self, policy: bytes) -> None:
        """Tell clients which URLs are taken, JSON."""
        await self._rest.execute("HSET", self.keys.webhook_names, POLICY, policy)

    async def endpoint_health(self, endpoint: str) -> bytes | None:
        """How an endpoint fares, JSON; None: well."""
        found: bytes | None = await self._rest.execute("HGET", self.keys.webhook_health, endpoint)
        return found

    async def keep_endpoint_health(self, endpoint: str, state: bytes, level: int = 0, event: bytes = b"") -> bool:
        """Keep how an endpoint fares, b"" for well; whether the warning of that level (over 0) is a new one."""
        key_names = [self.keys.webhook_health, self.keys.webhook_warned, self.keys.operator_events]
        args: list[Argument] = [endpoint, state, level, event, OPERATOR_EVENTS_MAX]
        return bool(await self._run("health", key_names, args))

    async def change_endpoint(self, name: str, before: bytes, after: bytes, public: bytes, event: bytes) -> bool:
        """Change what is set of an endpoint, and tell operators; False where it was changed by somebody else."""
        args: list[Argument] = [name, before, after, public, event, OPERATOR_EVENTS_MAX, 0]
        return bool(await self._run("endpoint", endpoint_keys(self.keys), args))


def endpoint_keys(keys: Keys) -> list[str]:
    """The keys of `endpoint.lua`."""
    return [keys.webhook_config, keys.webhook_names, keys.webhook_warned, keys.operator_events]
