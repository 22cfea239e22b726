"""Waiting at the terminal: meanwhile it is said why a task is not done, and Ctrl-C leaves it as it is."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from samphire import SamphireError, Task, UnknownTaskError
from samphire_broker.commands.output import say
from samphire_broker.shown import shown

WHY_S = 2.0
"""Between two looks at why a task waits."""
WHY_SHARE = 20
"""And so many times as long as one has taken."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@contextmanager
def told_why(task: Task, after_s: float = 0.0) -> Iterator[None]:
    """Say why a task is not done, as long as it is not, whenever that changes.

    Args:
        task: that is waited for in the block.
        after_s: what is done sooner is told nothing of.

    Raises:
        UnknownTaskError: nobody knows it.
    """
    ended, said = threading.Event(), [""]
    thread = threading.Thread(target=_tell, args=(task, after_s, said, ended), name="samphire-why", daemon=True)
    try:
        if after_s <= 0:
            said[0] = _look(task)
            _say(said[0])
        thread.start()
        yield
    except KeyboardInterrupt:
        say(shown(f"the task goes on; `samphire watch {task.id}` follows it again"))
        sys.exit(INTERRUPTED)
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join(WHY_S)


def _look(task: Task) -> str:
    """Why it is not done; "" where it is, or runs.

    Raises:
        UnknownTaskError: nobody knows it.
    """
    detail = task.status(detail=True)
    if detail.is_known is False:
        raise UnknownTaskError(f"task {task.id}: {detail.why}")
    return "" if detail.status == "running" else detail.why


def _tell(task: Task, after_s: float, said: list[str], ended: threading.Event) -> None:
    wait_s = after_s or WHY_S
    while not ended.wait(wait_s):
        began = time.monotonic()
        try:
            now = _look(task)
        except SamphireError:  # who waits for it is told what is wrong
            continue
        wait_s = max(WHY_S, WHY_SHARE * (time.monotonic() - began))
        if now != said[0] and not ended.is_set():
            _say(now)
        said[0] = now


def _say(why: str) -> None:
    if why:
        say(shown(f"({why})"))
