"""Positions in the event log of a task: opaque to users, a number each for epoch, run, attempt and event here.

The log is a Redis stream, whose entries have ids of two numbers; run and attempt are in the first.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from samphire.errors import InvalidInputError

ATTEMPTS = 2**20
"""More than the attempts of a run can be; `shared/log.lua` counts with the same."""
_FORM = re.compile(r"([0-9a-z]{1,32})([0-9a-f]{8})\.([0-9]{1,9})\.([0-9]{1,7})\.([0-9]{1,15})")
NO_EPOCH = "0"
"""Of a broker that no worker has ever written to."""


class Place(NamedTuple):
    """Where an event stands in its log; places are in the order of the events."""

    major: int
    """run * `ATTEMPTS` + attempt."""
    seq: int
    """Number of the event in its attempt, from 1."""

    @property
    def run(self) -> int:
        """Of the task, from 1."""
        return self.major // ATTEMPTS

    @property
    def attempt(self) -> int:
        """Starts of the task in this run so far."""
        return self.major % ATTEMPTS

    @property
    def entry_id(self) -> str:
        """The id of the stream's entry whose last event this is."""
        return f"{self.major}-{self.seq}"

    def position(self, task_id: str, epoch: str) -> str:
        """The position as users get it: behind the epoch stand 8 digits by which a task's own, whole one is known."""
        return f"{epoch}{_check(task_id, epoch, self)}.{self.run}.{self.attempt}.{self.seq}"


BEGINNING = Place(0, 0)


def place_of(entry_id: bytes | str) -> Place:
    """The place of an entry's last event."""
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    major, _, seq = text.partition("-")
    return Place(int(major), int(seq))


def _check(task_id: str, epoch: str, place: Place) -> str:
    return f"{zlib.crc32(f'{task_id} {epoch} {place.major} {place.seq}'.encode()):08x}"


def parse_position(task_id: str, position: object) -> tuple[str, Place]:
    """The epoch and the place of a position that a user gives.

    Raises:
        InvalidInputError: it is none, another task's, or not whole.
    """
    found = _FORM.fullmatch(position) if isinstance(position, str) and position.isascii() else None
    if found is not None and int(found[4]) < ATTEMPTS:
        place = Place(int(found[3]) * ATTEMPTS + int(found[4]), int(found[5]))
        if found[2] == _check(task_id, found[1], place):
            return found[1], place
    raise InvalidInputError(
        f"expected a position as an event of task {task_id} has it (event.position), given {str(position)[:100]!r}"
    )
