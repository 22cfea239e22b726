"""Celery's message: written by the SDK as kombu would, read by the lane without kombu.

A message is JSON in JSON: the envelope holds the body as a string. Celery's own producers put the body in
base64; the SDK writes it plain (`body_encoding` absent), which kombu reads as well and which is smaller.
Compressed bodies are opened with a bound on what may come out.
"""

from __future__ import annotations

import binascii
import bz2
import lzma
import os
import re
import socket
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import msgspec
from msgspec import UNSET

from samphire.errors import InvalidInputError, PayloadTooLargeError
from samphire.wire.contract import (
    Body,
    CanvasFields,
    CanvasStart,
    CanvasStartBody,
    ChordPart,
    ChordPartBody,
    DeliveryBody,
    DeliveryRequest,
    Envelope,
    InferRequest,
)
from samphire.wire.typed_json import plain_arguments

_encode = msgspec.json.Encoder().encode
_decode_envelope = msgspec.json.Decoder(Envelope).decode
_decode_arguments = msgspec.json.Decoder(tuple[list[Any], dict[str, Any], CanvasFields]).decode
_decode_body = msgspec.json.Decoder(Body).decode
_decode_canvas_start = msgspec.json.Decoder(CanvasStartBody).decode
_decode_chord_part = msgspec.json.Decoder(ChordPartBody).decode
_decode_delivery = msgspec.json.Decoder(DeliveryBody).decode
_NO_CANVAS: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_NO_HEADERS: dict[str, Any] = {}
_ORIGIN = f"{os.getpid()}@{socket.gethostname()}"


class _Decompressor(Protocol):
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


_LZMA_MEMORY_BYTES = 64 * 2**20

# The content types that kombu writes ("compression" header) for the codecs of the standard library.
_DECOMPRESSORS: dict[str, Any] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": partial(lzma.LZMADecompressor, memlimit=_LZMA_MEMORY_BYTES),
}


def new_task_id(now: float) -> str:
    """A task id in the form of Celery's: a UUID of version 7 (RFC 9562, 5.7), a time in ms and 74 random bits.

    Its place among a million others of a queue is found by that time, so `now` is the broker's, in s since 1970.
    """
    at = f"{int(now * 1000 + 0.5) & 0xFFFF_FFFF_FFFF:012x}"
    digits = os.urandom(10).hex()
    variant = "89ab"[int(digits[3], 16) & 3]
    return f"{at[:8]}-{at[8:]}-7{digits[:3]}-{variant}{digits[4:7]}-{digits[7:19]}"


_TIME_ORDERED = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def time_of_id(task_id: str) -> float | None:
    """When a task's id was made, in s since 1970; None for ids that do not tell, as Celery's own."""
    found = _TIME_ORDERED.fullmatch(task_id)
    return None if found is None else int(found[1] + found[2], 16) / 1000


def describe(request: InferRequest) -> str:
    """The request without its numbers, for Celery's argsrepr and for logs: `image FP32[1,64]`."""
    tensors = ", ".join(
        [
            f"{t.name} {t.datatype}{t.shape}" if t.from_ is UNSET else f"{t.name} from {t.from_}"
            for t in request.inputs[:8]
        ]
    )
    version = f" v{request.model_version}" if request.model_version else ""
    return f"{request.model_name}{version}: {tensors}"[:400]


def encode_task(
    task: str,
    task_id: str,
    kwargs: object,
    queue: str,
    priority: int,
    *,
    kwargsrepr: str = "",
    canvas: Mapping[str, Any] = _NO_CANVAS,
    headers: Mapping[str, Any] = _NO_HEADERS,
    sent_at: float | None = None,
) -> bytes:
    """One protocol-2 message, ready to be pushed to a queue's list.

    `headers` replace those of an ordinary task; `sent_at` is when it was submitted, in s since 1970.
    """
    return _encode(
        {
            "body": _encode(([], kwargs, canvas)).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "eta": None,
                "expires": None,
                "timelimit": [None, None],
                "argsrepr": "()",
                "kwargsrepr": kwargsrepr,
                "origin": _ORIGIN,
                "ignore_result": False,
                "samphire_sent_at": sent_at,
                **headers,
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "delivery_tag": task_id,
            },
        }
    )


