"""The errors of Samphire, one tree.

    SamphireError
    ├── InvalidInputError          the request itself is wrong; the same request never succeeds
    │   ├── UnknownModelError      no endpoint has such a model or version
    │   ├── IdempotencyConflictError   the key belongs to a task that was asked for something else
    │   └── PayloadTooLargeError   a tensor, message or request over a stated limit
    ├── TransientError             may succeed later, unchanged
    │   ├── EndpointUnavailableError   the Triton, or the model on it, is away
    │   ├── EndpointTimeoutError       no answer within the time allowed
    │   ├── BrokerUnavailableError     Redis or Valkey is away; a submit may or may not have been queued
    │   ├── QueueFullError             the model's queue has reached its limit
    │   └── BrokerMemoryFullError      the broker has reached 80 % of its memory
    ├── ModelFaultError            the model raised, or answered what it must not
    │   └── StreamLimitError       it gave out more than a stream may have
    ├── InternalError              a bug of Samphire's, and not of the caller's
    ├── WorkerCrashError           the task took down every worker that tried it
    ├── TaskGoneError              the task ended without a result
    │   ├── TaskExpiredError       its time ran out before it was started
    │   ├── TaskCancelledError     somebody cancelled it
    │   ├── ResultDeletedError     its result was read, and deleted as asked for
    │   └── ResultExpiredError     it has ended, and its result's lifetime is over
    ├── StreamDiffersError         a stream that was to be resumed began anew with other outputs
    ├── UnknownTaskError           no such task is queued, scheduled, running or ended
    ├── LetterGoneError            there is no such dead letter
    ├── LetterRefusedError         the dead letter cannot be redriven; it stays
    ├── BrokerRightError           the broker does not allow its user what it takes
    ├── ResultTimeoutError         the result did not come within `timeout_s`; the task goes on
    ├── WebhookVerificationError   a webhook is not what Samphire has sent, or is too old
    ├── ProtocolError              stored data is not what this version of Samphire writes
    └── ClientClosedError          the client was closed while it was in use

Every error carries its retry semantics: `retryable`, and `retry_after_s` where a time is known.
"""

from __future__ import annotations

from typing import ClassVar


class SamphireError(Exception):
    """Samphire failed."""

    default_message: ClassVar[str] = "Samphire failed."
    """What an error says that was raised without a message; not the docstring, which `python -OO` drops."""
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(message or self.default_message)
        self.retry_after_s = retry_after_s


class InvalidInputError(SamphireError, ValueError):
    """The request is not valid."""

    default_message: ClassVar[str] = "The request is not valid."


class UnknownModelError(InvalidInputError):
    """No endpoint has this model."""

    default_message: ClassVar[str] = "No endpoint has this model."


class IdempotencyConflictError(InvalidInputError):
    """The idempotency key belongs to another request."""

    default_message: ClassVar[str] = "The idempotency key belongs to another request."


class PayloadTooLargeError(InvalidInputError):
    """The payload is over the limit."""

    default_message: ClassVar[str] = "The payload is over the limit."


class TransientError(SamphireError):
    """It may succeed later."""

    default_message: ClassVar[str] = "It may succeed later."
    retryable: ClassVar[bool] = True


class EndpointUnavailableError(TransientError):
    """The inference endpoint is away."""

    default_message: ClassVar[str] = "The inference endpoint is away."


class EndpointTimeoutError(TransientError, TimeoutError):
    """The inference endpoint did not answer in time."""

    default_message: ClassVar[str] = "The inference endpoint did not answer in time."


class BrokerUnavailableError(TransientError, ConnectionError):
    """The broker is away."""

    default_message: ClassVar[str] = "The broker is away."


class QueueFullError(TransientError):
    """The queue has reached its limit."""

    default_message: ClassVar[str] = "The queue has reached its limit."


class BrokerMemoryFullError(TransientError):
    """The broker has reached its memory limit."""

    default_message: ClassVar[str] = "The broker has reached its memory limit."


class ModelFaultError(SamphireError):
    """The model failed."""

    default_message: ClassVar[str] = "The model failed."


class StreamLimitError(ModelFaultError):
    """The model gave out more than a stream may have."""

    default_message: ClassVar[str] = "The model gave out more than a stream may have."


class InternalError(SamphireError):
    """Samphire has a bug."""

    default_message: ClassVar[str] = "Samphire has a bug."
    traceback_text = ""
    """Where it happened, as far as that is known here: a worker keeps it in the history of the task."""


class WorkerCrashError(SamphireError):
    """The task took down every worker that tried it."""

    default_message: ClassVar[str] = "The task took down every worker that tried it."


class TaskGoneError(SamphireError):
    """The task ended without a result."""

    default_message: ClassVar[str] = "The task ended without a result."


class TaskExpiredError(TaskGoneError):
    """The task expired before it was started."""

    default_message: ClassVar[str] = "The task expired before it was started."


class TaskCancelledError(TaskGoneError):
    """The task was cancelled."""

    default_message: ClassVar[str] = "The task was cancelled."


class ResultDeletedError(TaskGoneError):
    """The result was read before, and deleted."""

    default_message: ClassVar[str] = "The result was read before, and deleted."


class ResultExpiredError(TaskGoneError):
    """The task has ended, and its result's lifetime is over."""

    default_message: ClassVar[str] = "The task has ended, and its result's lifetime is over."


class StreamDiffersError(SamphireError):
    """The stream began anew with other outputs."""

    default_message: ClassVar[str] = "The stream began anew with other outputs."


class UnknownTaskError(SamphireError):
    """There is no such task."""

    default_message: ClassVar[str] = "There is no such task."


class LetterGoneError(SamphireError):
    """There is no such dead letter."""

    default_message: ClassVar[str] = "There is no such dead letter."


class LetterRefusedError(SamphireError):
    """The dead letter cannot be redriven."""

    default_message: ClassVar[str] = "The dead letter cannot be redriven."


class BrokerRightError(SamphireError):
    """The broker's user lacks a right."""

    default_message: ClassVar[str] = "The broker's user lacks a right."


class ResultTimeoutError(SamphireError, TimeoutError):
    """The result did not come in time."""

    default_message: ClassVar[str] = "The result did not come in time."
    retryable: ClassVar[bool] = True


class WebhookVerificationError(SamphireError):
    """The webhook is not to be trusted."""

    default_message: ClassVar[str] = "The webhook is not to be trusted."


class ProtocolError(SamphireError):
    """The stored data is not understood."""

    default_message: ClassVar[str] = "The stored data is not understood."


class ClientClosedError(SamphireError):
    """The client is closed."""

    default_message: ClassVar[str] = "The client is closed."


def _tree(root: type[SamphireError]) -> dict[str, type[SamphireError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_NAME = _tree(SamphireError) | {
    "TimeLimitError": EndpointTimeoutError,  # a worker's own name for the time limit of a Celery producer
    "TimeLimitExceeded": EndpointTimeoutError,  # Celery's, as it is stored
    "SoftTimeLimitExceeded": EndpointTimeoutError,
}


def error_from_name(name: str, message: str) -> SamphireError:
    """Rebuild an error from a stored result; a name that is not of this tree becomes a model fault."""
    known = _BY_NAME.get(name)
    return known(message) if known else ModelFaultError(f"{name}: {message}")
