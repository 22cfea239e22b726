"""What producers may read of endpoints of webhooks (`webhook:names`), and what follows for a task that names one."""

from __future__ import annotations

import hashlib

import msgspec

from samphire.errors import InvalidInputError
from samphire.webhooks.targets import Target, TargetPolicy, check_url, is_url

POLICY = "*"
"""The field with the policy."""
AD_HOC = "url-"
"""How the names begin of what is no registered endpoint, but the origin of a URL that a task has named."""


class Public(msgspec.Struct, frozen=True, omit_defaults=True):
    """What may be read of an endpoint: neither its URL, which may hold a secret, nor its secrets."""

    tenant: str = ""
    """Whose tasks may name it; "" those of all."""
    disabled: bool = False
    has_secret: bool = False


class Policy(msgspec.Struct, frozen=True):
    """Which URLs the workers take, and the names of the keys that they can read secrets with."""

    schemes: tuple[str, ...]
    ports: tuple[int, ...]
    allow_private: bool
    key_ids: tuple[str, ...] = ()

    def targets(self) -> TargetPolicy:
        """The policy for URLs."""
        return TargetPolicy(self.schemes, self.ports, self.allow_private)


decode_public = msgspec.json.Decoder(Public).decode
decode_policy = msgspec.json.Decoder(Policy).decode


def default_secret_name(tenant: str) -> str:
    """The name under which the default secret of a tenant is kept; no endpoint can have it."""
    return f"@{tenant}"


def ad_hoc_name(tenant: str, target: Target) -> str:
    """What the deliveries of a tenant to one origin are called: they share a queue, limits and a breaker."""
    return AD_HOC + hashlib.sha256(f"{tenant}\0{target.origin}".encode()).hexdigest()[:24]


def name_of(webhook: str, tenant: str) -> str:
    """Under which name it stands what a task's webhook needs."""
    return default_secret_name(tenant) if is_url(webhook) else webhook


def check_webhook(webhook: str, tenant: str, found: Public | None, policy: TargetPolicy) -> None:
    """Check what a task names as its webhook.

    Args:
        webhook: a name or a URL.
        tenant: whose task it is.
        found: what stands under `name_of`.
        policy: which URLs are taken.

    Raises:
        InvalidInputError: there is no such endpoint for this tenant, no webhook is sent to such a URL, or nothing could
            sign it.
    """
    if is_url(webhook):
        check_url(webhook, policy)
        if found is None or not found.has_secret:
            raise InvalidInputError(_no_default_secret(tenant))
    elif found is None or found.tenant not in ("", tenant):
        raise InvalidInputError(
            f"no webhook endpoint {webhook[:100]!r} for this tenant; `samphire webhooks endpoints list` shows those "
            "that there are, `… add` makes one"
        )


def _no_default_secret(tenant: str) -> str:
    """What is said where a task names a URL and nothing could sign for it."""
    whose = f" --tenant {tenant}" if tenant else ""
    return (
        "a webhook URL is signed with the tenant's default secret, and there is none: make one with "
        f"`samphire webhooks endpoints rotate --default{whose}`, or name a registered endpoint"
    )
