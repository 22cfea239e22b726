"""What a kind of task is: how its message is read, and who runs it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from samphire.errors import InvalidInputError
from samphire.wire.contract import Envelope
from samphire_broker.settings import Settings
from samphire_workers.intake.request import Request

Run = Callable[[Request], Coroutine[Any, Any, Any]]
"""Brings a task to its result."""


@dataclass(frozen=True)
class Kind:
    """One kind of task; the lane has them in a table (`lane/kinds.py`)."""

    task: str
    """Its name in Celery."""
    read: Callable[[Request, Envelope, Settings], None]
    """Reads a message into the request; raises InvalidInputError for one that is not understood."""
    run: Run | None
    """Brings one to its result, which JSON can hold; whatever it raises is the attempt's failure. None: requests are
    checked against their model, joined with others, and asked of Triton."""
    is_errand: bool = False
    """It has no attempts, and no result: `run` returns the next steps that go out with its end, if any."""
    queue: str = ""
    """A queue of its own; "": the queues of inferences."""


class Kinds:
    """The table of the kinds that a lane runs."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._by_task = {kind.task: kind for kind in kinds}
        self.queues = frozenset(kind.queue for kind in self._by_task.values() if kind.queue)
        """Queues that are a kind's own."""

    def get(self, task: object) -> Kind | None:
        """The kind of a task, by its name in Celery."""
        return self._by_task.get(task) if isinstance(task, str) else None

    def of(self, task: str, queue: str) -> Kind:
        """The kind of a task that was claimed from a queue.

        Raises:
            InvalidInputError: there is none, or it has another queue.
        """
        found = self._by_task.get(task)
        own = queue if queue in self.queues else ""
        if found is None or found.queue != own:
            where = f"the queue {own}" if own else "an inference queue"
            fitting = sorted(kind.task for kind in self._by_task.values() if kind.queue == own and not kind.is_errand)
            raise InvalidInputError(f"expected the task {' or '.join(fitting)} on {where}, given {task[:200]!r}")
        return found