def parse(decode: Any, data: bytes | str | msgspec.Raw, what: str) -> Any:
    """JSON read by a decoder of msgspec's.

    Args:
        decode: reads it, and raises as msgspec does.
        data: the JSON; a part of what was read before (`Raw`) is known to be text.
        what: begins the error.

    Raises:
        InvalidInputError: it is not what the decoder expects, or no text.
    """
    try:
        if isinstance(data, bytes):
            data.decode()  # what nobody asks for is not looked at by the decoder, and may be read later
        return decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        hint = ""
        sample = data.encode(errors="replace") if isinstance(data, str) else bytes(data)
        if b"NaN" in sample or b"Infinity" in sample:
            hint = " (JSON has no NaN or Infinity: send such tensors as raw)"
        raise InvalidInputError(f"{what}: {error or type(error).__name__}{hint}") from error


def decode_envelope(message: bytes) -> Envelope:
    """Read a message's envelope; the body stays as it is.

    Raises:
        InvalidInputError: not JSON, or not a protocol-2 message; says where.
    """
    envelope: Envelope = parse(_decode_envelope, message, "expected a Celery protocol-2 message in JSON")
    return envelope


def decode_body(envelope: Envelope, max_bytes: int) -> Body:
    """Read the body of a `samphire.infer` message.

    Raises:
        InvalidInputError: another serializer than JSON, a broken body, or arguments that are not a request.
        PayloadTooLargeError: it decompresses to more than `max_bytes`.
    """
    data = plain_arguments(_open_body(envelope, max_bytes))
    body: Body = parse(_decode_body, data, "the arguments are not an inference request")
    return body


def decode_arguments(envelope: Envelope, max_bytes: int) -> tuple[list[Any], dict[str, Any], CanvasFields]:
    """Read the body of any task: its positional and keyword arguments, and its canvas; raises as `decode_body` does."""
    data = plain_arguments(_open_body(envelope, max_bytes))
    body: tuple[list[Any], dict[str, Any], CanvasFields] = parse(
        _decode_arguments, data, "the arguments are not Celery's"
    )
    return body


def decode_chord_part(envelope: Envelope, max_bytes: int) -> ChordPart:
    """Read the body of a `samphire.chord_part` message; raises as `decode_body` does."""
    data = _open_body(envelope, max_bytes)
    body: ChordPartBody = parse(_decode_chord_part, data, "the arguments are not the part of a chord")
    return body[1]


def decode_canvas_start(envelope: Envelope, max_bytes: int) -> CanvasStart:
    """Read the body of a `samphire.canvas` message; raises as `decode_body` does."""
    data = _open_body(envelope, max_bytes)
    body: CanvasStartBody = parse(_decode_canvas_start, data, "the arguments are not a canvas")
    return body[1]


def decode_delivery(envelope: Envelope, max_bytes: int) -> DeliveryRequest:
    """Read the body of a `samphire.deliver` message; raises as `decode_body` does."""
    data = _open_body(envelope, max_bytes)
    body: DeliveryBody = parse(_decode_delivery, data, "the arguments are not a delivery")
    return body[1]


def _open_body(envelope: Envelope, max_bytes: int) -> bytes | str:
    if envelope.content_type != "application/json":
        raise InvalidInputError(
            f"expected the content type application/json, given {envelope.content_type!r}: "
            "set the task serializer to json"
        )
    data: bytes | str = envelope.body
    if envelope.properties.body_encoding == "base64":
        try:
            data = binascii.a2b_base64(data, strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInputError(f"the body is not base64: {error}") from error
    if envelope.headers.compression:
        data = decompressed(data if isinstance(data, bytes) else data.encode(), envelope.headers.compression, max_bytes)
    return data


def decompressed(data: bytes, compression: str, max_bytes: int) -> bytes:
    """A body opened, as its `compression` header says.

    Raises:
        InvalidInputError: an unknown compression, or broken data.
        PayloadTooLargeError: it decompresses to more than `max_bytes`.
    """
    codec = _DECOMPRESSORS.get(compression)
    if codec is None:
        raise InvalidInputError(f"expected one of the compressions {', '.join(_DECOMPRESSORS)}, given {compression!r}")
    opener: _Decompressor = codec()
    try:
        out = opener.decompress(data, max_bytes + 1)
    except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
        raise InvalidInputError(f"the body does not decompress as {compression}: {error}") from error
    if len(out) > max_bytes:
        raise PayloadTooLargeError(f"the body decompresses to more than {max_bytes} bytes")
    return out
