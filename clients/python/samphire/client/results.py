"""Results: from the stored JSON to arrays."""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET
from numpy.typing import NDArray

from samphire.errors import (
    ProtocolError,
    ResultDeletedError,
    SamphireError,
    TaskCancelledError,
    TaskExpiredError,
    error_from_name,
)
from samphire.wire.contract import DELETED, FailureInfo, InferResponse, OutputTensor, Ref, TaskMeta
from samphire.wire.outputs import StreamedTensor
from samphire.wire.tensors import bytes_to_array, values_to_bytes
from samphire.wire.timings import Timings

Status = Literal["queued", "scheduled", "running", "retrying", "succeeded", "failed", "cancelled", "expired"]

_decode_meta = msgspec.json.Decoder(TaskMeta).decode
_decode_response = msgspec.json.Decoder(InferResponse).decode
_decode_failure = msgspec.json.Decoder(FailureInfo).decode
_STATES: dict[str, Status] = {
    "PENDING": "queued",
    "STARTED": "running",
    "RETRY": "retrying",
    "SUCCESS": "succeeded",
    "FAILURE": "failed",
    "REVOKED": "cancelled",
}
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})

FetchBlob = Callable[[str, int], Awaitable[bytes | None]]


@dataclass(frozen=True)
class InferResult:
    """What a model answered."""

    task_id: str
    model_name: str
    model_version: str
    """Version number that served the request."""
    outputs: Mapping[str, NDArray[Any]]
    """Output name to array, with the model's dtypes and shapes; BYTES are object arrays of `bytes`.
    Numeric arrays are read-only: copy them to write. Of a model that streams they are joined along the first
    dimension."""
    output_count: int | None = None
    """Of a model that streams: how many outputs it has given out."""
    timings: Timings | None = None
    """Where its time went; None of a result that an older worker has written."""


def decode_meta(meta: bytes) -> TaskMeta:
    """Read a stored state.

    Raises:
        ProtocolError: it is not what Celery or Samphire writes.
    """
    try:
        return _decode_meta(meta)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"the stored result is not understood: {error}") from error


def status_of(meta: TaskMeta) -> Status:
    """The state in Samphire's words."""
    if meta.status == "REVOKED" and b'"expired"' in bytes(meta.result):  # the word of Celery, and of our workers
        return "expired"
    return _STATES.get(meta.status, "running")


async def result_of(task_id: str, meta: TaskMeta, fetch: FetchBlob) -> InferResult | SamphireError:
    """The result, or the error that the task ended with; claim checks are fetched with `fetch`."""
    try:
        if meta.status == "FAILURE":
            failure = _decode_failure(meta.result)
            message = failure.exc_message
            if isinstance(message, list):
                message = " ".join(map(str, message))
            return error_from_name(failure.exc_type, str(message))
        if meta.status == "REVOKED":
            if status_of(meta) == "expired":
                return TaskExpiredError(f"task {task_id} expired before it was started")
            running = b'"terminated"' in bytes(meta.result)  # Celery's word, and our workers'
            return TaskCancelledError(
                f"task {task_id} was cancelled " + ("while it ran" if running else "before it ran")
            )
        if bytes(meta.result) == DELETED:
            return ResultDeletedError(f"the result of task {task_id} was read before, and deleted as asked for")
        response = _decode_response(meta.result)
        outputs = {}
        for tensor in response.outputs:
            data = await _tensor_bytes(tensor, fetch)
            outputs[tensor.name] = bytes_to_array(tensor.name, tensor.datatype, tensor.shape, data)
    except SamphireError as error:
        return error
    except (msgspec.MsgspecError, binascii.Error, KeyError, ValueError) as error:
        return ProtocolError(
            f"task {task_id} is no inference of Samphire: its stored result is not understood: {error}"
        )
    count = None if response.streamed is UNSET else response.streamed.outputs
    timings = None if response.timings is UNSET else response.timings
    return InferResult(task_id, response.model_name, response.model_version, outputs, count, timings)


async def streamed_array(tensor: StreamedTensor, fetch: FetchBlob) -> NDArray[Any]:
    """A tensor of a streamed output.

    Raises:
        ProtocolError: its claim check has expired, or was altered.
    """
    data = tensor.data if isinstance(tensor.data, bytes) else await _fetched(tensor.name, tensor.data, fetch)
    return bytes_to_array(tensor.name, tensor.datatype, tensor.shape, data)


async def _fetched(name: str, ref: Ref, fetch: FetchBlob) -> bytes:
    data = await fetch(ref.key, ref.size)
    if data is None:
        raise ProtocolError(f"output {name!r} has expired: its claim check {ref.key!r} is gone")
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise ProtocolError(f"output {name!r}: the bytes behind {ref.key!r} were altered")
    return data


async def _tensor_bytes(tensor: OutputTensor, fetch: FetchBlob) -> bytes:
    if isinstance(tensor.raw, str):
        return binascii.a2b_base64(tensor.raw)
    if isinstance(tensor.ref, Ref):
        return await _fetched(tensor.name, tensor.ref, fetch)
    return values_to_bytes(tensor.name, tensor.datatype, tensor.shape, tensor.data)
