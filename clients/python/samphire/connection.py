"""Connections to the broker, and redis-py's errors in Samphire's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,  # noqa: A004 - redis-py's name for it
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)
from urllib.parse import urlsplit

from samphire.errors import (
    BrokerMemoryFullError,
    BrokerUnavailableError,
    InvalidInputError,
    ProtocolError,
    SamphireError,
)

DEFAULT_BROKER_URL = "redis://localhost:6379/0"
CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 15.0


def connect(
    url: str,
    *,
    name: str | None = None,
    single: bool = False,
    max_connections: int = 64,
    command_timeout_s: float | None = COMMAND_TIMEOUT_S,
) -> redis.asyncio.Redis:
    """A client of the broker that never repeats a command by itself.

    redis-py retries lost replies silently by default; a script that moves messages must not run twice.

    Raises:
        InvalidInputError: the URL is not one of Redis.
    """
    scheme = urlsplit(url).scheme
    if scheme not in ("redis", "rediss", "unix"):
        raise InvalidInputError(f"expected a broker URL redis://host:port/db, given {redact(url)!r}")
    try:
        return redis.asyncio.Redis.from_url(
            url,
            client_name=name,
            single_connection_client=single,
            max_connections=max_connections,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=command_timeout_s,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        raise InvalidInputError(f"expected a broker URL redis://host:port/db: {error}") from error


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
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
        return InvalidInputError(f"the broker refused the credentials: {error}")
    if isinstance(error, ConnectionError | TimeoutError):
        return BrokerUnavailableError(f"the broker is away: {error}", retry_after_s=1.0)
    if isinstance(error, ResponseError) and "OOM " in str(error):
        return BrokerMemoryFullError(f"the broker refused a write: {error}", retry_after_s=5.0)
    return ProtocolError(f"the broker answered with an error: {type(error).__name__}: {error}")


@contextmanager
def broker_errors() -> Iterator[None]:
    """Translate redis-py's errors, and the socket's below them, raised in the block."""
    try:
        yield
    except SamphireError:
        raise
    except (RedisError, OSError) as error:
        raise translate(error) from error


def key_text(value: Any) -> str:
    """Decode a key or a field of a reply."""
    return value.decode() if isinstance(value, bytes) else str(value)
