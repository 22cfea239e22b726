"""Who waits for a message that is refused: its id, its client's stream, its group and its canvas, read leniently.

A message may be refused before its canvas is read: it is too large, of another protocol or serializer, or a header has
the wrong type. The steps that would follow it never come, and whoever waits for them must be told. So everything that
is understood is taken, and nothing here raises.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from samphire.errors import InvalidInputError
from samphire.wire import keys
from samphire.wire.contract import ID_MAX_CHARACTERS, UNKNOWN_CHORD, CanvasFields
from samphire.wire.envelope import decompressed

_STREAM = re.compile(re.escape(keys.STREAM_PREFIX) + r"[A-Za-z0-9-]{1,64}")
_ID_IN_TAIL = re.compile(rb'"correlation_id": ?"([^"\\]{1,255})"')
_STREAM_IN_TAIL = re.compile(rb'"samphire_stream": ?"([^"\\]{1,80})"')
_AFTER_BODY = re.compile(rb'"?, ?"content-encoding":')
_EMBED = re.compile(r'\{"callbacks": ?')
_EMBED_QUOTED = re.compile(rb'\{\\"callbacks\\": ?')
_TEXTS = ("id", "task", "group", "root_id", "parent_id", "lang", "origin", "argsrepr", "kwargsrepr", "reply_to")
_NUMBERS = ("retries", "group_index", "replaced_task_nesting")


class WhoWaits(NamedTuple):
    """What is known of a refused message."""

    task_id: str = ""
    stream: str = ""
    canvas: dict[str, Any] | None = None
    """What Celery's tracer reads of a task, if it has next steps, or belongs to a group."""
    fields: Mapping[str, Any] = {}
    """Its headers, those of a known type."""


def checked_stream(stream: object) -> str:
    """A client's event stream, or "": the header names a key that the settlement writes to, and may name no other."""
    return stream if isinstance(stream, str) and _STREAM.fullmatch(stream) else ""


def who_waits(message: bytes, *, whole: bool, max_bytes: int) -> WhoWaits:
    """Look who waits for a message.

    Args:
        message: the message as it lies on the queue, or its last bytes.
        whole: whether it is all there.
        max_bytes: the largest body that is looked at once it is decompressed.
    """
    try:
        return _of_whole(message, max_bytes) if whole else _of_tail(message)
    except (ValueError, RecursionError):
        return _of_text(message)


def _of_text(message: bytes) -> WhoWaits:
    """Where nothing else is understood, what stands in it as text."""
    task_id, stream = _ID_IN_TAIL.search(message), _STREAM_IN_TAIL.search(message)
    return WhoWaits(
        task_id[1].decode(errors="replace") if task_id else "",
        checked_stream(stream[1].decode(errors="replace")) if stream else "",
    )


def _of_whole(message: bytes, max_bytes: int) -> WhoWaits:
    envelope = _mapping(_parsed(message))
    headers, properties = _mapping(envelope.get("headers")), _mapping(envelope.get("properties"))
    embed: Any = None
    body = envelope.get("body")
    if isinstance(body, str) and "json" in str(envelope.get("content-type", "application/json")):
        try:
            embed = _embed(body, properties.get("body_encoding"), headers.get("compression"), max_bytes)
        except (ValueError, RecursionError, InvalidInputError):
            embed = None
    if isinstance(embed, dict) and "task" in embed:  # protocol 1: what later became headers stands in the body
        headers = {**embed, **headers, "group": embed.get("taskset") or embed.get("group")}
    return _made(headers, properties, embed)


def _embed(body: str, encoding: object, compression: object, max_bytes: int) -> Any:
    data: bytes | str = binascii.a2b_base64(body) if encoding == "base64" else body
    if compression:
        data = decompressed(data if isinstance(data, bytes) else data.encode(), str(compression), max_bytes)
    decoded = _parsed(data)
    return decoded[2] if isinstance(decoded, list) and len(decoded) == 3 else decoded


def _of_tail(tail: bytes) -> WhoWaits:
    """Of a message whose beginning is not here: headers stand behind the body, and the canvas at the body's end."""
    found = _AFTER_BODY.search(tail)
    if found is None:
        return _of_text(tail)
    begin = tail.index(b'"content-encoding"', found.start())
    rest = _mapping(_parsed(b"{" + tail[begin:]))
    headers, properties = _mapping(rest.get("headers")), _mapping(rest.get("properties"))
    embed = None
    if not headers.get("compression") and "json" in str(rest.get("content-type", "")):
        embed = _embed_in_tail(tail[: found.start()], properties.get("body_encoding") == "base64")
    return _made(headers, properties, embed)


def _embed_in_tail(body: bytes, coded: bool) -> Any:
    """The last part of a body of which only the end is here."""
    if coded:
        text = binascii.a2b_base64(body[len(body) % 4 :]).decode(errors="replace")
    else:
        first = _EMBED_QUOTED.search(body)
        text = str(json.loads(b'"' + body[first.start() :] + b'"')) if first else ""
    for begin in _EMBED.finditer(text):  # the arguments may say the same, and do not end where the body does
        try:
            return _parsed(text[begin.start() :].rstrip().removesuffix("]"))
        except ValueError:
            continue
    return None


def _made(headers: Mapping[str, Any], properties: Mapping[str, Any], embed: Any) -> WhoWaits:
    ids = [name for name in (headers.get("id"), properties.get("correlation_id")) if _is_id(name)]
    task_id = str(ids[0]) if ids else ""
    fields = {name: headers[name] for name in _TEXTS if isinstance(headers.get(name), str)}
    fields |= {name: headers[name] for name in _NUMBERS if _is_number(headers.get(name))}
    if isinstance(headers.get("stamps"), dict) and isinstance(headers.get("stamped_headers"), list):
        fields |= {"stamps": headers["stamps"], "stamped_headers": headers["stamped_headers"]}
    stream = checked_stream(headers.get("samphire_stream"))
    try:
        canvas = msgspec.convert(embed, CanvasFields)
    except msgspec.ValidationError:
        # Whether the group is a chord's is not known; whoever counts its parts finds out.
        canvas = CanvasFields(chord=UNKNOWN_CHORD if _is_id(fields.get("group")) else None)
    if not canvas:
        return WhoWaits(task_id, stream, None, fields)
    return WhoWaits(task_id, stream, {**fields, "id": task_id, **msgspec.to_builtins(canvas)}, fields)


def _parsed(data: bytes | str) -> Any:
    """JSON whose texts can all be written again: half a surrogate pair, which has no UTF-8, becomes a question mark."""
    value = json.loads(data)
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(text.encode(errors="replace"))
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= ID_MAX_CHARACTERS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
