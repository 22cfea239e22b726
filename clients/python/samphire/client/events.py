"""The events of a task as its readers get them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from samphire.client.results import Status

EventKind = Literal[
    "snapshot",
    "queued",
    "scheduled",
    "started",
    "restarted",
    "output",
    "progress",
    "retrying",
    "redriven",
    "gap",
    "succeeded",
    "failed",
    "cancelled",
    "expired",
]

STATUS_AFTER: Mapping[str, Status] = {
    "queued": "queued",
    "scheduled": "scheduled",
    "started": "running",
    "output": "running",
    "progress": "running",
    "retrying": "retrying",
    "redriven": "queued",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "expired",
}
"""The state that a task is in after an event of each kind."""


@dataclass(frozen=True)
class TaskEvent:
    """Something that happened to a task, or what a reader has to know of the log of such things.

    A `snapshot` tells the state where the log does not begin with the task; a `gap` that events are not there any more;
    a `restarted` that outputs begin anew in another attempt.
    """

    task_id: str
    kind: EventKind
    status: Status
    """The task's state after it."""
    at: float
    """When, in s since 1970, by the broker's clock; of a snapshot and a gap when it was seen."""
    position: str
    """Where to go on after it: `events(after=…)`. Opaque."""
    run: int = 1
    """The task's run: a redrive opens the next one."""
    attempt: int = 0
    """Starts in this run so far, those included that did not count as an attempt."""
    seq: int = 0
    """Its number in the attempt."""
    outputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Of an `output`: name to array, with the model's dtypes and shapes; BYTES are object arrays of `bytes`."""
    index: int | None = None
    """Of an `output`: its number in the attempt, from 0."""
    fraction: float | None = None
    """Of a `progress`: from 0 to 1, as far as the model knows."""
    message: str = ""
    """Of a `progress`: the model's words; of `retrying` and `queued`: why."""
    output_count: int | None = None
    """Of an end: how many outputs the last attempt has given out, so that a reader knows whether it has all."""
    output_bytes: int | None = None
    """Of an end: their bytes."""
    requested: str | None = None
    """Of a `gap`: the position that was asked for; None: the beginning."""
    earliest: str | None = None
    """Of a `gap`: position of the first event that there is; None: there is none."""
    latest: str | None = None
    """Of a `gap`: position of the last one."""
    begins_anew: bool = False
    """Outputs that were read before this event do not count any more: those that follow begin with the first."""
