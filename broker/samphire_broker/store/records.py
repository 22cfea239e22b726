"""What the store takes and returns: plain records, and the numbers that its scripts answer with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from samphire.errors import SamphireError
from samphire.wire import keys

STREAM_MAX_LENGTH = 1_000
"""Entries, each of a settled batch; a client that misses some finds its results all the same."""
STREAM_TTL_S = 3600
BATCH_MAX = 1000
"""Most tasks that one call of a script takes."""

CANCELLED = -3
"""What `start` and `schedule` say of a task that was cancelled: it is to be settled as such."""
NOT_YET = -4
"""What `start` says of a task while another worker is alone with its model."""
DUE, REPLACED = 2, 3
"""What `schedule` says of a task whose time has come, and of one that has taken another's place."""
WAS_CANCELLED, NOT_PUSHED = 2, 3
"""What `settle` says of a task that was cancelled meanwhile, and is to be settled as such, and of one whose next steps
cannot be pushed."""
FORGOTTEN = 2
"""What `look_at_queues` says of a queue that is empty and whose name is not in the set any more."""
NOWHERE = "nowhere"
"""How the verdict of `cancel` begins of an id that is in no queue that is known; its request's stream stands behind."""


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


class OtherEnd(NamedTuple):
    """The end of another task that this one's end brings about: the steps after a failed one."""

    task_id: str
    state: str
    meta: str
    stream: str


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
