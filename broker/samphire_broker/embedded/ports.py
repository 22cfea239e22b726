"""Choosing ports on loopback."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


class PortTakenError(Exception):
    """A port that the stack needs is taken."""


def choose_port(port: int, flag: str) -> int:
    """Return `port` when it is free on loopback, or some free port when `port` is 0.

    A port that the system chose stays reserved until this process ends: it is bound and not listened on. The
    server that it is meant for can bind it all the same, since servers set SO_REUSEADDR. Nobody else is given it,
    neither before that server has started nor while it is restarted.

    Raises:
        PortTakenError: the port is in use; the message names the flag that changes it.
    """
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))
        if port == 0:
            port = int(probe.getsockname()[1])
            probe.detach()  # the file descriptor stays open, and is not inherited
    except OSError as error:
        raise PortTakenError(
            f"port {port} on {LOOPBACK} is taken ({error.strerror}): "
            f"choose another with {flag} PORT, or {flag} 0 for a free one"
        ) from error
    finally:
        probe.close()
    return port
