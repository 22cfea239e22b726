"""How a task ends: the JSON that is stored where Celery's clients look for it."""

from __future__ import annotations

import binascii
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from samphire.errors import EndpointTimeoutError, InternalError, SamphireError
from samphire.wire import keys
from samphire.wire.contract import FailureInfo, InferResponse, OutputTensor, Ref, RetryInfo
from samphire.wire.tensors import bytes_to_values
from samphire.wire.timings import Timings
from samphire_broker.store import Later, Letter, OtherEnd, Settlement, Store
from samphire_workers.intake.loading import sha256_hex
from samphire_workers.intake.request import Request
from samphire_workers.triton.messages import Tensor

_encode = msgspec.json.Encoder().encode

PASSED_ON_BYTES = 256 * 2**10
"""Outputs over this size reach the next inference of a plain producer's canvas as claim checks."""

CLOCKS_APART_S = 86_400.0
"""A submit so far in the future is none."""

ATTEMPT_CHARACTERS = 500
"""Most of an error's text that the history of a task keeps of each attempt."""


class NextSteps(NamedTuple):
    """What a task that has ended owes to others of its canvas."""

    pushes: tuple[tuple[str, str], ...]
    """Keys of lists, and messages to push there."""
    others: tuple[OtherEnd, ...]
    """Ends of tasks that nobody will ever run."""
    children: list[Any]
    """The tasks that were sent, as Celery stores them with the result."""


class TimeLimitError(EndpointTimeoutError):
    """The time limit of a Celery producer ran out; as in Celery it is not tried again."""

    retryable = False

    def __init__(self, limit_s: float, *, soft: bool) -> None:
        super().__init__(f"the {'soft ' if soft else ''}time limit of {limit_s} s was exceeded")
        self.info = FailureInfo(
            "SoftTimeLimitExceeded" if soft else "TimeLimitExceeded", [limit_s], "billiard.exceptions"
        )


def now_text() -> str:
    """The time, as Celery stores it."""
    return datetime.now(UTC).isoformat()


def _meta(status: str, task_id: str, result: bytes, done: str) -> str:
    # Celery's Redis backend reads exactly these fields. The status stands first: the scripts look for it.
    return (
        f'{{"status":"{status}","task_id":{_encode(task_id).decode()},"result":{result.decode()},'
        f'"traceback":null,"children":[],"date_done":"{done}"}}'
    )


async def store_large(
    request: Request, outputs: Sequence[Tensor], store: Store, above_bytes: int, ttl_s: int = 0
) -> dict[str, Ref]:
    """Store outputs of more bytes as claim checks, which live as long as results, and at least `ttl_s`; by name."""
    tenant, task_id = request.request.tenant, request.task_id
    return {
        name: await store.write_blob(tenant, task_id, number, data, await sha256_hex(data), ttl_s)
        for number, (name, _, _, data) in enumerate(outputs)
        if len(data) > above_bytes
    }


def takes_claim_checks(request: Request) -> bool:
    """Whether who submitted reads claim checks: clients of the SDK do, who asks for JSON values does not."""
    return bool(request.stream) and not request.json_values


def _output(tensor: Tensor, refs: Mapping[str, Ref], json_values: bool) -> OutputTensor:
    name, datatype, shape, data = tensor
    if name in refs:
        return OutputTensor(name, datatype, shape, ref=refs[name])
    if json_values:
        values = bytes_to_values(name, datatype, shape, data)
        if values is not None:
            return OutputTensor(name, datatype, shape, data=values)
    return OutputTensor(name, datatype, shape, raw=binascii.b2a_base64(data, newline=False).decode())


def response(request: Request, outputs: Sequence[Tensor], refs: Mapping[str, Ref]) -> InferResponse:
    """What Triton answered, as the contract says it."""
    tensors = [_output(tensor, refs, request.json_values) for tensor in outputs]
    streamed = UNSET if request.streamed is None else request.streamed
    return InferResponse(request.request.model_name, request.version, tensors, streamed, request.timings)


def timings(request: Request, now: float, clock_now: float, worker: str) -> Timings | UnsetType:
    """Where the time of a task went that Triton has answered.

    Args:
        request: that was answered.
        now: by the monotonic clock.
        clock_now: by the broker's clock, in s since 1970.
        worker: name of this worker.
    """
    answered = request.answered
    if answered is None:
        return UNSET
    claimed_at = request.claimed_at
    sent_at = None if request.envelope is None else request.envelope.headers.samphire_sent_at
    if sent_at is not None and not 0 < sent_at < clock_now + CLOCKS_APART_S:
        sent_at = None  # anybody may write anything there
    queue_s, compute_s = answered.averages
    return Timings(
        settled_at=_rounded(clock_now),
        queued_s=None if sent_at is None else _rounded(max(0.0, clock_now - (now - claimed_at) - sent_at)),
        waited_s=_rounded(answered.asked_at - claimed_at),
        triton_s=_rounded(answered.at - answered.asked_at),
        triton_queue_s=None if queue_s is None else _rounded(queue_s),
        triton_compute_s=None if compute_s is None else _rounded(compute_s),
        settling_s=_rounded(now - answered.at),
        attempts=request.attempts + 1,
        batch_size=answered.tasks,
        worker=worker,
    )


