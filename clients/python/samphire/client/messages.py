"""What is seen of a message as it lies in a queue, without decoding all of it: whose it is, when it was submitted."""

from __future__ import annotations

import binascii
import re

import msgspec

_SENT_AT = re.compile(rb'"samphire_sent_at": ?([0-9]{1,12}(?:\.[0-9]{1,9})?)[,}]')
_ID = re.compile(rb'"id": ?("(?:[^"\\]|\\.)*")')
_HEADERS = re.compile(rb'(?<!\\)"headers": ?\{')
_CODED_BODY = re.compile(rb'^\{"body": ?"([A-Za-z0-9+/=]+)"')
"""As Celery itself writes it."""
_COMPRESSED = re.compile(rb'"compression": ?"')


def message_id(message: bytes) -> str:
    """The task's id in a message; "" where there is none."""
    found = _ID.search(message)
    if found is None:
        return ""
    try:
        return msgspec.json.decode(found[1], type=str)
    except msgspec.MsgspecError:
        return ""


def sent_at_of(message: bytes) -> float | None:
    """When it was submitted, in s since 1970; None where it does not tell, as those of plain Celery producers."""
    found = _SENT_AT.search(message)
    return None if found is None else float(found[1])


def mentions(message: bytes, task_id: str) -> bool | None:
    """Whether a message names a task among those that are to follow it; None where that cannot be seen."""
    headers = _HEADERS.search(message)
    body = message if headers is None else message[: headers.start()]  # they name those that came before it
    if _names(body, task_id):
        return True
    coded = _CODED_BODY.search(body)
    if coded is None:
        return False
    if _COMPRESSED.search(message):
        return None
    try:
        return _names(binascii.a2b_base64(coded[1]), task_id)
    except binascii.Error:
        return None


def _names(text: bytes, task_id: str) -> bool:
    quoted = msgspec.json.encode(task_id)
    escaped = msgspec.json.encode(quoted.decode())[1:-1]  # within the text of a body
    return quoted in text or escaped in text
