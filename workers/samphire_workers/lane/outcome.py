"""How a task ends: the JSON that is stored where Celery's clients look for it."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
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
FAILED = "failed"


def _meta(status: bytes, task_id: str, result: bytes) -> bytes:
    # Celery's Redis backend reads exactly these fields. The status stands first: the scripts look for it.
    done = datetime.now(UTC).isoformat().encode()
    return (
        b'{"status":"%b","task_id":%b,"result":%b,"traceback":null,"children":[],"date_done":"%b"}'
        % (status, _encode(task_id), result, done)
    )


async def _output(request: Request, number: int, tensor: Tensor, store: Store, settings: Settings) -> OutputTensor:
    name, datatype, shape, data = tensor
    if request.json_values:
        values = bytes_to_values(name, datatype, shape, data)
        if values is not None:
            return OutputTensor(name, datatype, shape, data=values)
    elif request.stream and len(data) > settings.inline_output_bytes:
        ref: Ref = await store.write_blob(request.task_id, number, data, await sha256_hex(data))
        return OutputTensor(name, datatype, shape, ref=ref)
    return OutputTensor(name, datatype, shape, raw=binascii.b2a_base64(data, newline=False).decode())


async def success(request: Request, outputs: Sequence[Tensor], store: Store, settings: Settings) -> Settlement:
    """The settlement of a task that Triton answered."""
    tensors = [await _output(request, i, tensor, store, settings) for i, tensor in enumerate(outputs)]
    response = InferResponse(request.request.model_name, request.version, tensors)
    own_prefix = f"{keys.BLOB_PREFIX}{request.task_id}:"
    blobs = [
        tensor.ref.key
        for tensor in request.request.inputs
        if isinstance(tensor.ref, Ref) and tensor.ref.key.startswith(own_prefix) and " " not in tensor.ref.key
    ]
    meta = _meta(b"SUCCESS", request.task_id, _encode(response))
    return Settlement(request.claim.field, request.task_id, SUCCEEDED, meta, request.stream, " ".join(blobs))


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
        meta=_meta(b"FAILURE", request.task_id, info),
        stream=request.stream,
        model=request.model,
        reason=reason_of(error),
        error=f"{type(error).__name__}: {message}",
        attempts=request.attempts,
    )
