"""What the store takes and returns: plain records, and the numbers that its scripts answer with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeVar

from samphire.errors import SamphireError
from samphire.wire import keys

STREAM_MAX_LENGTH = 1_000
"""Entries, each of a settled batch; a client that misses some finds its results all the same."""
STREAM_TTL_S = 3600
BATCH_MAX = 1000
"""Most tasks that one call of a script takes."""

NOWHERE = "nowhere"
"""How the verdict of `cancel` begins of an id that is in no queue that is known; its request's stream stands behind."""


class Started(IntEnum):
    """What `start` says of a claim that was not tried before, or is not to be run."""

    RUNS = 0
    LOST = -1
    """It is not this worker's any more."""
    COPY = -2
    """The task has ended: the message is dropped."""
    CANCELLED = -3
    """It stays claimed, and is to be settled as cancelled."""
    NOT_YET = -4
    """Another worker is alone with its model: it stays claimed, and is to be started later."""


class Scheduled(IntEnum):
    """What `schedule` says of a claim."""

    LOST = 0
    ASIDE = 1
    DUE = 2
    """Its time has come, by the broker's clock: it stays claimed."""
    REPLACED = 3
    """It has taken the place of another message of the same task."""
    CANCELLED = -3
    """It stays claimed, and is to be settled as cancelled."""


class Settled(IntEnum):
    """What `settle` says of a claim."""

    LOST = 0
    """It is not this worker's any more: nothing was written."""
    DONE = 1
    WAS_CANCELLED = 2
    """The task was cancelled meanwhile: it stays claimed, and is to be settled as cancelled."""
    NOT_PUSHED = 3
    """Its next steps cannot be pushed: it stays claimed."""
    OUTPUTS_LOST = 4
    """The broker has lost outputs that it had given out: it stays claimed."""
    WEBHOOKS_NOT_PUSHED = 5
    """Its webhooks, or those of steps that end with it, cannot be pushed: it stays claimed."""


class Appended(IntEnum):
    """What `append` says of an entry of a log."""

    LOST = 0
    """The claim is not this worker's any more: nothing was written."""
    WRITTEN = 1
    """It stands there; of a copy of the message that runs beside the attempt nothing needs to."""
    OUTPUTS_LOST = 2
    """This attempt cannot go on: what must stand before it is not there, since the broker has lost it, something else
    stands in its place, or the task has ended."""
    NOT_WRITABLE = 3
    """A key of another type lies where the log is."""


class Looked(IntEnum):
    """What `look_at_queues` says of a queue."""

    EMPTY = 0
    HOLDS_SOMETHING = 1
    FORGOTTEN = 2
    """It is empty, and its name is not in the set any more."""


class Led(IntEnum):
    """What `lead` says of a model."""

    NOT_HERE = 0
    """Another worker leads it, or none any more."""
    ALONE = 1
    BESIDE_OTHERS = 2
    """This worker leads it, and others hold some of its tasks yet."""


V = TypeVar("V", bound=IntEnum)


def by_value(verdicts: type[V]) -> dict[int, V]:
    """The verdicts by their numbers: of those that are asked for often, since an enum's own look-up is slow."""
    return {int(verdict): verdict for verdict in verdicts}


class LeaseLostError(SamphireError):
    """This worker's lease has lapsed: its claims may have been handed to others."""


class OtherDeploymentError(SamphireError):
    """The queues, or the keys, belong to another deployment or version: this worker must not begin."""


class Turn(NamedTuple):
    """A list to claim from: what it may give before others give more, and the group whose room it takes."""

    list_key: str
    share: int
    group: int


class Claimed(NamedTuple):
    """One claimed message. `field` is the claim: its number and the list it came from."""

    field: str
    size: int
    message: bytes
    """The whole message, or its last bytes where it is over the limit (then shorter than `size`)."""

    @property
    def list_key(self) -> str:
        """Key of the list that the message came from."""
        return keys.claim_list(self.field)

    @property
    def is_first(self) -> bool:
        """Whether no task was tried before when it was claimed: whoever has to be alone waits for it."""
        return keys.is_first_claim(self.field)


class Letter(NamedTuple):
    """The dead letter that a failure leaves."""

    letter_id: str
    model: str
    reason: str
    error: str
    attempts: int
    attempt: str = "{}"
    """The last attempt, JSON; those before it are on the store."""


class Later(NamedTuple):
    """When a task is tried again."""

    delay_s: float
    attempt: str
    """What to keep of the attempt that is over, JSON."""


class Tried(NamedTuple):
    """What `start` says of a task that was tried before."""

    attempts: int
    crashes: int
    """Those of them that took a worker or a model's process down."""
    losses: int = 0
    """Endpoints that died with it; no attempts."""
    shared: int = 0
    """Those of the crashes that took down what all workers share: a model's process, or an endpoint."""


class LogEntry(NamedTuple):
    """Events of one kind that a running task gives out, which stand in its log as one entry."""

    field: str
    task_id: str
    started_at: float
    """In s since 1970."""
    first: int
    """Number of the first of them in the attempt; 1 is the attempt's start, so the first entry has 2."""
    events: int
    event: str
    at: float
    """In s since 1970."""
    outputs: int
    """Of the attempt, these included."""
    nbytes: int
    """Their bytes."""
    data: bytes


class Webhook(NamedTuple):
    """A delivery that is to be put out; its message says run 1 and no watermark, which the script fills in."""

    delivery_id: str
    endpoint: str
    message: str
    order: str = ""
    """The task in whose order it goes, of an endpoint that wants each task's events one after the other."""


class Delivery(NamedTuple):
    """What is kept of a delivery with its end."""

    delivery_id: str
    endpoint: str
    order: str
    state: str
    """`delivered`, `failed` or `cancelled`."""
    attempt: str
    """The last one, JSON; those before it are on the store."""
    kept_max: int
    """How many are kept of its endpoint."""
    kept_s: int
    by_hand: int = 0
    """1: somebody has sent it again, so it is noted in what is kept already."""


class OtherEnd(NamedTuple):
    """The end of another task that this one's end brings about: the steps after a failed one."""

    task_id: str
    state: str
    meta: str
    stream: str
    webhooks: tuple[Webhook, ...] = ()


class Settlement(NamedTuple):
    """The end of a task, of its attempt, or of a message that cannot be read, and all that is committed with it."""

    field: str
    task_id: str
    """Empty where it cannot be read."""
    state: str
    meta: str
    """Result as Celery stores it, JSON; empty for a task whose result is to be ignored."""
    stream: str
    blobs: tuple[str, ...] = ()
    """Claim checks to delete."""
    pushes: tuple[tuple[str, str], ...] = ()
    """Next steps: (list, message); text, since Lua's MessagePack knows no bytes."""
    others: tuple[OtherEnd, ...] = ()
    letter: Letter | tuple[()] = ()
    retry: Later | tuple[()] = ()
    """Of a task whose state is "retrying": it waits with the scheduled ones."""
    streamed: tuple[int] | tuple[()] = ()
    """Of one that has succeeded and has given out outputs: how many, as its log must have them."""
    webhooks: tuple[Webhook, ...] = ()
    delivery: Delivery | tuple[()] = ()
    """Of one that is a delivery itself."""


class LetterCounts(NamedTuple):
    """The dead letters, after the limit was enforced."""

    deleted: int
    left: int
    oldest_s: float
    """Age of the oldest; 0 if there is none."""


class Reaped(NamedTuple):
    """What a reap returned to the queues; `moved` -1: the worker lives."""

    moved: int
    started: int
    left: int
    """How many are left for the next call."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as the others see it."""

    id: str
    hostname: str
    pid: int
