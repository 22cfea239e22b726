"""How an endpoint of webhooks fares: whether and how much may be sent now, and when it is to be disabled.

Pure: it is told the time. One worker leads an endpoint, so one of these decides for all workers; what it knows is kept
on the broker, for the worker that leads after it.

Source of the breaker: M. Nygard, "Release It!", 2nd ed., 2018, "Circuit Breaker".
"""

from __future__ import annotations

import msgspec

FAILURES_TO_OPEN = 5
"""So many failures in a row open the breaker."""
OPEN_FIRST_S = 5.0
OPEN_MOST_S = 300.0
THROTTLED_S = 1.0
"""How long an endpoint is left alone that asks for it and does not say how long; it doubles each time."""
THROTTLED_MOST_S = 3600.0

GAP_MOST_S = 86_400.0
"""Failures further apart than this do not belong together: nobody knows how the endpoint fared in between."""
FAILURES_TO_DISABLE = 10
WARNED_AT = (50, 70, 90)
"""Parts of the time after which it is disabled, in percent, at which operators are warned."""


class Health(msgspec.Struct, omit_defaults=True):
    """Times in s since 1970."""

    failures: int = 0
    """In a row."""
    failing_since: float = 0.0
    last_failure_at: float = 0.0
    last_error: str = ""
    open_until: float = 0.0
    """The breaker lets nothing through before; after it, one."""
    opened: int = 0
    """How often in a row."""
    throttled_until: float = 0.0
    throttled: int = 0
    """How often in a row."""

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to remember."""
        return not self.failures and not self.throttled

    def may_send(self, now: float) -> int | None:
        """How many may be under way in all; None: no limit of its own."""
        if now < max(self.open_until, self.throttled_until):
            return 0
        return 1 if self.failures >= FAILURES_TO_OPEN or self.throttled else None

    def waits_s(self, now: float) -> float:
        """How long nothing is sent."""
        return max(self.open_until, self.throttled_until) - now

    def succeeded(self) -> bool:
        """A delivery has arrived; whether that changes anything."""
        changed = not self.is_well
        self.failures = self.opened = self.throttled = 0
        self.failing_since = self.last_failure_at = self.open_until = self.throttled_until = 0.0
        self.last_error = ""
        return changed

    def failed(self, now: float, error: str) -> None:
        """An attempt has failed."""
        if not self.failures or now - self.last_failure_at > GAP_MOST_S:
            self.failing_since, self.failures = now, 0
        self.failures += 1
        self.last_failure_at, self.last_error = now, error
        # What was under way when it opened says nothing new: many that fail at once count as one.
        if self.failures >= FAILURES_TO_OPEN and now >= self.open_until:
            self.open_until = now + min(OPEN_FIRST_S * 2.0**self.opened, OPEN_MOST_S)
            self.opened = min(self.opened + 1, 30)

    def throttle(self, now: float, retry_after_s: float | None) -> None:
        """The endpoint asks to be left alone, for so long."""
        wait_s = THROTTLED_S * 2.0**self.throttled if retry_after_s is None else retry_after_s
        if now >= self.throttled_until:
            self.throttled = min(self.throttled + 1, 30)
        elif retry_after_s is None:
            return  # of what was under way when it asked for it first
        self.throttled_until = max(self.throttled_until, now + min(wait_s, THROTTLED_MOST_S))

    def failing_part(self, disable_after_s: float) -> float:
        """How much of the time has passed after which it is disabled; from 1 on it is to be."""
        if self.failures < FAILURES_TO_DISABLE:
            return 0.0
        return (self.last_failure_at - self.failing_since) / disable_after_s

    def warning_level(self, disable_after_s: float) -> int:
        """The highest level of a warning that is reached, in percent; 0: none."""
        percent = self.failing_part(disable_after_s) * 100
        return max((level for level in WARNED_AT if percent >= level), default=0)


class Rate:
    """A token bucket: so many a second, and as many at once after a pause.

    Source: the token bucket of RFC 2697, with a burst of one second.
    """

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self._tokens = max(1.0, per_s)
        self._at = 0.0

    def allowed(self, now: float) -> int:
        """How many may begin now; `now` is any clock that only goes forward, in s."""
        most = max(1.0, self.per_s)
        self._tokens = min(most, self._tokens + max(0.0, now - self._at) * self.per_s)
        self._at = now
        return int(self._tokens)

    def take(self, count: int) -> None:
        """So many begin."""
        self._tokens -= count

    def next_s(self) -> float:
        """How long until one more may begin."""
        return max(0.0, (1.0 - self._tokens) / self.per_s)


decode_health = msgspec.json.Decoder(Health).decode
