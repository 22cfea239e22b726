"""Choosing ports on loopback."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


class PortTakenError(Exception):
    """A port that the stack needs is taken."""


def choose_port(port: int, flag: str) -> int:
    """Return `port` when it is free on loopback, or some free port when `port` is 0.

    Raises:
        PortTakenError: the port is in use; the message names the flag that changes it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise PortTakenError(
                f"port {port} on {LOOPBACK} is taken ({error.strerror}): "
                f"choose another with {flag} PORT, or {flag} 0 for a free one"
            ) from error
        return int(probe.getsockname()[1])
