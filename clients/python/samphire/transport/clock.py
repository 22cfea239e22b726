"""The broker's clock, which is the one that counts: delays, deadlines and expiries of all clients and workers go by it.

Source: the offset of two clocks is estimated as in NTP (RFC 5905): the other's time against the middle of the round
trip. Between two looks this process's monotonic clock goes on, so steps of its wall clock change nothing.
"""

from __future__ import annotations

import time

from samphire.errors import SamphireError
from samphire.transport.direct import DirectConnection

FRESH_S = 30.0
"""A client looks at the broker's clock again after this long."""
ROUND_TRIP_MAX_S = 0.5
"""A look that took longer is believed only where there is none yet, and the next question looks again."""


class BrokerClock:
    """Tells the time by the broker's clock; by this machine's until it was looked at."""

    def __init__(self, connection: DirectConnection) -> None:
        self._connection = connection
        self._ahead_of_monotonic_s: float | None = None
        self._looked_at = 0.0

    def now(self) -> float:
        """The time in s since 1970."""
        ahead_s = self._ahead_of_monotonic_s
        return time.time() if ahead_s is None else time.monotonic() + ahead_s

    @property
    def is_known(self) -> bool:
        """Whether the broker was asked."""
        return self._ahead_of_monotonic_s is not None

    @property
    def skew_s(self) -> float:
        """How far this machine's clock is ahead of the broker's."""
        return time.time() - self.now()

    async def look(self) -> None:
        """Ask the broker for its time.

        Raises:
            SamphireError: it does not tell.
        """
        began = time.monotonic()
        seconds, microseconds = await self._connection.ask("TIME")
        ended = time.monotonic()
        believed = ended - began <= ROUND_TRIP_MAX_S
        if believed or not self.is_known:
            self._ahead_of_monotonic_s = int(seconds) + int(microseconds) / 1e6 - (began + ended) / 2
        if believed:
            self._looked_at = ended

    async def fresh_now(self) -> float:
        """The time, after a look if the last one is old; where the broker does not tell, as far as it is known."""
        if not self.is_known or time.monotonic() - self._looked_at > FRESH_S:
            try:
                await self.look()
            except SamphireError:
                self._looked_at = time.monotonic()  # what needs the broker will say so
        return self.now()
