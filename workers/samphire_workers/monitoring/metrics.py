"""Figures for Prometheus, one endpoint a worker. docs/metrics.md says which question each of them answers.

Names follow https://prometheus.io/docs/practices/naming. The values of labels are bounded: model names come from
producers, so those that are not served, and those beyond `MODELS_MAX`, are counted together.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from samphire.errors import SamphireError
from samphire_workers.intake.request import home_of
from samphire_workers.monitoring.collectors import Changing, Count, Spread
from samphire_workers.monitoring.observers import BatchSeen, LaneSeen, Observer, QueueSeen, TaskSeen

logger = logging.getLogger(__name__)

MODELS_MAX = 200
"""Models that have figures of their own."""
LISTS_MAX = 400
"""Lists of queues that have figures of their own, those that hold most."""
OTHER = "(other)"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WAITS = (*SECONDS, 300, 1800, 7200)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics(Observer):
    """Counts what a worker does, over all of its lanes.

    Args:
        worker: its name, as Celery and Flower show it.
    """

    wants_states = True

    def __init__(self, worker: str) -> None:
        self.registry = at = CollectorRegistry()
        self._models: set[str] = set()
        Gauge("samphire_worker", "This worker; always 1.", ["worker"], registry=at).labels(worker).set(1)
        self._claims = Count(at, "samphire_claims", "Tasks claimed.", "model")
        self._ends = Count(at, "samphire_tasks", "Tasks that have ended, by their outcome.", "model", "outcome")
        self._retries = Count(at, "samphire_retries", "Attempts that another follows.", "model", "error")
        self._released = Count(at, "samphire_released", "Started tasks that went back to their queues.", "model")
        self._dead = Count(at, "samphire_dead_letters", "Tasks given up.", "model", "reason")
        self._waits = Spread(
            at, "samphire_queue_seconds", "From submit to start, if its producer says when.", WAITS, "model"
        )
        self._calls = Spread(at, "samphire_triton_seconds", "Calls of Triton.", SECONDS, "model")
        self._failures = Count(at, "samphire_triton_errors", "Calls of Triton without an answer.", "model", "error")
        self._batches = Spread(at, "samphire_batch_tasks", "Tasks of a micro-batch.", SIZES, "model")
        self._outputs = Count(at, "samphire_stream_outputs", "Outputs that streams gave out.", "model")
        self._output_bytes = Count(at, "samphire_stream_bytes", "Bytes of these outputs.", "model")
        self._settling = Spread(at, "samphire_settle_seconds", "Calls of the broker that end tasks.", SECONDS)
        self._lapses = Count(at, "samphire_lease_losses", "Times that the lease of this worker had lapsed.")
        self._held = Gauge("samphire_held_tasks", "Tasks that this worker holds.", registry=at)
        self._held_bytes = Gauge("samphire_held_bytes", "Bytes of their messages.", registry=at)
        self._up = Gauge("samphire_endpoint_up", "Whether a Triton answers.", ["endpoint"], registry=at)
        self._letters = Gauge("samphire_dead_letters_kept", "Dead letters that are kept.", registry=at)
        self._breakers = Changing(at, "samphire_breaker_open", "Models that are away on a Triton.", "endpoint", "model")
        self._depths = Changing(at, "samphire_queue_depth", "Tasks that wait in a queue.", "queue", "priority")
        self._oldest = Changing(
            at,
            "samphire_queue_oldest_seconds",
            "Age of the task that is next in a queue, if its producer says when it submitted it.",
            "queue",
            "priority",
        )

    def serve(self, host: str, port: int) -> Server:
        """Answer Prometheus, in threads of their own; raises OSError where the port is taken."""
        server, thread = start_http_server(port, host.strip("[]"), self.registry)
        return Server(host, server, thread)

    def claimed(self, list_key: str, tasks: int) -> None:
        """Tasks were claimed from a list."""
        self._claims.add(self._known(home_of(list_key)[0]), count=tasks)

    def started(self, tasks: Sequence[TaskSeen]) -> None:
        """These begin to run."""
        for task in tasks:
            headers = task.headers
            if headers is not None and headers.samphire_sent_at and not task.attempts and not headers.eta:
                self._waits.add(max(0.0, task.at - headers.samphire_sent_at), self._known(task.model))

    def answered(self, batch: BatchSeen) -> None:
        """Triton has answered a micro-batch, or has not."""
        model = self._known(batch.model)
        self._calls.add(batch.seconds, model)
        self._batches.add(batch.tasks, model)
        if batch.error:
            self._failures.add(model, batch.error)

    def streamed(self, model: str, outputs: int, nbytes: int) -> None:
        """A stream has ended, however."""
        self._outputs.add(self._known(model), count=outputs)
        self._output_bytes.add(self._known(model), count=nbytes)

    def succeeded(self, tasks: Sequence[TaskSeen], timings: Sequence[object]) -> None:
        """These have their answers."""
        for model, count in Counter([task.model for task in tasks]).items():
            self._ends.add(self._known(model), "succeeded", count=count)

    def released(self, task: TaskSeen) -> None:
        """A task goes back to its queue."""
        if task.started_at is not None:
            self._released.add(self._known(task.model))

    def failed(self, task: TaskSeen, error: SamphireError, reason: str) -> None:
        """A task ends as a dead letter."""
        model = self._known(task.model)
        self._ends.add(model, "failed")
        self._dead.add(model, reason)

    def retried(self, task: TaskSeen, error: SamphireError) -> None:
        """An attempt failed; the task will be tried again."""
        self._retries.add(self._known(task.model), type(error).__name__)

    def revoked(self, task: TaskSeen, expired: bool) -> None:
        """A task was cancelled, or has expired, and is dropped."""
        self._ends.add(self._known(task.model), "expired" if expired else "cancelled")

    def cancelled(self, task_id: str) -> None:
        """A task is cancelled whose message lies in a queue."""
        self._ends.add(OTHER, "cancelled")

    def settled(self, tasks: int, seconds: float) -> None:
        """The broker has taken so many ends with one call."""
        self._settling.add(seconds)

    def lease_lost(self) -> None:
        """The lease of this worker had lapsed."""
        self._lapses.add()

    def looked(self, lane: LaneSeen) -> None:
        """What the lane holds, every second."""
        self._held.set(lane.held)
        self._held_bytes.set(lane.held_bytes)
        for url, answers in lane.endpoints.items():
            self._up.labels(url).set(answers)
        self._breakers.set({(url, self._known(model)): 1.0 for url, model in lane.breakers})

    def served(self, model: str) -> None:
        """A model is served that was not known: it has figures of its own, if there is room."""
        if len(self._models) < MODELS_MAX:
            self._models.add(model)

    def counted(self, queues: Sequence[QueueSeen]) -> None:
        """What lies in the queues, every few seconds."""
        most = sorted(queues, key=lambda seen: -seen.depth)
        depths: dict[tuple[str, ...], float] = {}
        for seen in most[:LISTS_MAX]:
            depths[seen.queue, str(seen.priority)] = float(seen.depth)
        if rest := sum(seen.depth for seen in most[LISTS_MAX:]):
            depths[OTHER, ""] = float(rest)
        self._depths.set(depths)
        self._oldest.set(
            {
                (seen.queue, str(seen.priority)): seen.oldest_age_s
                for seen in most[:LISTS_MAX]
                if seen.oldest_age_s is not None
            }
        )

    def letters(self, count: int) -> None:
        """How many dead letters there are."""
        self._letters.set(count)

    def _known(self, model: str) -> str:
        """Producers may name anything: only what is served has a label of its own."""
        return model if not model or model in self._models else OTHER


class Server:
    """What answers Prometheus."""

    def __init__(self, host: str, server: Any, thread: threading.Thread) -> None:
        self.port: int = server.server_port
        self.url = f"http://{host}:{self.port}/metrics"
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Answer no more."""
        with contextlib.suppress(Exception):
            self._server.shutdown()
            self._server.server_close()
        self._thread.join(1.0)


def metrics_for(worker: str, host: str, port: int) -> tuple[Metrics, Server] | None:
    """Metrics that are served; None where the port is taken, since a worker is worth more than its figures."""
    metrics = Metrics(worker)
    try:
        return metrics, metrics.serve(host, port)
    except OSError as error:
        logger.error(
            "no metrics are served on %s:%d: %s. The worker goes on without; free the port or set another "
            "SAMPHIRE_METRICS_PORT",
            host,
            port,
            error,
            extra={"action": "metrics_failed"},
        )
        return None
