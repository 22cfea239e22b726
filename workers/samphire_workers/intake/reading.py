"""From bytes on a queue to a request: what kind it is, who waits for it, and what it asks."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET

from samphire.errors import InvalidInputError, PayloadTooLargeError
from samphire.wire.contract import (
    CONTRACT_VERSION,
    LONGEST_S,
    CanvasFields,
    Envelope,
    Headers,
    check_max_attempts,
    check_model_name,
    check_task_id,
    check_tenant,
)
from samphire.wire.envelope import (
    decode_arguments,
    decode_body,
    decode_canvas_start,
    decode_chord_part,
    decode_delivery,
    decode_envelope,
    parse,
)
from samphire_broker.settings import Settings
from samphire_broker.store import Claimed
from samphire_workers.intake.kinds import Kinds
from samphire_workers.intake.parents import resolve
from samphire_workers.intake.request import NO_TIMES, Request, Times
from samphire_workers.intake.who_waits import checked_stream, who_waits

KEEP_MESSAGE_BYTES = 16 * 2**10

_decode_json = msgspec.json.Decoder().decode


def read(claim: Claimed, settings: Settings, kinds: Kinds) -> tuple[Request, InvalidInputError | None]:
    """Decode a message as far as it can be; the error, if any, is what makes it a dead letter."""
    request = Request(claim)
    error: InvalidInputError | None = None
    try:
        _read_into(request, claim, settings, kinds)
    except InvalidInputError as found:
        # Its frames hold the message, and it is in them: a circle that would keep megabytes until it is looked for.
        error = found.with_traceback(None)
        error.__cause__ = error.__context__ = None
        find_who_waits(request, claim, settings, kinds)
    if claim.size > KEEP_MESSAGE_BYTES:  # decoded, or given up: the bytes are only in the way
        request.claim = claim._replace(message=b"")
        if request.envelope is not None:
            request.envelope.body = ""
    return request, error


def _read_into(request: Request, claim: Claimed, settings: Settings, kinds: Kinds) -> None:
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
    kind = kinds.of(envelope.headers.task, claim.list_key)
    request.kind = kind
    kind.read(request, envelope, settings)


def read_inference(request: Request, envelope: Envelope, settings: Settings) -> None:
    """Read a `samphire.infer`; raises as `Kind.read` does."""
    args, infer, canvas = decode_body(envelope, settings.max_message_bytes)
    _note(request, envelope, canvas)
    if infer.contract != CONTRACT_VERSION:
        raise InvalidInputError(f"expected contract version {CONTRACT_VERSION}, given {infer.contract}")
    request.infer = infer
    if infer.max_attempts is not UNSET:
        check_max_attempts(infer.max_attempts)
    resolve(infer, args)
    if not request.at_home:
        check_model_name(infer.model_name)
        check_tenant(infer.tenant)


def read_arguments(request: Request, envelope: Envelope, settings: Settings) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a task of any kind, for its `read`; its canvas and its times are noted in the request.

    Raises:
        InvalidInputError: another serializer than JSON, or a body or header that is not understood.
    """
    args, kwargs, canvas = decode_arguments(envelope, settings.max_message_bytes)
    _note(request, envelope, canvas)
    return args, kwargs


def _note(request: Request, envelope: Envelope, canvas: CanvasFields) -> None:
    request.canvas = _canvas_request(request.claim, canvas)
    request.times = times_of(envelope.headers)


def read_chord_part(request: Request, envelope: Envelope, settings: Settings) -> None:
    """Read a `samphire.chord_part`; raises as `Kind.read` does."""
    request.payload = decode_chord_part(envelope, settings.max_message_bytes)
    request.task_id = ""  # it has no result of its own


def read_canvas_start(request: Request, envelope: Envelope, settings: Settings) -> None:
    """Read a `samphire.canvas`; raises as `Kind.read` does."""
    request.payload = decode_canvas_start(envelope, settings.max_message_bytes)
    request.times = times_of(envelope.headers)


def read_delivery(request: Request, envelope: Envelope, settings: Settings) -> None:
    """Read a `samphire.deliver`; raises as `Kind.read` does."""
    request.payload = decode_delivery(envelope, settings.max_message_bytes)
    request.times = times_of(envelope.headers)


def find_who_waits(request: Request, claim: Claimed, settings: Settings, kinds: Kinds) -> None:
    """Note of a refused message to whom its end is to be told, as far as that is understood."""
    if request.canvas is not None or request.payload is not None:
        return
    limit = settings.max_message_bytes
    found = who_waits(claim.message, whole=len(claim.message) == claim.size, max_bytes=limit)
    kind = kinds.get(found.fields.get("task"))
    if kind is not None and kind.is_errand:
        found = found._replace(canvas=None)  # it has no next steps of its own
    request.task_id = request.task_id or found.task_id
    request.stream = request.stream or found.stream
    request.canvas = found.canvas


def _canvas_request(claim: Claimed, canvas: CanvasFields | None) -> dict[str, Any] | None:
    """What Celery's tracer reads of a task, if it has next steps or belongs to a chord."""
    if not canvas:
        return None
    message = parse(_decode_json, claim.message, "expected headers in JSON")
    return {**message["headers"], **msgspec.to_builtins(canvas)}


def times_of(headers: Headers) -> Times:
    """When a task may start and how long it may take; raises InvalidInputError where a header tells no time."""
    limit, soft_limit = headers.timelimit or (None, None)
    if not (headers.eta or headers.expires or headers.samphire_deadline or limit or soft_limit):
        return NO_TIMES
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
