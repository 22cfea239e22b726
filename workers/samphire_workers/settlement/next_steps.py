"""How many messages a task's canvas sends at once: counted before Celery's code takes on the work.

A message of 4 MiB has room for some 50,000 callbacks, and Celery needs most of a millisecond for each.
"""

from __future__ import annotations

from collections.abc import Iterator

from samphire.errors import InvalidInputError

NEXT_STEPS_MAX = 10_000
"""Most next steps that one task may send at once."""

NEXT_STEPS_MAX_BYTES = 128 * 2**20
"""Most bytes of their messages: each carries the result of the task before, and a chord's parts its body."""

NESTED_MAX = 8
"""Deepest nesting of groups and headers of chords: Celery takes ever more time for each level, and a connection while
it sends what is inside. The body of a chord, which is sent later, begins anew."""

FEW_STEPS = 50
"""Up to so many are sent in a few hundredths of a second, so other canvases may wait for them."""

_PARTS = {"group": ("tasks",), "chain": ("tasks",), "chord": ("header", "body"), "chunks": ("it",)}
"""By the kind of a signature, in which of its arguments others stand; `it` are arguments, many for one message."""


def count_steps(signatures: object) -> int:
    """The tasks in signatures, with those in groups, chains and chords inside them.

    What is no signature counts too: Celery finds out that it is none.

    Args:
        signatures: what stands in a message as JSON; a list of signatures, one, or anything else.
    """
    return sum(is_task for is_task, _ in _walk(signatures))


def check_nesting(signatures: object) -> None:
    """Raise where signatures, as JSON, are nested deeper than they may be.

    Raises:
        InvalidInputError: they are.
    """
    if any(depth > NESTED_MAX for _, depth in _walk(signatures)):
        raise InvalidInputError(
            f"expected next steps that are nested at most {NESTED_MAX} deep (groups, headers of chords), given more"
        )


def _walk(signatures: object) -> Iterator[tuple[bool, int]]:
    """Of each signature whether it is a task, and how deep it is nested."""
    left: list[tuple[object, int]] = [(signatures, 0)]
    while left:  # not by recursion: the depth is the producer's choice
        found, depth = left.pop()
        if isinstance(found, list):
            left += [(one, depth) for one in found]
        elif found is not None:
            parts = list(_parts(found))
            left += [(part, 0 if name == "body" else depth + 1) for name, part in parts]
            yield not parts, depth


def _parts(signature: object) -> Iterator[tuple[str, object]]:
    if not isinstance(signature, dict):
        return
    kind, kwargs = signature.get("subtask_type"), signature.get("kwargs")
    if not isinstance(kind, str) or not isinstance(kwargs, dict):
        return
    for name in _PARTS.get(kind, ()):
        if isinstance(part := kwargs.get(name), list | dict):
            # The arguments of a chunk are looked at no further.
            yield name, [1] * len(part) if kind == "chunks" else part


def check_steps(count: int) -> None:
    """Raise where a task has more next steps than it may.

    Raises:
        InvalidInputError: it has.
    """
    if count > NEXT_STEPS_MAX:
        raise InvalidInputError(
            f"expected at most {NEXT_STEPS_MAX} next steps (link, link_error, members of groups and chords) of one "
            f"task, given {count}: send fewer, each of which sends some of the others"
        )
