"""A claimed message read, checked and loaded: from bytes on a queue to tensors for Triton."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from samphire.client.encoder import LONGEST_S
from samphire.errors import InvalidInputError, PayloadTooLargeError, SamphireError
from samphire.wire import keys
from samphire.wire.contract import (
    CANVAS_TASK,
    CHORD_PART_TASK,
    CONTRACT_VERSION,
    INFER_TASK,
    CanvasFields,
    CanvasStart,
    ChordPart,
    Envelope,
    Headers,
    InferRequest,
    InputTensor,
    Ref,
    check_max_attempts,
    check_model_name,
    check_task_id,
    check_tenant,
)
from samphire.wire.envelope import decode_body, decode_canvas_start, decode_chord_part, decode_envelope
from samphire.wire.signature import ModelSignature
from samphire.wire.tensors import check_bytes, values_to_bytes
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed, Store
from samphire_workers.intake.parents import resolve, sources_of
from samphire_workers.intake.who_waits import checked_stream, who_waits
from samphire_workers.triton.endpoint import Endpoint

HASH_IN_THREAD_BYTES = 256 * 2**10
"""Above this, hashing leaves the event loop: hashlib releases the interpreter's lock."""

LOAD_IN_THREAD_BYTES = 64 * 2**10
"""With more JSON values than that a request leaves the event loop while they are read."""

KEEP_MESSAGE_BYTES = 16 * 2**10

_decode_json = msgspec.json.Decoder().decode


class Times(NamedTuple):
    """When a task may start and how long it may take; in s, points in time since 1970."""

    eta: float = 0.0
    expires: float = math.inf
    deadline: float = math.inf
    limit: float = math.inf
    soft_limit: float = math.inf


_NO_TIMES = Times()


@dataclass(slots=True)
class Request:
    """One task on its way through the lane."""

    claim: Claimed
    task_id: str = ""
    stream: str = ""
    """Event stream of the client that waits; empty for a plain Celery producer."""
    envelope: Envelope | None = None
    infer: InferRequest | None = None
    version: str = ""
    """Version number that the request was resolved to."""
    rows: int = 0
    nbytes: int = 0
    """Bytes that the tensors will take once they are loaded."""
    json_values: bool = False
    """The inputs came as JSON values, so the outputs go back as such."""
    signature: ModelSignature | None = None
    """Of the model, as the request was checked against it."""
    batch_key: object = None
    """Equal for requests that may share a micro-batch; None: none may."""
    attempts: int = 0
    """Attempts before this one."""
    crashes: int = 0
    """Those of them that took a worker or a model's process down."""
    losses: int = 0
    """Endpoints that died with it, which are no attempts."""
    outcome: str = ""
    """How it has ended here: "succeeded", or something else."""
    refusal: SamphireError | None = None
    """Why it cannot be asked, of one of a sequence: it fails when its turn comes."""
    endpoint: Endpoint | None = None
    """The endpoint that it must go to; by default any."""
    over: bool = False
    """It has ended while its micro-batch is still under way: whatever comes of that is not for it."""
    times: Times = _NO_TIMES
    taken_in_at: float = 0.0
    """When its micro-batch was made, by the monotonic clock."""
    started_at: float | None = None
    """When it went to Triton, in s since 1970."""
    canvas: dict[str, Any] | None = None
    """Celery's request, of a task that has next steps or belongs to a chord."""
    errand: ChordPart | CanvasStart | None = None
    """Set where the message is no inference: the part of a chord that has ended, or a canvas to start."""
    tensors: list[bytes] = field(default_factory=list)

    @property
    def request(self) -> InferRequest:
        """The decoded request; only to be used once `read` has returned."""
        assert self.infer is not None
        return self.infer

    @property
    def model(self) -> str:
        """Name of the model, as far as it is known."""
        if self.infer is not None:
            return self.infer.model_name
        return keys.parse_queue(keys.split_list(self.claim.list_key)[0])[0]

    @property
    def sequence_id(self) -> object:
        """What Triton calls the correlation id; None where the request is of no sequence."""
        return self.request.parameters.get("sequence_id")

    @property
    def keeps_order(self) -> bool:
        """Whether it is known to be of a sequence, and was claimed from where the order is kept."""
        return self.infer is not None and self.sequence_id is not None and self.at_home

    @property
    def at_home(self) -> bool:
        """Whether the task was claimed from the queue of its own model and tenant."""
        if self.errand is not None:
            return True
        return home_of(self.claim.list_key) == (self.request.model_name, self.request.tenant)

    @property
    def home_list(self) -> str:
        """Key of the list that this task belongs to."""
        priority = keys.split_list(self.claim.list_key)[1]
        return keys.queue_list(keys.queue_name(self.request.model_name, self.request.tenant), priority)


