"""Waiting between tries of what does not work now.

Source: exponential backoff with equal jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog,
2015).
"""

from __future__ import annotations

import random


class Pauses:
    """The pauses between tries: what a pause may last at most doubles each time, and how long it lasts, from half of
    that on, is drawn by lot, so that not all who wait for a broker come back at once.

    Args:
        first_s: the first is at most so long, and at least half of it.
        cap_s: none is longer.
    """

    def __init__(self, first_s: float, cap_s: float) -> None:
        self._first_s = self._longest_s = first_s
        self._cap_s = cap_s

    def next_s(self) -> float:
        """The next pause, in s."""
        longest_s = self._longest_s
        self._longest_s = min(2 * longest_s, self._cap_s)
        return longest_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It has worked: the next pause is as short as the first."""
        self._longest_s = self._first_s
