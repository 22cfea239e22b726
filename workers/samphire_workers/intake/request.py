"""A claimed message on its way through the lane: what is known of it so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from msgspec import UNSET, UnsetType

from samphire.errors import SamphireError
from samphire.wire import keys
from samphire.wire.contract import Envelope, InferRequest, Streamed
from samphire.wire.signature import ModelSignature
from samphire.wire.timings import Timings
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed, Delivery, Webhook
from samphire_broker.webhooks.endpoint import Destination
from samphire_workers.triton.endpoint import Endpoint
from samphire_workers.triton.statistics import Averages


class Times(NamedTuple):
    """When a task may start and how long it may take; in s, points in time since 1970."""

    eta: float = 0.0
    expires: float = math.inf
    deadline: float = math.inf
    limit: float = math.inf
    soft_limit: float = math.inf


NO_TIMES = Times()


class Answered(NamedTuple):
    """How Triton has answered a micro-batch; points in time by the monotonic clock."""

    asked_at: float
    at: float
    tasks: int
    averages: Averages


Run = Callable[["Request"], Coroutine[Any, Any, Any]]
"""Brings a task to its result."""


Close = Callable[["Request", str, str], "Delivery | tuple[()]"]


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
    """A queue of its own, with those whose names have a dot and more behind it; "": the queues of inferences."""
    ends_itself: bool = False
    """`run` writes its ends and its retries, and nothing its start: a lost worker is no attempt of it."""
    close: Close | None = None
    """What is kept of one that ends otherwise, by its state and its last attempt (JSON)."""


@dataclass(slots=True)
class Request:
    """One task on its way through the lane."""

    claim: Claimed
    task_id: str = ""
    stream: str = ""
    """Event stream of the client that waits; empty for a plain Celery producer."""
    envelope: Envelope | None = None
    infer: InferRequest | None = None
    version: str = ""
    """Version number that the request was resolved to."""
    rows: int = 0
    nbytes: int = 0
    """Bytes that the tensors will take once they are loaded."""
    json_values: bool = False
    """The inputs came as JSON values, so the outputs go back as such."""
    signature: ModelSignature | None = None
    """Of the model, as the request was checked against it."""
    batch_key: object = None
    """Equal for requests that may share a micro-batch; None: none may."""
    attempts: int = 0
    """Attempts before this one."""
    crashes: int = 0
    """Those of them that took a worker or a model's process down."""
    losses: int = 0
    """Endpoints that died with it, which are no attempts."""
    outcome: str = ""
    """How it has ended here: "succeeded", or something else."""
    refusal: SamphireError | None = None
    """Why it cannot be asked, of one of a sequence: it fails when its turn comes."""
    endpoint: Endpoint | None = None
    """The endpoint that it must go to; by default any."""
    over: bool = False
    """It has ended while its micro-batch is still under way: whatever comes of that is not for it."""
    times: Times = NO_TIMES
    taken_in_at: float = 0.0
    """When its micro-batch was made, by the monotonic clock."""
    started_at: float | None = None
    """When it began to run, in s since 1970."""
    claimed_at: float = 0.0
    """When this worker has claimed it, by the monotonic clock."""
    answered: Answered | None = None
    timings: Timings | UnsetType = UNSET
    """Where its time went, once it has succeeded."""
    canvas: dict[str, Any] | None = None
    """Celery's request, of a task that has next steps or belongs to a chord."""
    kind: Kind | None = None
    """What kind of task it is, as far as that is understood."""
    seen: Any = None
    """What observers are told of it, from its start on."""
    streamed: Streamed | None = None
    """What it has given out as a stream, once all of it is written."""
    destination: Destination | None = None
    """Who is told of it by a webhook."""
    untold: list[Webhook] = field(default_factory=list)
    """Webhooks of what has happened to it that are not put out yet: they go with its end, before that of the end."""
    progress_told_at: float = -math.inf
    """When a webhook told of its progress, by the monotonic clock."""
    payload: Any = None
    """What the message carries, of a kind that is no inference."""
    tensors: list[bytes] = field(default_factory=list)

    @property
    def request(self) -> InferRequest:
        """The decoded request; only to be used once `read` has returned."""
        assert self.infer is not None
        return self.infer

    @property
    def model(self) -> str:
        """Name of the model, as far as it is known."""
        if self.infer is not None:
            return self.infer.model_name
        return keys.parse_queue(keys.split_list(self.claim.list_key)[0])[0]

    @property
    def streams(self) -> bool:
        """Whether its model gives out outputs one after the other; known once it is checked."""
        return self.signature is not None and self.signature.decoupled

    @property
    def collects(self) -> bool:
        """Whether its result has all outputs of a stream."""
        wish = self.request.collect
        return self.canvas is not None or (not self.stream if wish is UNSET else bool(wish))

    @property
    def sequence_id(self) -> object:
        """What Triton calls the correlation id; None where the request is of no sequence."""
        return self.request.parameters.get("sequence_id")

    @property
    def keeps_order(self) -> bool:
        """Whether it is known to be of a sequence, and was claimed from where the order is kept."""
        return self.infer is not None and self.sequence_id is not None and self.at_home

    @property
    def at_home(self) -> bool:
        """Whether it was claimed from the queue of its own model and tenant; what is no inference has none."""
        if self.infer is None:
            return True
        return home_of(self.claim.list_key) == (self.request.model_name, self.request.tenant)

    @property
    def home_list(self) -> str:
        """Key of the list that this task belongs to."""
        priority = keys.split_list(self.claim.list_key)[1]
        return keys.queue_list(keys.queue_name(self.request.model_name, self.request.tenant), priority)


@lru_cache(maxsize=4096)
def home_of(list_key: str) -> tuple[str, str]:
    """Model and tenant whose messages lie in a list."""
    return keys.parse_queue(keys.split_list(list_key)[0])
