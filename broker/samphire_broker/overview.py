"""What lies where on a broker: queues, scheduled tasks, dead letters, workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from samphire import keys
from samphire.connection import DEFAULT_BROKER_URL, key_text, redact, translate
from samphire.errors import InvalidInputError

TIMEOUT_S = 5.0
SCAN_PAGE = 1000


@dataclass(frozen=True)
class QueueState:
    """A queue's messages by priority: high, normal, low, lowest."""

    name: str
    waiting: tuple[int, ...]

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
class Overview:
    """One look at a broker."""

    queues: list[QueueState]
    scheduled: int
    dead_letters: int
    workers: list[WorkerState]

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


@contextmanager
def broker_connection(broker_url: str | None) -> Iterator[redis.Redis]:
    """A plain connection for looking around.

    Raises:
        InvalidInputError: not a URL of Redis.
        SamphireError: the translation of what the broker, or the way to it, answered with.
    """
    url = broker_url or os.environ.get("SAMPHIRE_BROKER_URL") or DEFAULT_BROKER_URL
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise InvalidInputError(f"expected a broker URL redis://host:port/db, given {redact(url)!r}") from error
    try:
        with client:
            yield client
    except (RedisError, OSError) as error:
        raise translate(error) from error


def overview(broker_url: str | None) -> Overview:
    """Look at a broker; raises as `broker_connection` does."""
    with broker_connection(broker_url) as client:
        return look(client)


def look(client: redis.Redis) -> Overview:
    """Look at a broker through an open connection."""
    names = sorted(_queue_names(client))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            for key in keys.queue_lists(name):
                pipe.llen(key)
        lengths = [length if isinstance(length, int) else 0 for length in pipe.execute(raise_on_error=False)]
    steps = len(keys.PRIORITY_STEPS)
    queues = [QueueState(name, tuple(lengths[n * steps : (n + 1) * steps])) for n, name in enumerate(names)]
    ids = sorted(key_text(member) for member in client.smembers(keys.WORKERS))
    return Overview(
        queues,
        int(client.zcard(keys.SCHEDULED)),
        int(client.zcard(keys.DEAD)),
        [_worker(client, worker_id) for worker_id in ids],
    )


def _queue_names(client: redis.Redis) -> set[str]:
    found = {keys.INTAKE}
    for name in client.smembers(keys.QUEUES):
        found.add(keys.known_form(name) or keys.INTAKE)
    for key in client.scan_iter(f"{keys.INTAKE}.*", count=SCAN_PAGE, _type="list"):
        found.add(keys.known_form(key) or keys.INTAKE)
    return found


def _worker(client: redis.Redis, worker_id: str) -> WorkerState:
    lease = keys.WORKER_PREFIX + worker_id
    info = client.get(f"{lease}:info")
    told = msgspec.json.decode(info) if info else {}
    return WorkerState(
        worker_id,
        told.get("hostname", ""),
        bool(client.exists(lease)),
        int(client.hlen(f"{lease}:inflight")),
        told.get("clock_ahead_s", 0.0),
    )
