"""Signatures of Standard Webhooks: `v1` (HMAC-SHA256) and `v1a` (ed25519), and the secrets that make them.

Source: Standard Webhooks 1.0 (standardwebhooks.com), "Signature scheme": what is signed is `id.timestamp.body`, the
header `webhook-signature` holds one or more signatures with a space between, each `<version>,<base64>`. ed25519 comes
from the package `cryptography`, which is loaded only where it is used.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import os
from base64 import b64encode
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from samphire.errors import InvalidInputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SECRET_PREFIX, PRIVATE_PREFIX, PUBLIC_PREFIX = "whsec_", "whsk_", "whpk_"
SECRET_BYTES = 32
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64
"""What the specification asks of a secret for `v1`."""
_ED25519_BYTES = 32


def new_secret() -> str:
    """A random secret for `v1`: `whsec_` and base64 of 32 bytes."""
    return SECRET_PREFIX + b64encode(os.urandom(SECRET_BYTES)).decode()


def new_key_pair() -> tuple[str, str]:
    """A random key pair for `v1a`: the private key (`whsk_…`), and the public one (`whpk_…`), base64 of 32 bytes each.

    Raises:
        InvalidInputError: the package `cryptography` is missing.
    """
    ed25519 = _ed25519()
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = key.private_bytes_raw(), key.public_key().public_bytes_raw()
    return PRIVATE_PREFIX + b64encode(private).decode(), PUBLIC_PREFIX + b64encode(public).decode()


def public_key_of(private: str) -> str:
    """The public key (`whpk_…`) of a private one; raises as `SigningKey.parse` does."""
    return PUBLIC_PREFIX + b64encode(SigningKey.parse(private).private_key.public_key().public_bytes_raw()).decode()


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise InvalidInputError("v1a needs the package cryptography: pip install 'samphire[webhooks]'") from error
    return ed25519


def _decoded(kind: str, text: str) -> bytes:
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, ValueError) as error:  # never the text itself: it is a secret
        raise InvalidInputError(f"expected {kind} in base64, given {len(text)} characters that are not") from error


def signed_content(webhook_id: str, timestamp: str, body: bytes) -> bytes:
    """What a signature signs."""
    return b".".join((webhook_id.encode(), timestamp.encode(), body))


@dataclass(frozen=True, repr=False)
class SigningKey:
    """What signs: a secret for `v1`, or a private key for `v1a`."""

    version: str
    """`v1` or `v1a`."""
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """Read `whsec_…` or `whsk_…`.

        Raises:
            InvalidInputError: it is neither.
        """
        if text.startswith(PRIVATE_PREFIX):
            raw = _decoded("a private key for v1a", text.removeprefix(PRIVATE_PREFIX))
            if len(raw) != _ED25519_BYTES:
                raise InvalidInputError(f"expected a private key of {_ED25519_BYTES} bytes, given {len(raw)}")
            return cls("v1a", raw)
        return cls("v1", secret_bytes(text))

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """The key of `v1a`."""
        return _private_key(self.raw)

    def sign(self, content: bytes) -> str:
        """The signature of a content, as it stands in the header."""
        if self.version == "v1a":
            return "v1a," + b64encode(self.private_key.sign(content)).decode()
        return "v1," + b64encode(hmac.digest(self.raw, content, hashlib.sha256)).decode()


def secret_bytes(text: str) -> bytes:
    """The bytes of a secret for `v1`, with or without its prefix.

    Raises:
        InvalidInputError: it is none.
    """
    raw = _decoded("a secret for v1", text.removeprefix(SECRET_PREFIX))
    if not SECRET_BYTES_MIN <= len(raw) <= SECRET_BYTES_MAX:
        raise InvalidInputError(
            f"expected a secret of {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, given {len(raw)}: "
            "give it as it was shown, whsec_… in base64"
        )
    return raw


@lru_cache(maxsize=256)
def _private_key(raw: bytes) -> Ed25519PrivateKey:
    key: Ed25519PrivateKey = _ed25519().Ed25519PrivateKey.from_private_bytes(raw)
    return key


@lru_cache(maxsize=256)
def public_key(text: str) -> Ed25519PublicKey:
    """The key that checks `v1a`, of `whpk_…`.

    Raises:
        InvalidInputError: it is none, or the package `cryptography` is missing.
    """
    raw = _decoded("a public key for v1a", text.removeprefix(PUBLIC_PREFIX))
    if len(raw) != _ED25519_BYTES:
        raise InvalidInputError(f"expected a public key of {_ED25519_BYTES} bytes, given {len(raw)}")
    key: Ed25519PublicKey = _ed25519().Ed25519PublicKey.from_public_bytes(raw)
    return key
