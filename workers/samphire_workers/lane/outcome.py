"""How a task ends: the JSON that is stored where Celery's clients look for it."""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from samphire import keys
from samphire.contract import FailureInfo, InferResponse, OutputTensor, Ref
from samphire.envelope import new_task_id
from samphire.errors import (
    EndpointTimeoutError,
    InvalidInputError,
    SamphireError,
    TransientError,
    WorkerCrashError,
)
from samphire.tensors import bytes_to_values
from samphire_broker.settings import Settings
from samphire_broker.store import DeadLetter, Settlement, Store
from samphire_workers.lane.request import Request, sha256_hex
from samphire_workers.triton import Tensor

_encode = msgspec.json.Encoder().encode

SUCCEEDED = "succeeded"


def now_text() -> str:
    """The time, as Celery stores it."""
    return datetime.now(UTC).isoformat()


def _meta(status: str, task_id: str, result: bytes, done: str) -> str:
    # Celery's Redis backend reads exactly these fields. The status stands first: the scripts look for it.
    return (
        f'{{"status":"{status}","task_id":{_encode(task_id).decode()},"result":{result.decode()},'
        f'"traceback":null,"children":[],"date_done":"{done}"}}'
    )


async def store_large(request: Request, outputs: Sequence[Tensor], store: Store, settings: Settings) -> dict[str, Ref]:
    """Store what is too large for the result of an SDK client as claim checks, by output name."""
    refs: dict[str, Ref] = {}
    if request.stream and not request.json_values:
        for number, (name, _, _, data) in enumerate(outputs):
            if len(data) > settings.inline_output_bytes:
                refs[name] = await store.write_blob(request.task_id, number, data, await sha256_hex(data))
    return refs


def _output(tensor: Tensor, refs: Mapping[str, Ref], json_values: bool) -> OutputTensor:
    name, datatype, shape, data = tensor
    if name in refs:
        return OutputTensor(name, datatype, shape, ref=refs[name])
    if json_values:
        values = bytes_to_values(name, datatype, shape, data)
        if values is not None:
            return OutputTensor(name, datatype, shape, data=values)
    return OutputTensor(name, datatype, shape, raw=binascii.b2a_base64(data, newline=False).decode())


def success(request: Request, outputs: Sequence[Tensor], refs: Mapping[str, Ref], done: str) -> Settlement:
    """The settlement of a task that Triton answered."""
    tensors = [_output(tensor, refs, request.json_values) for tensor in outputs]
    response = InferResponse(request.request.model_name, request.version, tensors)
    own_prefix = f"{keys.BLOB_PREFIX}{request.task_id}:"
    blobs = tuple(
        tensor.ref.key
        for tensor in request.request.inputs
        if isinstance(tensor.ref, Ref) and tensor.ref.key.startswith(own_prefix)
    )
    meta = _meta("SUCCESS", request.task_id, _encode(response), done)
    return Settlement(request.claim.field, request.task_id, SUCCEEDED, meta, request.stream, blobs)


def reason_of(error: SamphireError) -> str:
    """The class of an error, as dead letters are filtered by it."""
    if isinstance(error, InvalidInputError):
        return "invalid_input"
    if isinstance(error, WorkerCrashError):
        return "worker_crash"
    if isinstance(error, EndpointTimeoutError):
        return "timeout"
    if isinstance(error, TransientError):
        return "transient"
    return "model_fault"


def failure(request: Request, error: SamphireError) -> DeadLetter:
    """The dead letter of a task, or of a message that cannot be read."""
    message = str(error)[:4000]
    info = _encode(FailureInfo(type(error).__name__, message))
    return DeadLetter(
        field=request.claim.field,
        letter_id=request.task_id or new_task_id(),
        task_id=request.task_id,
        meta=_meta("FAILURE", request.task_id, info, now_text()),
        stream=request.stream,
        model=request.model,
        reason=reason_of(error),
        error=f"{type(error).__name__}: {message}",
        attempts=request.attempts,
    )