@lru_cache(maxsize=4096)
def home_of(list_key: str) -> tuple[str, str]:
    """Model and tenant whose messages lie in a list."""
    return keys.parse_queue(keys.split_list(list_key)[0])


def read(claim: Claimed, settings: Settings) -> tuple[Request, InvalidInputError | None]:
    """Decode a message as far as it can be; the error, if any, is what makes it a dead letter."""
    request = Request(claim)
    error: InvalidInputError | None = None
    try:
        _read_into(request, claim, settings)
    except InvalidInputError as found:
        # Its frames hold the message, and it is in them: a circle that would keep megabytes until it is looked for.
        error = found.with_traceback(None)
        error.__cause__ = error.__context__ = None
        find_who_waits(request, claim, settings)
    if claim.size > KEEP_MESSAGE_BYTES:  # decoded, or given up: the bytes are only in the way
        request.claim = claim._replace(message=b"")
        if request.envelope is not None:
            request.envelope.body = ""
    return request, error


def _read_into(request: Request, claim: Claimed, settings: Settings) -> None:
    if claim.size > settings.max_message_bytes:
        raise PayloadTooLargeError(
            f"expected a message of at most {settings.max_message_bytes} bytes, given {claim.size}: "
            "send large tensors as claim checks (ref)"
        )
    envelope = decode_envelope(claim.message)
    request.envelope = envelope
    check_task_id(envelope.headers.id)
    request.task_id = envelope.headers.id
    request.stream = checked_stream(envelope.headers.samphire_stream)
    if envelope.headers.task == CHORD_PART_TASK:
        request.errand = decode_chord_part(envelope, settings.max_message_bytes)
        request.task_id = ""  # it has no result of its own
        return
    if envelope.headers.task == CANVAS_TASK:
        request.errand = decode_canvas_start(envelope, settings.max_message_bytes)
        request.times = _times(envelope.headers)
        return
    if envelope.headers.task != INFER_TASK:
        raise InvalidInputError(
            f"expected the task {INFER_TASK} on an inference queue, given {envelope.headers.task[:200]!r}"
        )
    args, infer, canvas = decode_body(envelope, settings.max_message_bytes)
    request.canvas = _canvas_request(claim, canvas)
    request.times = _times(envelope.headers)
    if infer.contract != CONTRACT_VERSION:
        raise InvalidInputError(f"expected contract version {CONTRACT_VERSION}, given {infer.contract}")
    request.infer = infer
    if infer.max_attempts is not UNSET:
        check_max_attempts(infer.max_attempts)
    resolve(infer, args)
    if not request.at_home:
        check_model_name(infer.model_name)
        check_tenant(infer.tenant)


def find_who_waits(request: Request, claim: Claimed, settings: Settings) -> None:
    """Note of a refused message to whom its end is to be told, as far as that is understood."""
    if request.canvas is not None or request.errand is not None:
        return
    limit = settings.max_message_bytes
    found = who_waits(claim.message, whole=len(claim.message) == claim.size, max_bytes=limit)
    if found.fields.get("task") in (CHORD_PART_TASK, CANVAS_TASK):
        found = found._replace(canvas=None)  # it has no next steps of its own
    request.task_id = request.task_id or found.task_id
    request.stream = request.stream or found.stream
    request.canvas = found.canvas


