"""Pauses between tries."""

from __future__ import annotations

from samphire.transport.repeat import Pauses


def test_pauses_grow_are_capped_and_drawn_by_lot() -> None:
    """Each between half of its longest and that."""
    pauses = Pauses(0.1, 1.0)
    for longest_s in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert longest_s / 2 <= pauses.next_s() <= longest_s
    assert len({pauses.next_s() for _ in range(10)}) > 1


def test_what_has_worked_begins_anew() -> None:
    """With the shortest pause."""
    pauses = Pauses(0.1, 10.0)
    for _ in range(5):
        pauses.next_s()
    pauses.reset()
    assert pauses.next_s() <= 0.1
