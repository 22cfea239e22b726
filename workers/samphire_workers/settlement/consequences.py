"""What follows which error: of the tasks that met it, of their attempt, and of the model. One table, and pure.

Whether an attempt that has failed is followed by another is `samphire_broker.retry`'s to say: by class and budget.
docs/errors.md tells the same to people.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from samphire.errors import (
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    QueueFullError,
    SamphireError,
    UnknownModelError,
)
from samphire_workers.settlement.log_writer import ClaimLostError, OutputsLostError
from samphire_workers.triton.answers import UnevenRowsError
from samphire_workers.triton.errors import EndpointDiedError, GivenUpError, StubDiedError
from samphire_workers.unexpected import ShortageError


class Tasks(Enum):
    """What becomes of the tasks of a micro-batch."""

    FAIL = "each attempt has failed: another follows, or a dead letter"
    RELEASE = "they go back to their queues"
    REST = "they go back to their queues, and this worker claims nothing for a while"
    DROP = "they are nobody's here any more: another worker has them"
    EACH = "each is asked again by itself"
    HALVE = "its halves are asked again, until it is known whose content it was"


class Attempt(Enum):
    """Whether what goes back counts as an attempt."""

    NONE = "nobody's"
    COUNTS = "of all of them: one may be to blame"
    IF_ALONE = "of one that ran alone because this has happened to it before"


class Model(Enum):
    """What the error says of the model on its endpoint."""

    SERVES = "nothing"
    SLOW = "whether the endpoint answers tells if it hangs, or only the model"
    AWAY = "it is away there, or the whole endpoint is"
    BUSY = "it is left alone for a while"
    GONE = "it is not served there any more: an outage, since it was a moment ago"
    DEAD = "its process has died, and is brought back"
    CHANGED = "it may take something else than it did: then an outage"


class Consequence(NamedTuple):
    """A row of the table."""

    error: type[SamphireError]
    """The first row counts whose class the error is an instance of."""
    tasks: Tasks
    model: Model = Model.SERVES
    attempt: Attempt = Attempt.NONE
    endpoint_died: bool = False
    """It is noted for each task; a task to which it happens often runs alone."""
    state_is_lost: bool = False
    """A request that goes on with a sequence fails instead, since the model has forgotten what came before it."""


TABLE = (
    Consequence(StubDiedError, Tasks.RELEASE, Model.DEAD, Attempt.COUNTS, state_is_lost=True),
    Consequence(EndpointDiedError, Tasks.RELEASE, Model.AWAY, Attempt.IF_ALONE, endpoint_died=True, state_is_lost=True),
    Consequence(GivenUpError, Tasks.RELEASE, Model.AWAY, state_is_lost=True),
    Consequence(QueueFullError, Tasks.RELEASE, Model.BUSY),
    Consequence(EndpointUnavailableError, Tasks.RELEASE, Model.AWAY),
    Consequence(ShortageError, Tasks.REST),
    Consequence(ClaimLostError, Tasks.DROP),
    Consequence(OutputsLostError, Tasks.RELEASE),
    Consequence(EndpointTimeoutError, Tasks.FAIL, Model.SLOW),  # nobody's content; asked again at once it would pile up
    Consequence(UnevenRowsError, Tasks.EACH),
    Consequence(UnknownModelError, Tasks.FAIL, Model.GONE),
    Consequence(InvalidInputError, Tasks.HALVE, Model.CHANGED),
    Consequence(SamphireError, Tasks.HALVE),
)


def consequence_of(error: SamphireError, tasks: int = 1) -> Consequence:
    """The row of an error that so many tasks have met together; one alone is not asked again by itself."""
    found = next(row for row in TABLE if isinstance(error, row.error))
    return found._replace(tasks=Tasks.FAIL) if tasks == 1 and found.tasks in (Tasks.EACH, Tasks.HALVE) else found
