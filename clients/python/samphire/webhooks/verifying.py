"""For receivers: whether a webhook is what Samphire has sent, and what it says.

>>> event = samphire.webhooks.verify(request.body, request.headers, "whsec_…")
>>> event.type, event.data["task_id"]

Whatever arrives, the answer is an event or one class of error, `WebhookVerificationError`: a receiver answers 400 to
it. Keep the ids of what you have handled: a delivery is repeated, under the same id, until it was answered with 2xx.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from samphire.errors import InvalidInputError, WebhookVerificationError
from samphire.webhooks.signing import (
    PRIVATE_PREFIX,
    PUBLIC_PREFIX,
    public_key,
    secret_bytes,
    signed_content,
)

TOLERANCE_S = 300.0
"""How far a timestamp may be from now, before or after: as the specification's libraries have it."""
_DIGITS = re.compile(r"[0-9]{1,15}")
_ID = re.compile(r"[\x21-\x7e]{1,256}")
_SIGNATURES_MAX = 64
"""More signatures than a sender has secrets: what comes after them is not looked at."""

_NAMES = ("webhook-id", "webhook-timestamp", "webhook-signature", "samphire-watermark")

Headers = Mapping[Any, Any] | Iterable[tuple[Any, Any]]
Secrets = str | Sequence[str]


@dataclass(frozen=True)
class WebhookEvent:
    """A webhook that was verified."""

    id: str
    """The same for each attempt of a delivery: what was handled under it need not be handled again."""
    timestamp: datetime
    """When this attempt was sent."""
    type: str
    """`task.succeeded`, `task.failed`, `task.cancelled`, `task.expired`, `task.started`, `task.progress` or `test`."""
    data: dict[str, Any] = field(default_factory=dict)
    """What it says: `task_id`, `state`, times, `sequence` (it grows with each event of a task), and more."""
    watermark: int | None = None
    """Number of the delivery at its endpoint; it grows. Not signed: keep the highest, to ask for what came after it."""


def verify(
    body: bytes | str,
    headers: Headers,
    secrets: Secrets,
    *,
    tolerance_s: float = TOLERANCE_S,
    now_s: float | None = None,
) -> WebhookEvent:
    """Check the signature of a webhook, and read it.

    Args:
        body: as it came, byte for byte; not JSON that was read and written again.
        headers: of the request, a mapping or pairs; names in any case, text or bytes.
        secrets: `whsec_…` (`v1`), or `whpk_…` (the public key of `v1a`); several while one is replaced by another.
        tolerance_s: how far its timestamp may be from now.
        now_s: the time in s since 1970; by default this machine's.

    Raises:
        WebhookVerificationError: it is not what Samphire has sent with one of these secrets, or too long ago.
        InvalidInputError: the receiver's own fault: no secrets, malformed ones, a tolerance that is none, or no
            package `cryptography` where a public key is given.
    """
    keys = _checkers(secrets)
    tolerance_s = _checked_tolerance(tolerance_s)
    now = time.time() if now_s is None else now_s
    found = _named(headers)
    webhook_id, timestamp, signatures = (_required(found, name) for name in _NAMES[:3])
    if not _ID.fullmatch(webhook_id):
        raise WebhookVerificationError("webhook-id is no id")
    if not _DIGITS.fullmatch(timestamp):
        raise WebhookVerificationError("webhook-timestamp: expected whole seconds since 1970 in digits")
    if not abs(now - int(timestamp)) <= tolerance_s:
        raise WebhookVerificationError(
            f"webhook-timestamp is {now - int(timestamp):+.0f} s from now, more than {tolerance_s:g} s: a replay, or "
            "this machine's clock is wrong"
        )
    raw = _bytes_of(body)
    content = signed_content(webhook_id, timestamp, raw)
    if not _some_match(signatures, content, keys):
        raise WebhookVerificationError(
            "no signature fits: another secret, or a body that was changed on its way (give the bytes as they came)"
        )
    return _event(webhook_id, int(timestamp), raw, found.get(_NAMES[3]))


