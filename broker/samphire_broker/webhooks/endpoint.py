"""What is set of an endpoint of webhooks, and how it is kept on the broker."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from samphire.errors import InvalidInputError
from samphire.wire.endpoints import AD_HOC, Public

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,47}")
Event = Literal["started", "progress", "terminal"]
EVENTS: tuple[Event, ...] = ("started", "progress", "terminal")
RESULT_BYTES_MAX = 32 * 2**10
CONCURRENCY_MAX = 256

Disabled = Literal["", "operator", "gone", "failing"]
"""Why nothing is sent: an operator has said so, it has answered 410, or it has failed for too long."""


class Secret(msgspec.Struct, frozen=True, omit_defaults=True):
    """A secret of an endpoint, encrypted."""

    sealed: str
    version: str
    """`v1` or `v1a`."""
    public: str = ""
    """The public key of `v1a`, for receivers."""
    expires_at: float = 0.0
    """When it stops signing, in s since 1970; 0: it is the one in use."""


class Endpoint(msgspec.Struct, frozen=True, omit_defaults=True):
    """A registered endpoint, or (with an empty URL) the default secret of a tenant."""

    name: str
    url: str = ""
    tenant: str = ""
    """Whose tasks may name it; "" those of all."""
    events: tuple[Event, ...] = ("terminal",)
    result_bytes: int = 0
    """Results of at most so many bytes of JSON go along; 0: none does."""
    cloud_events: bool = False
    ordered: bool = False
    rate_per_s: float = 0.0
    """Most deliveries a second; 0: as many as it takes."""
    concurrency: int = 0
    """Most deliveries under way; 0: the setting."""
    schedule_s: tuple[float, ...] = ()
    """Waits before the attempts, the first included; empty: the setting."""
    secrets: tuple[Secret, ...] = ()
    disabled: Disabled = ""
    created_at: float = 0.0
    enabled_at: float = 0.0
    """When an operator has last said that it takes webhooks: what had failed before counts no more."""

    def signing(self, now: float) -> tuple[Secret, ...]:
        """The secrets that sign now, the newest first."""
        return tuple(secret for secret in self.secrets if not secret.expires_at or secret.expires_at > now)


class Destination(NamedTuple):
    """Who is told of a task."""

    endpoint: str
    url: str
    """Of a task that names one; "" where the endpoint has it."""
    events: tuple[Event, ...]
    result_bytes: int
    ordered: bool


encode = msgspec.json.Encoder().encode
decode_endpoint = msgspec.json.Decoder(Endpoint).decode


def public_of(endpoint: Endpoint) -> Public:
    """What producers may read."""
    return Public(endpoint.tenant, bool(endpoint.disabled), bool(endpoint.secrets))


def failing_text(health: Mapping[str, Any]) -> str:
    """How an endpoint fares, for people: by what is kept of it, {} for well; "" for well."""
    failures = health.get("failures")
    return f"failing, {failures} times in a row: {health.get('last_error', '')}" if failures else ""


def check_name(name: str) -> str:
    """Check the name of an endpoint.

    Raises:
        InvalidInputError: it cannot be one.
    """
    if not NAME.fullmatch(name) or name.startswith(AD_HOC):
        raise InvalidInputError(
            "expected a name of an endpoint of 1 to 48 small letters, digits, '_', '.' and '-', beginning with a "
            f"letter or digit, and not with {AD_HOC!r}, given {name[:100]!r}"
        )
    return name


def check_schedule(waits_s: Sequence[float]) -> tuple[float, ...]:
    """Check the waits before the attempts of a delivery.

    Raises:
        InvalidInputError: none, too many, or one that is no number of seconds up to 7 days.
    """
    if not 1 <= len(waits_s) <= 30 or not all(0 <= wait_s <= 7 * 86_400 for wait_s in waits_s):
        raise InvalidInputError(
            f"expected 1 to 30 waits from 0 to {7 * 86_400} s, the first before the first attempt, given "
            f"{list(waits_s)}"
        )
    return tuple(float(wait_s) for wait_s in waits_s)
