"""Secrets at rest: encrypted with AES-GCM, under keys that a deployment sets.

The key is `SAMPHIRE_SECRET_KEY` (base64 of 32 bytes; several, with commas between, while one replaces another: the
first encrypts, all decrypt), or what stands in the file `secret-key` of the data directory, which is made when it is
first needed. The name of what a secret belongs to is authenticated with it, so that none can be moved to another.

Source: NIST SP 800-38D (GCM), with random nonces of 96 bits.
"""

from __future__ import annotations

import binascii
import hashlib
import logging
import os
import uuid
from base64 import b64decode, b64encode
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from samphire.errors import InvalidInputError, SamphireError

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_NONCE_BYTES = 12
KEY_FILE = "secret-key"


class SecretUnreadableError(SamphireError):
    """A secret cannot be decrypted with the keys at hand."""

    default_message = "A secret cannot be decrypted with the keys at hand."


class SecretBox:
    """Encrypts and decrypts.

    Args:
        setting: `SAMPHIRE_SECRET_KEY`; "" where it is not set.
        data_dir: where the file with the key is, or will be.

    Raises:
        InvalidInputError: the setting, or the file, holds no keys.
    """

    def __init__(self, setting: str, data_dir: Path) -> None:
        self._file = data_dir.expanduser() / KEY_FILE
        self._from_setting = bool(setting)
        self._keys = dict(map(_key_of, setting.split(","))) if setting else {}
        if not setting:
            try:
                self._read_file()
            except InvalidInputError as error:  # who needs a key is told again
                logger.error("no secret of a webhook can be read: %s", error, extra={"action": "key_not_read"})

    @property
    def key_ids(self) -> tuple[str, ...]:
        """Names of the keys, the one that encrypts first; they tell nothing of the keys."""
        if not self._keys and not self._from_setting:
            self._read_file()  # it may have been made meanwhile
        return tuple(self._keys)

    @property
    def where(self) -> str:
        """Where the keys come from, for messages."""
        return "SAMPHIRE_SECRET_KEY" if self._from_setting else str(self._file)

    def make_key(self) -> None:
        """Make the file with the key, where neither it nor the setting is there."""
        if self.key_ids:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_name(f"{KEY_FILE}.{uuid.uuid4().hex}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(b64encode(os.urandom(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, self._file)  # whoever comes first: a key that was used must not be written over
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        self._read_file()

    def seal(self, name: str, secret: str) -> str:
        """Encrypt a secret of an endpoint."""
        self.make_key()
        key_id, key = next(iter(self._keys.items()))
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(key).encrypt(nonce, secret.encode(), name.encode())
        return f"{key_id}:{b64encode(nonce + sealed).decode()}"

    def open(self, name: str, sealed: str) -> str:
        """Decrypt it.

        Raises:
            SecretUnreadableError: it is encrypted under a key that is not here, was changed, or is another's.
        """
        key_id, _, text = sealed.partition(":")
        if key_id not in self._keys and not self._from_setting:
            self._read_file()
        key = self._keys.get(key_id)
        if key is None:
            raise SecretUnreadableError(
                f"the secret of {name!r} is encrypted under the key {key_id[:16]!r}, which is not in {self.where}: "
                "give workers and the samphire command the same SAMPHIRE_SECRET_KEY, or SAMPHIRE_DATA_DIR"
            )
        try:
            data = b64decode(text, validate=True)
            return AESGCM(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], name.encode()).decode()
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise SecretUnreadableError(
                f"the secret of {name!r} was changed on the broker, or belongs to another endpoint: rotate it"
            ) from error

    def _read_file(self) -> None:
        try:
            text = self._file.read_text().strip()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InvalidInputError(f"{self._file}: the key of the secrets cannot be read: {error}") from error
        self._keys = dict(map(_key_of, text.split(",")))


def _key_of(text: str) -> tuple[str, bytes]:
    try:
        key = b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidInputError(
            f"SAMPHIRE_SECRET_KEY: expected base64 of {KEY_BYTES} bytes, or several with commas between, given "
            f"{len(text)} characters that are not; make one with: openssl rand -base64 {KEY_BYTES}"
        )
    return hashlib.sha256(b"samphire key id" + key).hexdigest()[:8], key
