"""What lies where on a broker: queues, scheduled tasks, dead letters, workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import redis
from redis.exceptions import RedisError

from samphire.client.detail import why_nothing_is_taken
from samphire.transport.address import Broker
from samphire.transport.connection import client_of, key_text, translate
from samphire.wire.endpoints import POLICY
from samphire.wire.keys import INTAKE, PRIORITY_STEPS, Keys, known_form, queue_lists
from samphire_broker.webhooks.endpoint import failing_text

TIMEOUT_S = 5.0
SCAN_PAGE = 1000


@dataclass(frozen=True)
class QueueState:
    """A queue's messages by priority: high, normal, low, lowest."""

    name: str
    waiting: tuple[int, ...]
    why: str = ""
    """Why nothing is taken from it, as far as that is known; "" where it is worked on, or empty."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.waiting)


@dataclass(frozen=True)
class WorkerState:
    """A registered worker."""

    id: str
    hostname: str
    alive: bool
    in_flight: int
    clock_ahead_s: float
    """How many s its machine's clock is ahead of the broker's, as it has found."""


@dataclass(frozen=True)
class EndpointSeen:
    """An endpoint of webhooks."""

    name: str
    waiting: int
    """Deliveries that have not ended."""
    trouble: str
    """What is wrong with it; "" for nothing."""


@dataclass(frozen=True)
class Overview:
    """One look at a broker."""

    queues: list[QueueState]
    scheduled: int
    dead_letters: int
    workers: list[WorkerState]
    endpoints: list[EndpointSeen]
    """Of webhooks, those to which deliveries wait, or that are in trouble."""

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


@contextmanager
def broker_connection(broker: Broker) -> Iterator[redis.Redis]:
    """A plain connection for looking around.

    Raises:
        SamphireError: the translation of what the broker, or the way to it, answered with.
    """
    try:
        with client_of(broker.address, TIMEOUT_S) as client:
            yield client
    except (RedisError, OSError) as error:
        raise translate(error) from error


def overview(broker: Broker) -> Overview:
    """Look at a broker; raises as `broker_connection` does."""
    with broker_connection(broker) as client:
        return look(client, broker.keys)


def look(client: redis.Redis, keys: Keys) -> Overview:
    """Look at a broker through an open connection."""
    names = sorted(_queue_names(client, keys))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for list_name in queue_lists(name):
                pipe.llen(keys.of_celery(list_name))
        lengths = [length if isinstance(length, int) else 0 for length in pipe.execute(raise_on_error=False)]
    steps = len(PRIORITY_STEPS)
    ids = sorted(key_text(member) for member in client.smembers(keys.workers))
    workers = [_worker(client, keys, worker_id) for worker_id in ids]
    told = {key_text(name): key_text(value) for name, value in client.hgetall(keys.catalogue).items()}
    is_served = any(worker.alive for worker in workers)
    queues = []
    for n, name in enumerate(names):
        waiting = tuple(lengths[n * steps : (n + 1) * steps])
        why = why_nothing_is_taken(name, told, is_served=is_served) if any(waiting) else ""
        queues.append(QueueState(name, waiting, why))
    return Overview(
        queues,
        int(client.zcard(keys.scheduled)),
        int(client.zcard(keys.dead)),
        workers,
        _endpoints(client, keys),
    )


def _endpoints(client: Any, keys: Keys) -> list[EndpointSeen]:
    public = {key_text(name): msgspec.json.decode(raw) for name, raw in client.hgetall(keys.webhook_names).items()}
    health = {key_text(name): msgspec.json.decode(raw) for name, raw in client.hgetall(keys.webhook_health).items()}
    marked = {key_text(name) for name in client.hkeys(keys.webhook_marks)}
    names = sorted(marked | health.keys() | {name for name in public if not name.startswith(("@", POLICY))})
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.zcard(keys.waiting_deliveries(name))
        waiting = pipe.execute()
    found = []
    for name, count in zip(names, waiting, strict=True):
        trouble = "disabled" if public.get(name, {}).get("disabled") else ""
        trouble = trouble or failing_text(health.get(name, {}))
        if count or trouble:
            found.append(EndpointSeen(name, int(count), trouble))
    return found


def _queue_names(client: redis.Redis, keys: Keys) -> set[str]:
    found = {INTAKE}
    for name in client.smembers(keys.queues):
        found.add(known_form(name) or INTAKE)
    for key in client.scan_iter(keys.of_celery(f"{INTAKE}.*"), count=SCAN_PAGE, _type="list"):
        found.add(keys.queue_in(key) or INTAKE)
    return found


def _worker(client: redis.Redis, keys: Keys, worker_id: str) -> WorkerState:
    lease = keys.worker_prefix + worker_id
    info = client.get(f"{lease}:info")
    told = msgspec.json.decode(info) if info else {}
    return WorkerState(
        worker_id,
        told.get("hostname", ""),
        bool(client.exists(lease)),
        int(client.hlen(f"{lease}:inflight")),
        told.get("clock_ahead_s", 0.0),
    )
