"""Connections to the broker, and redis-py's errors in Samphire's words."""

from __future__ import annotations

import socket
from typing import Any

from redis import Redis
from redis.asyncio.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection
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
from redis.retry import Retry as BlockingRetry

from samphire.errors import (
    BrokerMemoryFullError,
    BrokerRightError,
    BrokerUnavailableError,
    InvalidInputError,
    ProtocolError,
    SamphireError,
)
from samphire.transport.address import Address

_AWAY = ("READONLY", "MISCONF", "BUSY", "NOREPLICAS", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED")
"""Beginnings of errors that pass: a replica, a full disk, a slow script, a start, a wait that a new role ended."""
_IN_SCRIPT = "ACL failure in script"
"""How an error reads of a command in a script that the user may not run."""

CONNECT_TIMEOUT_S = 5.0
KEEPALIVE = {
    getattr(socket, name): value
    for name, value in {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}.items()
    if hasattr(socket, name)
}
"""Times in s, and how many probes: routers forget connections on which nothing is sent for minutes."""


def connection_pool(address: Address, name: str | None = None) -> ConnectionPool:
    """Where connections to the broker come from; none of them repeats a command by itself.

    redis-py retries lost replies silently by default; a script that moves messages must not run twice.
    """
    options = address.connection_options
    if address.path:
        options["connection_class"] = UnixDomainSocketConnection
    else:
        options["socket_keepalive"] = True
        options["socket_keepalive_options"] = KEEPALIVE
        if address.tls is not None:
            options["connection_class"] = SSLConnection
    return ConnectionPool(
        **options,
        client_name=name,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=None,  # DirectConnection has one timeout around each command
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )


def client_of(address: Address, timeout_s: float) -> Redis:
    """A blocking client of redis-py's, for looking around; it repeats nothing either."""
    options = address.connection_options
    if address.path:
        options["unix_socket_path"] = options.pop("path")
    elif address.tls is not None:
        options["ssl"] = True
    return Redis(
        **options,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=BlockingRetry(NoBackoff(), 0),
        protocol=2,
    )


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
