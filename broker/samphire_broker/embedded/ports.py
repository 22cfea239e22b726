"""Choosing ports on loopback."""

from __future__ import annotations

import socket
from collections.abc import Mapping

LOOPBACK = "127.0.0.1"


class PortTakenError(Exception):
    """A port that the stack needs is taken."""


def choose_ports(asked: Mapping[str, int]) -> dict[str, int]:
    """The port of each flag, as `choose_port` has it.

    Raises:
        PortTakenError: some are in use; the message names them all, and how to change them.
    """
    chosen: dict[str, int] = {}
    taken: list[str] = []
    for flag, port in asked.items():
        if port and port in chosen.values():
            taken.append(f"port {port} of {flag} is that of another flag")
            continue
        try:
            chosen[flag] = choose_port(port, flag)
        except PortTakenError as error:
            taken.append(str(error))
    if len(taken) > 1:
        raise PortTakenError("\n".join([*taken, "--ports free chooses a free one for all of them"]))
    if taken:
        raise PortTakenError(f"{taken[0]}; --ports free chooses free ones for all parts")
    return chosen


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