def _rounded(seconds: float) -> float:
    return int(seconds * 1e6) / 1e6  # `round` takes ten times as long


def _own_blobs(request: Request) -> tuple[str, ...]:
    """The claim checks that were written for this task's inputs: nobody else needs them."""
    if request.infer is None:
        return ()
    refs = (tensor.ref for tensor in request.infer.inputs)
    return tuple(ref.key for ref in refs if isinstance(ref, Ref) and keys.is_blob_of(ref.key, request.task_id))


def success(request: Request, answer: object, done: str) -> Settlement:
    """The settlement of a task that has its result, which JSON can hold."""
    meta = _meta_of(request, "SUCCESS", answer, done)
    settlement = Settlement(
        request.claim.field, request.task_id, "succeeded", meta, request.stream, _own_blobs(request)
    )
    return settlement if request.streamed is None else settlement._replace(streamed=(request.streamed.outputs,))


def _meta_of(request: Request, status: str, result: object, done: str) -> str:
    if request.envelope is not None and request.envelope.headers.ignore_result:
        return ""
    return _meta(status, request.task_id, _encode(result), done)


def revoked_meta(task_id: str, reason: str) -> str:
    """The result of a task that was cancelled or has expired, as Celery stores it.

    The reasons are Celery's words: "expired", "revoked" of what had not started, "terminated" of what was running.
    """
    return _meta("REVOKED", task_id, _encode(_revoked_info(reason)), now_text())


def _revoked_info(reason: str) -> FailureInfo:
    return FailureInfo("TaskRevokedError", [reason], "celery.exceptions")


def revoked(request: Request, state: Literal["cancelled", "expired"]) -> Settlement:
    """The settlement of a task that is not to be run, or not to its end."""
    reason = "expired" if state == "expired" else "revoked" if request.started_at is None else "terminated"
    meta = _meta_of(request, "REVOKED", _revoked_info(reason), now_text())
    return Settlement(request.claim.field, request.task_id, state, meta, request.stream, _own_blobs(request))


def with_steps(settlement: Settlement, steps: NextSteps) -> Settlement:
    """The settlement together with what the task owes to others of its canvas."""
    pushes, others, children = steps
    begin, found, end = settlement.meta.rpartition('"children":[]')  # the last: what stands in the result is not it
    meta = f'{begin}"children":{_encode(children).decode()}{end}' if found else settlement.meta
    return settlement._replace(pushes=pushes, others=others, meta=meta)


def attempt_text(worker: str, error: SamphireError) -> str:
    """What is kept of an attempt that came to nothing, JSON."""
    attempt = {"at": now_text(), "worker": worker, "error": _told(error, ATTEMPT_CHARACTERS)}
    if isinstance(error, InternalError) and error.traceback_text:
        attempt["traceback"] = error.traceback_text
    return _encode(attempt).decode()


def _told(error: SamphireError, characters: int) -> str:
    return f"{type(error).__name__}: {str(error)[:characters]}"


def public_name(error: SamphireError) -> str:
    """The class that a client knows: a worker's own classes are more exact than it needs."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == SamphireError.__module__)


def _failure_info(error: SamphireError) -> FailureInfo:
    return error.info if isinstance(error, TimeLimitError) else FailureInfo(public_name(error), str(error)[:4000])


def done(request: Request) -> Settlement:
    """The settlement of what has no result."""
    return Settlement(request.claim.field, request.task_id, "succeeded", "", "")


def put_off(request: Request, delay_s: float, attempt: str) -> Settlement:
    """The settlement of an attempt (JSON) of what has no result, and is tried again."""
    return done(request)._replace(state="retrying", retry=Later(delay_s, attempt))


def failure(request: Request, error: SamphireError, reason: str, worker: str, attempt: str = "") -> Settlement:
    """The settlement, with a dead letter, of a task that failed or of a message that cannot be read.

    `attempt` is what to keep of the last one, JSON; by default the error.
    """
    tried = request.started_at is not None
    return Settlement(
        field=request.claim.field,
        task_id=request.task_id,
        state="failed",
        meta=_meta_of(request, "FAILURE", _failure_info(error), now_text()),
        stream=request.stream,
        letter=Letter(
            letter_id=request.task_id or str(uuid.uuid4()),
            model=request.model,
            reason=reason,
            error=_told(error, 4000),
            attempts=request.attempts + tried,
            attempt=attempt or attempt_text(worker, error),
        ),
    )


def retry(request: Request, error: SamphireError, delay_s: float, worker: str) -> Settlement:
    """The settlement of an attempt that failed and is followed by another."""
    told = _failure_info(error)
    info = RetryInfo(told.exc_type, told.exc_message, told.exc_module, attempts=request.attempts + 1)
    meta = _meta_of(request, "RETRY", info, now_text())
    later = Later(delay_s, attempt_text(worker, error))
    return Settlement(request.claim.field, request.task_id, "retrying", meta, request.stream, retry=later)