def _canvas_request(claim: Claimed, canvas: CanvasFields | None) -> dict[str, Any] | None:
    """What Celery's tracer reads of a task, if it has next steps or belongs to a chord."""
    if not canvas:
        return None
    return {**_decode_json(claim.message)["headers"], **msgspec.to_builtins(canvas)}


def _times(headers: Headers) -> Times:
    limit, soft_limit = headers.timelimit or (None, None)
    if not (headers.eta or headers.expires or headers.samphire_deadline or limit or soft_limit):
        return _NO_TIMES
    return Times(
        eta=_instant("eta", headers.eta) if headers.eta else 0.0,
        expires=_instant("expires", headers.expires) if headers.expires else math.inf,
        deadline=headers.samphire_deadline or math.inf,
        limit=limit or math.inf,
        soft_limit=soft_limit or math.inf,
    )


def _instant(what: str, value: str | float) -> float:
    """Seconds since 1970 of a header, which Celery writes in ISO 8601; without an offset it is UTC, as in Celery."""
    if not isinstance(value, str):
        return value
    try:
        instant = datetime.fromisoformat(value)
        seconds = (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        raise InvalidInputError(f"expected {what} as a time in ISO 8601, given {value[:100]!r}") from error
    if what == "eta" and seconds > time.time() + LONGEST_S:
        raise InvalidInputError(f"expected eta within ten years, given {value[:100]!r}")
    return seconds


def has_refs(request: Request) -> bool:
    """Whether a tensor has to be fetched from the broker."""
    return any(source.ref is not UNSET for tensor in request.request.inputs for source in sources_of(tensor))


async def fetch(request: Request, store: Store) -> dict[str, bytes]:
    """Bytes behind a request's claim checks, by key.

    Raises:
        InvalidInputError: one is gone, or its bytes were altered.
    """
    return {
        source.ref.key: await _redeem(tensor.name, source.ref, store)
        for tensor in request.request.inputs
        for source in sources_of(tensor)
        if isinstance(source.ref, Ref)
    }


def takes_long(request: Request) -> bool:
    """Whether to load it in a thread: many JSON values, each of which is looked at."""
    sources = (source for tensor in request.request.inputs for source in sources_of(tensor))
    return sum(memoryview(source.data).nbytes for source in sources if source.data is not UNSET) > LOAD_IN_THREAD_BYTES


def load(request: Request, fetched: Mapping[str, bytes]) -> None:
    """Bring a request's tensors into memory, as bytes in the order of its inputs.

    Raises:
        InvalidInputError: bytes that do not fit the shape.
    """
    request.tensors = [
        b"".join([_values(source, fetched) for source in sources_of(tensor)]) for tensor in request.request.inputs
    ]


def _values(tensor: InputTensor, fetched: Mapping[str, bytes]) -> bytes:
    if isinstance(tensor.raw, str):
        try:
            data = binascii.a2b_base64(tensor.raw, strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(f"input {tensor.name!r}: raw is not base64: {error}") from error
    elif isinstance(tensor.ref, Ref):
        data = fetched[tensor.ref.key]
    else:
        values: Any = _decode_json(tensor.data)  # type: ignore[arg-type]
        data = values_to_bytes(tensor.name, tensor.datatype, tensor.shape, values)
    check_bytes(tensor.name, tensor.datatype, tensor.shape, data)
    return data


async def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`; of large data in a thread."""
    if len(data) < HASH_IN_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


async def _redeem(name: str, ref: Ref, store: Store) -> bytes:
    data = await store.read_blob(ref.key, ref.size)
    if data is None:
        raise InvalidInputError(f"input {name!r}: the claim check {ref.key!r} has expired or never was")
    if len(data) != ref.size:
        raise InvalidInputError(f"input {name!r}: expected {ref.size} bytes behind {ref.key!r}, found {len(data)}")
    digest = await sha256_hex(data)
    if digest != ref.sha256.lower():
        raise InvalidInputError(
            f"input {name!r}: the bytes behind {ref.key!r} have another sha256 than {ref.sha256[:64]!r}, which the "
            "request says"
        )
    return data
