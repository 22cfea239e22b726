"""Whether the checker's broker does what a real one does, and is called as the real classes call it.

Script runs of the checker (keyspace before, call, keyspace after, reply) are made again on a real Valkey and compared.
The only change is that TIME is the checker's constant, in the script's text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis

from tests.protocol.calls import script_text
from tests.stacks import Valkey

_CONSTANT_TIME = "({'1000','0'})"
SHOWN_MAX = 5


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")  # the checker writes bytes as code points


def _text(raw: bytes) -> str:
    return raw.decode("latin-1")


def _script(verb: str) -> str:
    return script_text(verb).replace("redis.call('TIME')", _CONSTANT_TIME).replace("call('TIME')", _CONSTANT_TIME)


def _build(client: redis.Redis, keyspace: dict[str, Any]) -> None:
    pipe = client.pipeline(transaction=False)
    pipe.flushdb()
    for name, kept in keyspace.items():
        key, value = _bytes(name), kept["v"]
        match kept["t"]:
            case "s":
                pipe.set(key, _bytes(value))
            case "l":
                pipe.rpush(key, *map(_bytes, value))
            case "h":
                pipe.hset(key, mapping={_bytes(field): _bytes(item) for field, item in value.items()})
            case "e":
                pipe.sadd(key, *map(_bytes, value))
            case "z":
                pipe.zadd(key, {_bytes(member): score for member, score in value.items()})
            case "x":
                for entry in value:  # one of a log begins with its id
                    first = [] if name.startswith("log:") else ["*"]
                    pipe.execute_command("XADD", key, *first, *map(_bytes, entry))
    pipe.execute()


def _read(client: redis.Redis) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in client.keys("*"):
        name = _text(key)
        match client.type(key):
            case b"string":
                found[name] = ("s", _text(client.get(key)))
            case b"list":
                found[name] = ("l", [_text(item) for item in client.lrange(key, 0, -1)])
            case b"hash":
                found[name] = ("h", {_text(field): _text(item) for field, item in client.hgetall(key).items()})
            case b"set":
                found[name] = ("e", sorted(_text(item) for item in client.smembers(key)))
            case b"zset":
                members = client.zrange(key, 0, -1, withscores=True)
                found[name] = ("z", {_text(member): round(score, 3) for member, score in members})
            case _:
                entries = [
                    [*([_text(entry_id)] if name.startswith("log:") else []), *_pairs(fields)]
                    for entry_id, fields in client.xrange(key)
                ]
                found[name] = ("x", sorted(entries))
    return {name: _comparable(name, *value) for name, value in found.items()}


def _pairs(fields: dict[bytes, bytes]) -> list[str]:
    return [_text(part) for pair in fields.items() for part in pair]


def _comparable(name: str, kind: str, value: Any) -> Any:
    if kind == "h":
        return kind, {field: item for field, item in value.items() if field != "died_at"}  # a form of a number
    return kind, value


def _expected(keyspace: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, kept in keyspace.items():
        value = kept["v"]
        if kept["t"] in ("e", "x"):  # of a set, and of events that `pairs` has brought about, the order says nothing
            value = sorted(value)
        if kept["t"] == "z":
            value = {member: round(float(score), 3) for member, score in value.items()}
        found[name] = _comparable(name, kept["t"], value)
    return found


def _plain(reply: Any) -> Any:
    if isinstance(reply, bytes):
        return _text(reply)
    return [_plain(item) for item in reply] if isinstance(reply, list) else reply


def _same_reply(verb: str, reply: Any, expected: Any) -> bool:
    if verb == "cancel":  # in the order of HVALS, which is nobody's
        return sorted(zip(reply[::2], reply[1::2], strict=True)) == sorted(
            zip(expected[::2], expected[1::2], strict=True)
        )
    both_errors = isinstance(reply, dict) and isinstance(expected, dict)
    return both_errors or bool(reply == expected)


def compare(dumps: Iterable[Path], valkey: Valkey) -> tuple[Counter[str], list[str]]:
    """Make script runs of the checker again on a real server: how many of each verb, and what differs."""
    done: Counter[str] = Counter()
    different: list[str] = []
    seen: set[str] = set()
    shas: dict[str, str] = {}
    for line in (line for path in dumps for line in path.read_text().splitlines()):
        if line in seen:
            continue
        seen.add(line)
        run = json.loads(line)
        verb, keys, args = run["verb"], [_bytes(key) for key in run["keys"]], [bytes.fromhex(a) for a in run["args"]]
        if verb not in shas:
            shas[verb] = str(_plain(valkey.client.script_load(_script(verb))))
        _build(valkey.client, run["before"])
        try:
            reply = _plain(valkey.client.evalsha(shas[verb], len(keys), *keys, *args))
        except redis.ResponseError as error:
            reply = {"err": str(error)}
        after, expected = _read(valkey.client), _expected(run["after"])
        done[verb] += 1
        if not _same_reply(verb, reply, run["reply"]) or after != expected:
            different.append(_difference(verb, reply, run["reply"], after, expected))
    return done, different


def _difference(verb: str, reply: Any, expected_reply: Any, after: dict[str, Any], expected: dict[str, Any]) -> str:
    lines = [f"{verb}: replied {reply}, the checker {expected_reply}"]
    for name in sorted(after.keys() | expected.keys()):
        if after.get(name) != expected.get(name):
            lines.append(f"    {name!r}: {after.get(name)}, the checker {expected.get(name)}")
    return "\n".join(lines)
