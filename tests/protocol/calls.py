"""Whether the checker calls the scripts as `Store` and `Publisher` do: one call of each form, made again by them."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from samphire.transport.address import broker_of
from samphire.transport.publisher import IdempotencyKey, Publisher
from samphire.wire.keys import DEFAULT_NAMESPACE, Keys
from samphire_broker.settings import Settings
from samphire_broker.store import (
    Delivery,
    Later,
    Letter,
    LogEntry,
    OtherEnd,
    Settlement,
    Store,
    Turn,
    Webhook,
    WorkerInfo,
)
from samphire_broker.store.calls import script_text as store_script_text

Form = tuple[str, list[str], list[bytes]]
"""A verb with its KEYS and ARGV."""

_EMPTY_REPLIES: dict[str, list[int]] = {"claim": [0], "cancel": [], "reap": [0, 0, 0]}


def script_text(verb: str) -> str:
    """The text of a script, as it is loaded."""
    if verb == "submit":
        return (resources.files("samphire.transport") / "submit.lua").read_text()
    return store_script_text(verb, Keys()).replace(
        "'samphire:', '', 'samphire:0:'", "'', '', ''", 1
    )  # the model's keys have bare names


def forms_of(dumps: Iterable[Path]) -> list[Form]:
    """Of each form of calls that the checker makes the longest."""
    longest: dict[tuple[str, int, int], str] = {}
    for line in (line for path in dumps for line in path.read_text().splitlines()):
        run = json.loads(line)
        form = (run["verb"], len(run["keys"]), len(run["args"]))
        if len(line) > len(longest.get(form, "")):
            longest[form] = line
    calls = [json.loads(line) for _, line in sorted(longest.items())]
    return [(call["verb"], call["keys"], [bytes.fromhex(arg) for arg in call["args"]]) for call in calls]


async def built_by_us(form: Form) -> Form:
    """The same call, as the real classes build it."""
    verb, keys, args = form
    if verb == "submit":
        return await _submitted(keys, args)
    caught: list[Form] = []

    async def catch(name: str, key_names: Sequence[str], given: Sequence[Any], _connection: Any = None) -> Any:
        caught.append((name, list(key_names), [arg if isinstance(arg, bytes) else str(arg).encode() for arg in given]))
        return _EMPTY_REPLIES.get(name, [] if name in ("append", "start", "settle", "schedule") else 0)

    store = Store(Settings(), _worker_of(form))
    store._run = catch  # type: ignore[method-assign]
    await _CALLS[verb](store, keys, args)
    return caught[0]


def _worker_of(form: Form) -> str:
    verb, keys, args = form
    if verb == "reap":
        return "Z0"  # not the one that is reaped
    named = next((found[1] for key in keys if (found := re.match(r"worker:(\w+)", key))), "A0")
    return args[0].decode() if verb == "alone" else named


async def _submitted(keys: list[str], args: list[bytes]) -> Form:
    publisher = Publisher(broker_of("redis://localhost"), queue_limit=0, blob_ttl_s=86400)
    caught: list[Form] = []

    async def catch(key_names: Sequence[str], given: Sequence[Any]) -> Any:
        caught.append(("submit", list(key_names), [a if isinstance(a, bytes) else str(a).encode() for a in given]))
        return [b"ok", 1]

    publisher._call = catch  # type: ignore[method-assign]
    publisher._memory_checked = 1e18
    key = None
    if len(keys) == 8:
        key = IdempotencyKey(keys[7].removeprefix("sub:key:"), args[7].decode(), args[8].decode(), int(args[6]))
    await publisher.publish(args[0].decode(), 0, [args[-1]], [], key)
    return caught[0]


def _texts(args: Iterable[bytes]) -> list[str]:
    return [arg.decode() for arg in args]


def _settlements(packed: bytes) -> list[Settlement]:
    found = []
    for task in msgspec.msgpack.decode(packed):
        blobs, pushes, others, letter, retry, streamed, webhooks, delivery = task[5] if len(task) > 5 else ((),) * 8
        found.append(
            Settlement(
                *task[:5],
                blobs=tuple(blobs),
                pushes=tuple((name, message) for name, message in pushes),
                others=tuple(OtherEnd(*other[:4], tuple(other[4])) for other in others),
                letter=Letter(*letter) if letter else (),
                retry=Later(*retry) if retry else (),
                streamed=tuple(streamed),
                webhooks=tuple(Webhook(*entry) for entry in webhooks),
                delivery=Delivery(*delivery) if delivery else (),
            )
        )
    return found


async def _beat(store: Store, _keys: list[str], _args: list[bytes]) -> None:
    await store.beat(WorkerInfo(store.worker_id, "h", 1), None)  # type: ignore[arg-type]


async def _claim(store: Store, keys: list[str], args: list[bytes]) -> None:
    lists = keys[4:]
    store._next_number = int(args[3])
    rooms = [1] * (len(args) - 4 - 2 * len(lists))
    await store.claim([Turn(name, 1, n) for n, name in enumerate(lists)], rooms, 1, 1_000_000)


async def _start(store: Store, _keys: list[str], args: list[bytes]) -> None:
    tasks = [(field, task_id) for field, task_id in msgspec.msgpack.decode(args[7])]
    await store.start(tasks, WorkerInfo(store.worker_id, "h", 1))


async def _release(store: Store, _keys: list[str], args: list[bytes]) -> None:
    await store.release(_texts(args[6:]), attempt=args[3].decode(), endpoint_died=args[4] == b"1")


async def _cancel(store: Store, _keys: list[str], args: list[bytes]) -> None:
    again = int(args[15])
    await store.cancel(args[6].decode(), _texts(args[16 + again :]), _texts(args[16 : 16 + again]))


async def _reap(store: Store, keys: list[str], args: list[bytes]) -> None:
    await store.reap(args[0].decode(), int(args[1]) if args[1] else None, args[5].decode())


async def _append(store: Store, _keys: list[str], args: list[bytes]) -> None:
    field, task_id, started_at, first, count, event, at, outputs, nbytes, data = args[3:]
    numbers = float(started_at), int(first), int(count)
    entry = (field.decode(), task_id.decode(), *numbers, event.decode(), float(at), int(outputs), int(nbytes), data)
    await store.append([LogEntry(*entry)])


_CALLS: dict[str, Callable[[Store, list[str], list[bytes]], Awaitable[object]]] = {
    "alone": lambda store, _keys, args: store.alone(args[1].decode(), int(args[2]) / 1000, int(args[4])),
    "append": _append,
    "beat": _beat,
    "cancel": _cancel,
    "claim": _claim,
    "follow": lambda store, _keys, _args: store.serve_follows(),
    "due": lambda store, _keys, _args: store.return_due(),
    "leave": lambda store, _keys, _args: store.leave(),
    "letters": lambda store, _keys, _args: store.serve_letters(),
    "reap": _reap,
    "release": _release,
    "route": lambda store, _keys, args: store.route([(args[1].decode(), args[2].decode(), args[3].decode())]),
    "schedule": lambda store, _keys, args: store.schedule([(args[1].decode(), args[2].decode(), float(args[3]))]),
    "settle": lambda store, _keys, args: store.settle(_settlements(args[11])),
    "start": _start,
}


def comparable(form: Form) -> Form:
    """A call without what the checker makes simpler: no namespace, one worker, no results in events, short numbers."""
    verb, keys, args = form
    keys = [re.sub(r"sub:once:.*", "sub:once:*", key.removeprefix(DEFAULT_NAMESPACE)) for key in keys]
    plain: list[Any] = [arg.removeprefix(DEFAULT_NAMESPACE.encode()) for arg in args]
    if verb == "settle":
        plain[4], plain[7], plain[11] = "inline", "worker", msgspec.msgpack.decode(args[11])
    elif verb == "start":
        plain[7] = msgspec.msgpack.decode(args[7])
    elif verb == "beat":
        plain[2] = "info"
    elif verb == "schedule":
        plain[3] = float(args[3])
    return verb, keys, plain
