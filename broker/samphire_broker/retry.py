"""Whether a failed attempt is followed by another, and when: by the error's class, within one budget.

Backoff with full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
import time
from math import inf
from typing import NamedTuple

from msgspec import UNSET

from samphire.errors import (
    EndpointTimeoutError,
    InternalError,
    InvalidInputError,
    ModelFaultError,
    SamphireError,
    StreamLimitError,
    TransientError,
    WorkerCrashError,
)
from samphire.wire.contract import Backoff, InferRequest
from samphire_broker.settings import Settings


class Retry(NamedTuple):
    """Try again at a time, in s since 1970."""

    at: float


class GiveUp(NamedTuple):
    """Give up, for a reason by which dead letters are filtered."""

    reason: str


class RetryPolicy(NamedTuple):
    """How often a task is tried, over failed attempts and lost workers together, and how long it waits in between."""

    max_attempts: int
    backoff: Backoff


def policy_for(request: InferRequest | None, settings: Settings) -> RetryPolicy:
    """The policy of a task: what it says itself goes before what is set for its model, and that before the rest."""
    name = request.model_name if request is not None else ""
    own = settings.model_retries.get(name)
    max_attempts = own.max_attempts if own is not None and own.max_attempts is not None else settings.max_attempts
    backoff = settings.backoff(name)
    if request is not None and request.max_attempts is not UNSET:
        max_attempts = request.max_attempts
    if request is not None and request.backoff is not UNSET:
        backoff = request.backoff
    if request is not None and "sequence_id" in request.parameters:
        # A model that has seen it once has another state than the one that it was sent for; and while a first one
        # waited for its retry, those after it would fail, and what comes later would be asked without them.
        max_attempts = 1
    return RetryPolicy(max_attempts, backoff)


def decide(
    error: SamphireError,
    attempt: int,
    deadline: float,
    policy: RetryPolicy,
    *,
    now: float | None = None,
    chance: float | None = None,
) -> Retry | GiveUp:
    """What follows an attempt that has failed.

    Args:
        error: what it failed with.
        attempt: its number, from 1; attempts that a lost worker took along count.
        deadline: when the answer is of no use any more, in s since 1970; `inf` for never.
        policy: budget and backoff.
        now: the time, in s since 1970.
        chance: a number from 0 to 1, by which the wait is spread.
    """
    may_pass = isinstance(error, ModelFaultError | InternalError) or (
        isinstance(error, TransientError) and error.retryable
    )
    may_pass = may_pass and not isinstance(error, StreamLimitError)  # it would give out as much again
    if not may_pass or attempt >= policy.max_attempts:
        return GiveUp(reason_of(error))
    at = (time.time() if now is None else now) + wait_s(
        attempt, policy.backoff, error.retry_after_s, random.random() if chance is None else chance
    )
    return Retry(at) if at < deadline else GiveUp(reason_of(error))


def wait_s(attempt: int, backoff: Backoff, retry_after_s: float | None, chance: float) -> float:
    """Seconds until the next attempt: exponential, capped, spread by `jitter`; never sooner than was asked for."""
    # An exponent over 1023 is more than a float holds.
    longest = min(backoff.cap_s, backoff.base_s * 2.0 ** min(attempt - 1, 1000))
    spread = longest * (1 - backoff.jitter * (1 - chance))
    return max(spread, retry_after_s if retry_after_s is not None and retry_after_s < inf else 0.0)


REASONS = ("invalid_input", "model_fault", "timeout", "transient", "worker_crash", "internal")
"""What `reason_of` says."""


def reason_of(error: SamphireError) -> str:
    """The class of an error, as dead letters are filtered by it."""
    if isinstance(error, InvalidInputError):
        return "invalid_input"
    if isinstance(error, InternalError):
        return "internal"
    if isinstance(error, WorkerCrashError):
        return "worker_crash"
    if isinstance(error, EndpointTimeoutError):
        return "timeout"
    if isinstance(error, TransientError):
        return "transient"
    return "model_fault"
