"""A claimed message read, checked and loaded: from bytes on a queue to tensors for Triton."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from samphire import keys
from samphire.contract import (
    CANVAS_TASK,
    CHORD_PART_TASK,
    CONTRACT_VERSION,
    INFER_TASK,
    Canvas,
    CanvasStart,
    ChordPart,
    Envelope,
    Headers,
    InferRequest,
    InputTensor,
    Ref,
    check_max_attempts,
    check_model_name,
    check_tenant,
)
from samphire.encoder import LONGEST_S
from samphire.envelope import decode_body, decode_canvas, decode_canvas_start, decode_chord_part, decode_envelope
from samphire.errors import InvalidInputError, PayloadTooLargeError
from samphire.tensors import ITEM_SIZES, check_bytes, element_count, values_to_bytes
from samphire.validation import ModelSignature, check_request_size
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed, Store
from samphire_workers.lane.parents import resolve, sources_of

HASH_IN_THREAD_BYTES = 256 * 2**10
"""Above this, hashing leaves the event loop: hashlib releases the interpreter's lock."""

KEEP_MESSAGE_BYTES = 16 * 2**10
FORMS_MAX = 1024
FORM_MAX_CHARACTERS = 64 * 2**10

_STREAM = re.compile(re.escape(keys.STREAM_PREFIX) + r"[A-Za-z0-9-]{1,64}")
_ID_IN_TAIL = re.compile(rb'"correlation_id": ?"([^"\\]{1,255})"')
_STREAM_IN_TAIL = re.compile(rb'"samphire_stream": ?"([^"\\]{1,80})"')
MICRO_BATCH = "micro_batch"
"""A parameter for the lane, which the model does not see: false keeps a request alone, "tenant" joins it with requests
of its own tenant only."""
OWN_TENANT = "tenant"
MICRO_BATCH_WISHES = (None, True, False, OWN_TENANT)
_SOLO_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end")
_decode_json = msgspec.json.Decoder().decode
_encode_json = msgspec.json.Encoder(order="deterministic").encode


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
    if claim.size > KEEP_MESSAGE_BYTES:  # decoded, or given up: the bytes are only in the way
        request.claim = claim._replace(message=b"")
        if request.envelope is not None:
            request.envelope.body = ""
    return request, error


def _read_into(request: Request, claim: Claimed, settings: Settings) -> None:
    if claim.size > settings.max_message_bytes:
        found = _ID_IN_TAIL.search(claim.message)
        stream = _STREAM_IN_TAIL.search(claim.message)
        request.task_id = found.group(1).decode(errors="replace") if found else ""
        request.stream = _checked_stream(stream.group(1).decode(errors="replace")) if stream else ""
        raise PayloadTooLargeError(
            f"expected a message of at most {settings.max_message_bytes} bytes, given {claim.size}: "
            "send large tensors as claim checks (ref)"
        )
    envelope = decode_envelope(claim.message)
    request.envelope = envelope
    if not 1 <= len(envelope.headers.id) <= 255:
        raise InvalidInputError(f"expected a task id of 1 to 255 characters, given {envelope.headers.id[:300]!r}")
    request.task_id = envelope.headers.id
    request.stream = _checked_stream(envelope.headers.samphire_stream)
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
    try:
        args, infer, canvas = decode_body(envelope, settings.max_message_bytes)
    except InvalidInputError:
        request.canvas = _canvas_request(claim, decode_canvas(envelope, settings.max_message_bytes))
        raise
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


def _checked_stream(stream: str) -> str:
    # The header names a key that the settlement writes to: anything but a client's stream is ignored.
    return stream if _STREAM.fullmatch(stream) else ""


def _canvas_request(claim: Claimed, canvas: Canvas | None) -> dict[str, Any] | None:
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


class Checked(NamedTuple):
    """What checking a request against a model found out."""

    rows: int
    version: str
    nbytes: int
    batch_key: object


