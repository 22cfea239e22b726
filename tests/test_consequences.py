"""The table of what follows which error."""

from __future__ import annotations

import pytest

from samphire import errors
from samphire.errors import SamphireError
from samphire_workers.settlement.consequences import TABLE, Attempt, Model, Tasks, consequence_of
from samphire_workers.settlement.outcome import TimeLimitError
from samphire_workers.triton.answers import UnevenRowsError
from samphire_workers.triton.errors import EndpointDiedError, GivenUpError, StubDiedError, UnclearUnavailableError
from samphire_workers.unexpected import ShortageError

ROWS = [
    (StubDiedError(), Tasks.RELEASE, Tasks.RELEASE, Model.DEAD, Attempt.COUNTS),
    (EndpointDiedError(), Tasks.RELEASE, Tasks.RELEASE, Model.AWAY, Attempt.IF_ALONE),
    (GivenUpError(), Tasks.RELEASE, Tasks.RELEASE, Model.AWAY, Attempt.NONE),
    (UnclearUnavailableError(), Tasks.RELEASE, Tasks.RELEASE, Model.AWAY, Attempt.NONE),
    (errors.EndpointUnavailableError(), Tasks.RELEASE, Tasks.RELEASE, Model.AWAY, Attempt.NONE),
    (errors.QueueFullError(), Tasks.RELEASE, Tasks.RELEASE, Model.BUSY, Attempt.NONE),
    (ShortageError(), Tasks.REST, Tasks.REST, Model.SERVES, Attempt.NONE),
    (errors.EndpointTimeoutError(), Tasks.FAIL, Tasks.FAIL, Model.SLOW, Attempt.NONE),
    (TimeLimitError(1.0, soft=True), Tasks.FAIL, Tasks.FAIL, Model.SLOW, Attempt.NONE),
    (UnevenRowsError(), Tasks.EACH, Tasks.FAIL, Model.SERVES, Attempt.NONE),
    (errors.UnknownModelError(), Tasks.FAIL, Tasks.FAIL, Model.GONE, Attempt.NONE),
    (errors.InvalidInputError(), Tasks.HALVE, Tasks.FAIL, Model.CHANGED, Attempt.NONE),
    (errors.PayloadTooLargeError(), Tasks.HALVE, Tasks.FAIL, Model.CHANGED, Attempt.NONE),
    (errors.ModelFaultError(), Tasks.HALVE, Tasks.FAIL, Model.SERVES, Attempt.NONE),
    (errors.InternalError(), Tasks.HALVE, Tasks.FAIL, Model.SERVES, Attempt.NONE),
]


@pytest.mark.parametrize(
    ("error", "together", "single", "model", "attempt"), ROWS, ids=lambda value: type(value).__name__
)
def test_what_follows(error: SamphireError, together: Tasks, single: Tasks, model: Model, attempt: Attempt) -> None:
    """Of many tasks together, and of one; of the model, and of the attempt."""
    many, one = consequence_of(error, 8), consequence_of(error)
    assert (many.tasks, one.tasks) == (together, single)
    assert (many.model, many.attempt) == (one.model, one.attempt) == (model, attempt)


def test_each_error_has_the_row_of_its_own_class() -> None:
    """No row stands behind one of a class above it, and every error has one."""
    for place, row in enumerate(TABLE):
        assert not any(issubclass(row.error, before.error) for before in TABLE[:place]), row.error.__name__
    assert TABLE[-1].error is SamphireError


def test_state_is_lost_with_what_held_it() -> None:
    """A sequence goes on only where the model has not forgotten it."""
    lost = {row.error for row in TABLE if row.state_is_lost}
    assert lost == {StubDiedError, EndpointDiedError, GivenUpError}
