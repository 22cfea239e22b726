"""How far ahead to claim: as many tasks of a model as it answers within a moment.

What a worker holds, no other worker can take and no urgent task can overtake. So each model has a limit
of tasks held, which grows while they are done soon after they were claimed and shrinks when they are not.
"""

from __future__ import annotations

from collections import Counter

SOON_S = 0.1
LATE_S = 0.5
FIRST_LIMIT = 16


class AdaptiveLimits:
    """Limits of tasks held, by model."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limits: dict[str, int] = {}
        self._fixed: set[str] = set()
        self._held: Counter[str] = Counter()

    def room(self, model: str) -> int:
        """How many more tasks of the model to claim."""
        return max(0, self._limits.get(model, min(FIRST_LIMIT, self._most)) - self._held[model])

    def fix(self, model: str, limit: int) -> None:
        """Hold as many of a model whatever they take: they are streams, which go on side by side."""
        self._limits[model] = min(limit, self._most)
        self._fixed.add(model)

    def held(self, model: str) -> int:
        """How many tasks of the model are held."""
        return self._held[model]

    def claimed(self, model: str) -> None:
        """A task of the model is held."""
        self._held[model] += 1

    def let_go(self, model: str) -> None:
        """A task of the model is held no longer."""
        self._held[model] -= 1

    def took(self, model: str, seconds: float) -> None:
        """A micro-batch was done so long after its messages were claimed."""
        if model in self._fixed:
            return
        limit = self._limits.get(model, min(FIRST_LIMIT, self._most))
        if seconds < SOON_S:
            self._limits[model] = min(2 * limit, self._most)
        elif seconds > LATE_S:
            self._limits[model] = max(limit // 2, 1)
