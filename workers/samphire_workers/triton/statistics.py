"""What Triton tells of the times that requests took inside it.

Source: Triton's statistics extension (`ModelStatistics`): sums since the model was loaded. Two looks give the mean of
the requests between them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from samphire.errors import SamphireError
from samphire_workers.triton.endpoint import Endpoint

LOOK_S = 1.0
"""Between two looks at a version of a model at an endpoint."""
REST_S = 60.0
"""An endpoint that does not tell is not asked for so long."""
KNOWN_MAX = 1000


class Averages(NamedTuple):
    """Means of the requests between two looks, in s; None where that is not known."""

    queue_s: float | None = None
    compute_s: float | None = None


NOT_KNOWN = Averages()


class _Known:
    """What was last seen of a version of a model at an endpoint."""

    __slots__ = ("averages", "look_at", "sums")

    def __init__(self, look_at: float) -> None:
        self.look_at = look_at
        self.sums = (0, 0, 0, 0)
        self.averages = NOT_KNOWN


class Statistics:
    """Looks at what Triton tells, so seldom that nobody notices.

    Args:
        begin: begins what goes on beside, in a task that somebody owns.
        now: a monotonic clock.
    """

    def __init__(self, begin: Callable[[Coroutine[Any, Any, None]], None], now: Callable[[], float]) -> None:
        self._begin = begin
        self._now = now
        self._known: dict[tuple[str, str, str], _Known] = {}

    async def averages(self, endpoint: Endpoint, model: str, version: str) -> Averages:
        """The means of the last look. Who asks first waits for one; later ones go on beside, for who comes after."""
        key = (endpoint.url, model, version)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            known = self._known[key] = _Known(self._now() + LOOK_S)
            await self._look(known, endpoint, model, version)
        elif (now := self._now()) >= known.look_at:
            known.look_at = now + LOOK_S
            self._begin(self._look(known, endpoint, model, version))
        return known.averages

    async def _look(self, known: _Known, endpoint: Endpoint, model: str, version: str) -> None:
        try:
            told = await endpoint.statistics(model, version)
        except SamphireError:
            known.look_at, known.averages = self._now() + REST_S, NOT_KNOWN
        else:
            _learn(known, told)


def _learn(known: _Known, told: Any) -> None:
    """Take in the `InferStatistics` of a version, None where the server knows nothing of it."""
    if told is None:
        known.averages = NOT_KNOWN
        return
    computed = (told.compute_input, told.compute_infer, told.compute_output)
    sums = (told.queue.count, told.queue.ns, told.compute_infer.count, sum(part.ns for part in computed))
    since = tuple(new - old for new, old in zip(sums, known.sums, strict=True))
    known.sums = sums
    if min(since) < 0:  # it was loaded again
        since = sums
    known.averages = Averages(_mean_s(since[0], since[1]), _mean_s(since[2], since[3]))


def _mean_s(count: int, ns: int) -> float | None:
    return ns / count / 1e9 if count else None
