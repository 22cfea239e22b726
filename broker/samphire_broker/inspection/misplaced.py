"""What producers have left in the wrong place: lists that look like queues and that no worker reads, and own keys of
other types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import redis

from samphire.transport.connection import key_text
from samphire.wire.keys import INTAKE, PRIORITY_STEPS, Keys, known_form, mark_of, split_list

SCAN_PAGE = 1000
SHOWN_MAX = 20
_LIKE_A_QUEUE = re.compile(rf"{INTAKE}(\.[A-Za-z0-9_.+@-]+)?(?![A-Za-z0-9_.+@-])")
_SEPARATOR = "\x06\x16"
_RETURNED = ":returned"
_KINDS = {
    "cancels": ("list", "cancelling"),
    "deletes": ("list", "the deletion of results"),
    "letters": ("list", "the redriving and purging of dead letters"),
    "queues": ("set", "submitting with the SDK"),
    "workers": ("set", "every worker"),
    "scheduled": ("zset", "what waits for its time"),
    "scheduled_messages": ("hash", "what waits for its time"),
    "dead": ("zset", "the settlement of failures"),
    "webhook_config": ("hash", "the delivery of webhooks"),
    "webhook_names": ("hash", "submitting with a webhook"),
    "webhook_health": ("hash", "the delivery of webhooks that have failed"),
}
"""Types of the keys that others may write, or that all depends on, and what depends on each."""


class Misplaced(NamedTuple):
    """What lies where it is in the way, or where nobody finds it; the fields of a finding of the doctor."""

    name: str
    state: Literal["warning", "error"]
    found: str
    remedy: str


def misplaced(client: redis.Redis, keys: Keys) -> Iterator[Misplaced]:
    """Own keys of other types, and lists that nobody reads."""
    yield from _of_other_types(client, keys)
    yield from _unread_lists(client, keys)


def _of_other_types(client: redis.Redis, keys: Keys) -> Iterator[Misplaced]:
    for attribute, (kind, what) in _KINDS.items():
        name = getattr(keys, attribute)
        found = key_text(client.type(name))
        if found not in ("none", kind):
            told = f"the key {name!r} is a {found}, and a {kind} is expected: {what} stands still"
            yield Misplaced("own key", "error", told, "find out who has written it, and delete it")


def _unread_lists(client: redis.Redis, keys: Keys) -> Iterator[Misplaced]:
    """At most `SHOWN_MAX`, with the setting of the producer that has led to each.

    Those of other deployments on the same database are left out, as long as they have workers.
    """
    found = 0
    served = {keys.celery_prefix: False}
    for raw in client.scan_iter(f"*{INTAKE}*", count=SCAN_PAGE, _type="list"):
        name = key_text(raw)
        prefix = name.partition(INTAKE)[0]
        if prefix not in served:
            served[prefix] = bool(client.exists(mark_of(prefix)))
        why = None if served[prefix] else _why_unread(name, keys)
        if why is None:
            continue
        found += 1
        if found > SHOWN_MAX:
            return
        length: Any = client.llen(raw)
        where = f"the list {name!r}, which no worker of this deployment reads"
        yield Misplaced("unread list", "warning", f"{length} messages lie in {where}: {why[0]}", why[1])


def _why_unread(name: str, keys: Keys) -> tuple[str, str] | None:
    place = _LIKE_A_QUEUE.search(name)
    if place is None or name.startswith(keys.namespace):
        return None
    prefix, queue, rest = name[: place.start()], place[0], name[place.end() :]
    if known_form(queue) is None:
        return None
    if prefix != keys.celery_prefix:
        remedy = "set SAMPHIRE_CELERY_KEY_PREFIX for workers and clients to the producers', or theirs to the workers'"
        why = f"its producer has global_keyprefix {prefix!r}, the workers have {keys.celery_prefix!r}"
        return f"{why}, or it is another application's", remedy
    if rest.endswith(_RETURNED):
        home = name.removesuffix(_RETURNED)
        return "a key of another type lay at its queue's name when messages went back", f"RPOPLPUSH them to {home!r}"
    if not rest:
        return None
    if not rest.startswith(_SEPARATOR):
        return "its producer has another sep in broker_transport_options", "leave out sep"
    try:
        if split_list(name)[1] in PRIORITY_STEPS:
            return None
    except ValueError:
        pass
    return "its producer has other priority_steps in broker_transport_options", "leave out priority_steps (0, 3, 6, 9)"
