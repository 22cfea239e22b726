"""Connections to the broker, and redis-py's errors in Samphire's words."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,  # noqa: A004 - redis-py's name for it
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from samphire.errors import (
    BrokerMemoryFullError,
    BrokerRightError,
    BrokerUnavailableError,
    InvalidInputError,
    ProtocolError,
    SamphireError,
)

DEFAULT_BROKER_URL = "redis://localhost:6379/0"
_AWAY = ("READONLY", "MISCONF", "BUSY", "NOREPLICAS", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED")
"""Beginnings of errors that pass: a replica, a full disk, a slow script, a start, a wait that a new role ended."""
_IN_SCRIPT = "ACL failure in script"
"""How an error reads of a command in a script that the user may not run."""

CONNECT_TIMEOUT_S = 5.0


def connection_pool(url: str, name: str | None = None) -> ConnectionPool:
    """Where connections to the broker come from; none of them repeats a command by itself.

    redis-py retries lost replies silently by default; a script that moves messages must not run twice.

    Raises:
        InvalidInputError: the URL is not one of Redis.
    """
    check_broker_url(url)
    try:
        return ConnectionPool.from_url(
            url,
            client_name=name,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=None,  # DirectConnection has one timeout around each command
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        raise InvalidInputError(f"expected a broker URL redis://host:port/db: {error}") from error


def check_broker_url(url: str) -> None:
    """Whether a URL can be one of Redis, without connecting.

    Raises:
        InvalidInputError: it cannot.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("redis", "rediss", "unix") and parts.port != 0
    except ValueError as error:
        raise InvalidInputError(f"expected a broker URL redis://host:port/db: {error}") from error
    if not known:
        raise InvalidInputError(f"expected a broker URL redis://host:port/db, given {redact(url)!r}")


def redact(url: str) -> str:
    """The URL without its password, for messages and logs."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:***@{host}").geturl()


def translate(error: RedisError | OSError) -> SamphireError:
    """Return the Samphire error for one of redis-py's, or of the socket below it."""
    if isinstance(error, OSError):
        return BrokerUnavailableError(f"the broker is away: {error or type(error).__name__}", retry_after_s=1.0)
    if isinstance(error, OutOfMemoryError):
        return BrokerMemoryFullError(f"the broker refused a write: {error}", retry_after_s=5.0)
    if isinstance(error, NoPermissionError) or _IN_SCRIPT in str(error):
        return BrokerRightError(f"the broker does not allow its user what this takes: {error}; grant it (ACL SETUSER)")
    if isinstance(error, AuthenticationError | AuthorizationError):
        return InvalidInputError(f"the broker refused the credentials: {error}")
    if isinstance(error, ConnectionError | TimeoutError):
        return BrokerUnavailableError(f"the broker is away: {error}", retry_after_s=1.0)
    if isinstance(error, ResponseError) and "OOM " in str(error):
        return BrokerMemoryFullError(f"the broker refused a write: {error}", retry_after_s=5.0)
    if (isinstance(error, ResponseError) and str(error).startswith(_AWAY)) or isinstance(error, ReadOnlyError):
        return BrokerUnavailableError(f"the broker cannot write now: {error}", retry_after_s=1.0)
    return ProtocolError(f"the broker answered with an error: {type(error).__name__}: {error}")


def key_text(value: Any) -> str:
    """Decode a key or a field of a reply."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
