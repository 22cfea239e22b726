"""Exceptions that nobody expected, as errors of ours: a bug of Samphire's, or something that the worker is short of."""

from __future__ import annotations

import errno
import logging
import traceback

from samphire.errors import InternalError, SamphireError, TransientError

logger = logging.getLogger(__name__)

TRACEBACK_CHARACTERS = 4000
_SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)


class ShortageError(TransientError):
    """The worker is short of memory, threads or files: no task's fault, and another worker may do better."""


def our_error(error: BaseException) -> SamphireError:
    """The error as one of ours; what is none, and no shortage, is a bug of Samphire's, and told loudly."""
    if isinstance(error, SamphireError):
        return error
    if is_shortage(error):
        return ShortageError(f"the worker is short of resources: {type(error).__name__}: {error}")
    logger.error(
        "Samphire has a bug: %r. The task is tried again, and becomes a dead letter that has this traceback",
        error,
        exc_info=error,
        extra={"action": "internal_error"},
    )
    found = InternalError(f"{type(error).__name__}: {str(error)[:500]}")
    found.traceback_text = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
    return found


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that this process cannot get what it needs from its system."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_shortage, error.exceptions))
    if isinstance(error, RuntimeError):
        return "can't start new thread" in str(error)
    return isinstance(error, MemoryError | ShortageError) or (isinstance(error, OSError) and error.errno in _SHORT_OF)
