"""Tasks that a monitor has seen being sent: producers with `task_send_sent_event` tell it, and it waits for their end.

A lane shows monitors a sample of its successes. Of a task whose sending was told they would wait for ever, so each
worker listens to what producers tell, and the end of such a task is always sent, at a bounded rate.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict, deque
from typing import Any, NamedTuple

from celery import Celery
from msgspec import UnsetType

from samphire.transport.repeat import Pauses
from samphire.wire.timings import Timings

logger = logging.getLogger(__name__)

SENT_MAX = 100_000
"""Tasks that were sent and have not ended, as far as they are remembered; the oldest are forgotten first."""
ENDED_MAX = 20_000
"""Tasks that have ended and whose sending was not heard of yet."""
LISTEN_S = 1.0
RETRY_S = 0.5
RETRY_CAP_S = 5.0


class End(NamedTuple):
    """How a task has succeeded."""

    at: float
    """In s since 1970."""
    runtime_s: float
    timings: Timings | UnsetType


class SentTasks:
    """What is heard of tasks that were sent, and which of their ends are still to be told."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._sent: OrderedDict[str, None] = OrderedDict()
        self._ended: OrderedDict[str, End] = OrderedDict()
        self._to_tell: deque[tuple[str, End]] = deque(maxlen=SENT_MAX)
        self._stopped = threading.Event()

    def ended(self, task_id: str, end: End) -> None:
        """A task has ended of which nothing was shown."""
        with self._lock:
            if task_id in self._sent:
                del self._sent[task_id]
                self._to_tell.append((task_id, end))
                return
            self._ended[task_id] = end
            if len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)

    def shown(self, task_id: str) -> None:
        """The end of a task was told."""
        if self._sent:
            with self._lock:
                self._sent.pop(task_id, None)

    def take(self, most: int) -> list[tuple[str, End]]:
        """Ends that are to be told now, by task."""
        with self._lock:
            return [self._to_tell.popleft() for _ in range(min(most, len(self._to_tell)))]

    def listen(self) -> None:
        """Listen in a thread of its own, until `stop`."""
        threading.Thread(target=self._listen, name="samphire-sent", daemon=True).start()

    def stop(self) -> None:
        """End the thread, soon."""
        self._stopped.set()

    def _sent_event(self, event: dict[str, Any]) -> None:
        task_id = event.get("uuid")
        if not isinstance(task_id, str):
            return
        with self._lock:
            if (end := self._ended.pop(task_id, None)) is not None:  # it was quicker than its event
                self._to_tell.append((task_id, end))
                return
            self._sent[task_id] = None
            if len(self._sent) > SENT_MAX:
                self._sent.popitem(last=False)

    def _listen(self) -> None:
        pauses = Pauses(RETRY_S, RETRY_CAP_S)
        while not self._stopped.is_set():
            try:
                with self._app.connection_for_read() as connection:
                    handlers = {"task-sent": self._sent_event}
                    receiver = self._app.events.Receiver(connection, handlers=handlers, routing_key="task.sent")
                    with receiver.consumer_context() as (consuming, _, _):  # a connection of its own
                        pauses.reset()
                        while not self._stopped.is_set():
                            with contextlib.suppress(TimeoutError):
                                consuming.drain_events(timeout=LISTEN_S)
            except Exception as error:  # noqa: BLE001 - whatever the broker refuses now, it may allow later
                logger.warning(
                    "task-sent events are not heard, so Flower may show ended tasks as sent; it is tried again: %s",
                    error,
                    extra={"action": "sent_failed"},
                )
                self._stopped.wait(pauses.next_s())
