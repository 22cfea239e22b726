"""Which kind a message is of: by its name in Celery, and by the queue that it came from."""

from __future__ import annotations

from collections.abc import Iterable

from samphire.errors import InvalidInputError
from samphire.wire import keys
from samphire_workers.intake.request import Kind


class Kinds:
    """The kinds that a lane runs."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._by_task = {kind.task: kind for kind in kinds}
        self.queues = frozenset(kind.queue for kind in self._by_task.values() if kind.queue)
        """Queues that are a kind's own."""

    def get(self, task: object) -> Kind | None:
        """The kind of a task, by its name in Celery."""
        return self._by_task.get(task) if isinstance(task, str) else None

    def of(self, task: str, list_key: str) -> Kind:
        """The kind of a task that was claimed from a list.

        Raises:
            InvalidInputError: there is none, or it has another queue.
        """
        found = self._by_task.get(task)
        if found is not None and not found.queue and list_key.startswith(keys.INTAKE):
            return found
        queue, _ = keys.split_list(list_key)
        own = next((name for name in self.queues if queue == name or queue.startswith(f"{name}.")), "")
        if found is None or found.queue != own:
            where = f"the queue {own}" if own else "an inference queue"
            fitting = sorted(kind.task for kind in self._by_task.values() if kind.queue == own and not kind.is_errand)
            raise InvalidInputError(f"expected the task {' or '.join(fitting)} on {where}, given {task[:200]!r}")
        return found
