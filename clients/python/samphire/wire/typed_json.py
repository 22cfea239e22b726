"""kombu's typed JSON, made plain: what a Celery application sends that JSON has no values for.

kombu writes bytes, Decimal, UUID and times as `{"__type__": name, "__value__": value}`, and a stock worker gets the
Python objects back. Source: kombu/utils/json.py.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from samphire.errors import InvalidInputError

_MARK = "__type__"
_FORM = {_MARK, "__value__"}
_AS_TEXT = ("bytes", "datetime", "date", "time")
_parts = msgspec.json.Decoder(list[msgspec.Raw]).decode


def plain_arguments(body: bytes | str) -> bytes | str:
    """A message's body whose arguments have JSON's own values: text for bytes, UUIDs and times, numbers for Decimals.

    What follows the arguments, the canvas, stays as it is: it is sent on.

    Raises:
        InvalidInputError: bytes that are no text, or a type that is not known.
    """
    if not (_MARK in body if isinstance(body, str) else _MARK.encode() in body):
        return body
    try:
        parts: list[Any] = _parts(body)
        parts[:2] = [json.loads(bytes(part), object_hook=_plain) for part in parts[:2]]
        encoded: bytes = msgspec.json.encode(parts)
        return encoded
    except InvalidInputError:
        raise
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return body  # it is said elsewhere what is wrong with it


def _plain(value: dict[str, Any]) -> Any:
    if value.keys() != _FORM:
        return value
    kind, inner = value[_MARK], value["__value__"]
    if kind in _AS_TEXT and isinstance(inner, str):
        return inner
    if kind == "decimal" and isinstance(inner, str):
        return float(inner)
    if kind == "uuid" and isinstance(inner, dict) and isinstance(inner.get("hex"), str):
        return inner["hex"]
    if kind == "base64":
        raise InvalidInputError(
            "the arguments hold bytes that are no UTF-8: send a tensor's bytes in `raw`, encoded with base64 as text "
            "(base64.b64encode(data).decode())"
        )
    raise InvalidInputError(f"the arguments hold a value of the type {str(kind)[:100]!r}, which is not understood")
