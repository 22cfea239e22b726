"""Models that were never loaded: after a while their tasks fail, where that is wished, instead of waiting for ever."""

from __future__ import annotations

import time


class Unserved:
    """Knows since when no endpoint serves a model that none has ever served.

    Args:
        timeout_s: after so long its tasks fail; None: they wait.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._served: set[str] = set()
        self._since: dict[str, float] = {}

    def is_away(self, model: str) -> None:
        """All endpoints answer, and none of them serves this model."""
        if self._timeout_s is not None and model not in self._served:
            self._since.setdefault(model, time.monotonic())

    def is_served(self, model: str) -> None:
        """An endpoint serves it; from now on its tasks wait whenever it is away."""
        self._served.add(model)
        self._since.pop(model, None)

    def is_unknown(self, model: str) -> None:
        """No endpoint has it: its tasks fail anyway."""
        self._since.pop(model, None)

    def begin_again(self) -> None:
        """An endpoint does not answer: nothing is known of what it will serve."""
        self._since.clear()

    def given_up(self) -> set[str]:
        """The models whose tasks are to fail."""
        if self._timeout_s is None or not self._since:
            return set()
        latest = time.monotonic() - self._timeout_s
        return {model for model, since in self._since.items() if since <= latest}