Checker = tuple[str, Callable[[bytes, bytes], bool]]
"""Version of a signature, and whether one (bytes) is of a content."""


def _checkers(secrets: Secrets) -> list[Checker]:
    listed = [secrets] if isinstance(secrets, str) else list(secrets)
    if not listed or not all(isinstance(secret, str) for secret in listed):
        raise InvalidInputError("expected a secret or several (whsec_… or whpk_…), given none, or something else")
    return [_checker(secret) for secret in listed]


def _checker(secret: str) -> Checker:
    if secret.startswith(PRIVATE_PREFIX):
        raise InvalidInputError(
            "expected the public key (whpk_…), given the private one: it belongs to the sender only"
        )
    if secret.startswith(PUBLIC_PREFIX):
        key = public_key(secret)

        def fits(signature: bytes, content: bytes) -> bool:
            from cryptography.exceptions import InvalidSignature

            try:
                key.verify(signature, content)
            except InvalidSignature:
                return False
            return True

        return "v1a", fits
    raw = secret_bytes(secret)
    return "v1", lambda signature, content: hmac.compare_digest(signature, hmac.digest(raw, content, hashlib.sha256))


def _checked_tolerance(tolerance_s: object) -> float:
    is_number = isinstance(tolerance_s, int | float) and not isinstance(tolerance_s, bool)
    if not is_number or not math.isfinite(tolerance_s) or tolerance_s < 0:  # type: ignore[arg-type,operator]
        raise InvalidInputError(f"expected tolerance_s as a finite number of at least 0, given {tolerance_s!r}")
    return float(tolerance_s)  # type: ignore[arg-type]


def _named(headers: Headers) -> dict[str, str]:
    """The headers that matter, by their names in small letters.

    Raises:
        WebhookVerificationError: they are no headers, or one of these stands there twice.
    """
    try:
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
        found: dict[str, str] = {}
        for name, value in pairs:
            text = _text_of(name).lower()
            if text not in _NAMES:
                continue
            if text in found:
                raise WebhookVerificationError(f"{text} stands there twice")
            found[text] = _text_of(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise WebhookVerificationError("the headers are no names with values") from error
    return found


def _text_of(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")  # as HTTP has it
    if not isinstance(value, str):
        raise WebhookVerificationError("a header is no text")
    return value


def _required(found: Mapping[str, str], name: str) -> str:
    value = found.get(name)
    if not value:
        raise WebhookVerificationError(f"there is no header {name}")
    return value


def _bytes_of(body: object) -> bytes:
    if isinstance(body, str):
        try:
            return body.encode()
        except UnicodeEncodeError as error:
            raise WebhookVerificationError("the body is no text") from error
    if not isinstance(body, bytes | bytearray | memoryview):
        raise WebhookVerificationError("expected the body as bytes")
    return bytes(body)


def _some_match(signatures: str, content: bytes, keys: Sequence[Checker]) -> bool:
    matched = False
    for entry in signatures.split(" ")[:_SIGNATURES_MAX]:
        version, _, encoded = entry.partition(",")
        try:
            signature = binascii.a2b_base64(encoded.encode("ascii"), strict_mode=True)
        except (binascii.Error, ValueError):
            continue
        for of, fits in keys:
            if of == version and fits(signature, content):
                matched = True
    return matched


def _event(webhook_id: str, timestamp: int, raw: bytes, watermark: str | None) -> WebhookEvent:
    try:
        payload = msgspec.json.decode(raw)
        kind, data = payload["type"], payload["data"]
        if not isinstance(kind, str) or not isinstance(data, dict):
            raise TypeError(kind)
        at = datetime.fromtimestamp(timestamp, UTC)
    except (msgspec.DecodeError, TypeError, KeyError, ValueError, OverflowError, OSError, RecursionError) as error:
        raise WebhookVerificationError("the body is signed, and is no event of Samphire's") from error
    number = int(watermark) if watermark is not None and _DIGITS.fullmatch(watermark) else None
    return WebhookEvent(webhook_id, at, kind, data, number)