class Checker:
    """Checks requests against one model. Requests alike in all but their numbers are checked once."""

    def __init__(self, signature: ModelSignature, settings: Settings, *, may_join: bool = True) -> None:
        self.signature = signature
        self._max_request_bytes = settings.max_request_bytes
        self._separate_tenants = settings.separate_tenants
        wanted = settings.micro_batch.get(signature.name, signature.dynamic_batching)
        self.joins = may_join and wanted and signature.max_batch_size > 0 and not signature.sequence_batching
        """Whether requests of the model are joined into micro-batches."""
        self._known: dict[object, Checked] = {}

    def check(self, request: Request) -> None:
        """Check a request and note what it will take.

        Raises:
            InvalidInputError: it does not fit the model, or its parts contradict each other.
        """
        infer = request.request
        form = _form(infer, self._separate_tenants)
        found = self._known.get(form) if form is not None else None
        if found is None:
            found = self._check(request)
            if form is not None and len(self._known) < FORMS_MAX:
                self._known[form] = found
        request.rows, request.version, request.nbytes, request.batch_key = found
        request.signature = self.signature

    def _check(self, request: Request) -> Checked:
        infer = request.request
        version = self.signature.resolve(infer.model_version)
        rows = self.signature.check(infer)
        sources = [source for tensor in infer.inputs for source in sources_of(tensor)]
        sizes = [(source.name, _size(source)) for source in sources]
        check_request_size(sizes, self._max_request_bytes)
        request.json_values = any(source.data is not UNSET for source in sources)
        return Checked(rows, version, sum(size for _, size in sizes), self._batch_key(infer, version))

    def _batch_key(self, infer: InferRequest, version: str) -> object:
        """What requests must have in common to share a micro-batch; None where none may."""
        wish = infer.parameters.get(MICRO_BATCH)
        if wish not in MICRO_BATCH_WISHES:
            raise InvalidInputError(
                f"parameter {MICRO_BATCH!r}: expected true, false or {OWN_TENANT!r}, given {str(wish)[:100]!r}"
            )
        if not self.joins or wish is False or any(name in infer.parameters for name in _SOLO_PARAMETERS):
            return None
        return (
            version,
            infer.tenant if self._separate_tenants or wish == OWN_TENANT else None,
            tuple((t.name, t.datatype, *t.shape[1:]) for t in infer.inputs),
            tuple(output.name for output in infer.outputs),
            _encode_json(infer.parameters) if infer.parameters else b"",
        )


def _form(infer: InferRequest, separate_tenants: bool) -> object:
    """What the check of a small request depends on; None where it depends on more."""
    if infer.parameters or infer.outputs or infer.model_version:
        return None
    parts: list[object] = [infer.tenant] if separate_tenants else []
    for tensor in infer.inputs:
        if tensor.datatype == "BYTES" or not isinstance(tensor.raw, str) or len(tensor.raw) > FORM_MAX_CHARACTERS:
            return None
        if tensor.data is not UNSET or tensor.ref is not UNSET:
            return None
        parts += (tensor.name, tensor.datatype, len(tensor.raw), *tensor.shape)
    return tuple(parts)


def _size(tensor: InputTensor) -> int:
    sources = [source for source in (tensor.data, tensor.raw, tensor.ref) if source is not UNSET]
    if len(sources) != 1:
        raise InvalidInputError(
            f"input {tensor.name!r}: expected exactly one of data, raw, ref and from, given {len(sources)}"
        )
    if isinstance(tensor.ref, Ref):
        if not tensor.ref.key.startswith((keys.BLOB_PREFIX, keys.RESULT_BLOB_PREFIX)):
            raise InvalidInputError(
                f"input {tensor.name!r}: expected a ref to a key {keys.BLOB_PREFIX}…, given {tensor.ref.key[:200]!r}"
            )
        if not 0 <= tensor.ref.size < 2**63:
            raise InvalidInputError(f"input {tensor.name!r}: expected a size of at least 0 and below 2**63")
        return tensor.ref.size
    claimed = element_count(tensor.shape) * ITEM_SIZES.get(tensor.datatype, 0)
    text = len(tensor.raw) if isinstance(tensor.raw, str) else len(bytes(tensor.data))  # type: ignore[arg-type]
    if claimed > 8 * max(text, 1):  # even "0," in JSON gives 8 bytes; more is a shape that lies
        raise InvalidInputError(
            f"input {tensor.name!r}: shape {tensor.shape} of {tensor.datatype} takes {claimed} bytes, "
            f"given {text} characters"
        )
    return max(claimed, text)


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
            f"input {name!r}: the bytes behind {ref.key!r} have sha256 {digest}, the request says {ref.sha256[:64]}"
        )
    return data
