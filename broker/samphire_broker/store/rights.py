"""What a worker's user has to be allowed on the broker: found out at start and by name, not in the middle of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from samphire import keys
from samphire.direct import Script
from samphire_broker.store.calls import Calls, script_text

_pack = msgspec.msgpack.Encoder().encode


class Right(NamedTuple):
    """A command with arguments that stand for all that it is run with."""

    command: tuple[str, ...]
    needed_for: str
    vital: bool = True

    def granted(self) -> str:
        """How ACL SETUSER names it, with its key or channel."""
        name, *rest = self.command
        if name == "CLIENT":
            return f"{name.lower()}|{rest[0].lower()}"
        pattern = f" ~{rest[0]}" if rest and name not in ("SCAN", "PUBLISH", "SUBSCRIBE") else ""
        channel = f" &{rest[0]}" if name in ("PUBLISH", "SUBSCRIBE") else ""
        return f"{name.lower()}{pattern}{channel}"

    def __str__(self) -> str:
        return f"{' '.join(part for part in self.command if part)} ({self.needed_for})"


def _all(needed_for: str, *commands: str, vital: bool = True) -> list[Right]:
    return [Right(tuple(command.split(" ")), needed_for, vital) for command in commands]


_META, _TASK, _DEAD = keys.META_PREFIX + "id", keys.TASK_PREFIX + "id", keys.DEAD_PREFIX + "id"
_WORKER = keys.WORKER_PREFIX + "id"

RIGHTS: Sequence[Right] = (
    *_all("queues", f"LRANGE {keys.INTAKE} 0 0", f"LTRIM {keys.INTAKE} 0 0", f"RPUSH {keys.INTAKE} x"),
    *_all("queues", f"LPUSH {keys.INTAKE}.m x", f"BLMOVE {keys.INTAKE} {keys.INTAKE} RIGHT RIGHT 1"),
    *_all(
        "queues", f"SMEMBERS {keys.QUEUES}", f"SADD {keys.QUEUES} x", "SCAN 0", "TIME", f"SUBSCRIBE {keys.WAKE_CHANNEL}"
    ),
    *_all("the worker's lease", f"INCR {_WORKER}", f"PEXPIRE {_WORKER} 1", f"SET {_WORKER}:info x", f"DEL {_WORKER}"),
    *_all("the worker's lease", f"SADD {keys.WORKERS} x", f"SREM {keys.WORKERS} x", f"SMEMBERS {keys.WORKERS}"),
    *_all("claims", f"HSET {_WORKER}:inflight x x", f"HDEL {_WORKER}:inflight x", f"HKEYS {_WORKER}:inflight"),
    *_all("claims", f"HSET {_WORKER}:started x x", f"HDEL {_WORKER}:started x", f"HVALS {_WORKER}:started"),
    *_all("results", f"MGET {_META}", f"MSET {_META} x", f"SETEX {_META} 1 x", f"SET {_META} x", f"DEL {_META}"),
    *_all("results", f"PUBLISH {_META} x", f"SET {keys.RESULT_BLOB_PREFIX}x x", f"GETRANGE {keys.BLOB_PREFIX}x 0 1"),
    *_all("results", f"UNLINK {keys.BLOB_PREFIX}x", f"UNLINK {keys.RESULT_BLOB_PREFIX}x"),
    *_all("events", f"XADD {keys.STREAM_PREFIX}c * x x", f"EXPIRE {keys.STREAM_PREFIX}c 1"),
    *_all("events", f"PUBLISH {keys.WAKE_CHANNEL} x"),
    *_all("attempts", f"HSET {_TASK} x x", f"HINCRBY {_TASK} x 1", f"HMGET {_TASK} x", f"UNLINK {_TASK}"),
    *_all("attempts", f"SADD {keys.TRIED} x", f"SREM {keys.TRIED} x", f"SMISMEMBER {keys.TRIED} x"),
    *_all("sequences", f"HGET {keys.LEADERS} x", f"HSET {keys.LEADERS} x x", f"HDEL {keys.LEADERS} x"),
    *_all("attempts", f"SET {keys.ALONE} x", f"DEL {keys.ALONE}", f"GET {keys.ALONE}"),
    *_all("the schedule", f"ZADD {keys.SCHEDULED} 0 x", f"ZREM {keys.SCHEDULED} x", f"ZRANGE {keys.SCHEDULED} 0 0"),
    *_all("the schedule", f"HSET {keys.SCHEDULED_MESSAGES} x x", f"HDEL {keys.SCHEDULED_MESSAGES} x"),
    *_all("cancellations", f"LRANGE {keys.CANCELS} 0 0", f"LTRIM {keys.CANCELS} 0 0", f"ZADD {keys.CANCELLED} 0 x"),
    *_all(
        "cancellations", f"ZREM {keys.CANCELLED} x", f"ZSCORE {keys.CANCELLED} x", f"SETEX {keys.ANSWER_PREFIX}x 1 x"
    ),
    *_all("cancellations", f"SET {keys.CANCELLED_LATELY} x", f"SADD {keys.CANCELLED_RUNNING} x"),
    *_all("the memory of what has ended", f"HSET {keys.ENDED} x x", f"HMGET {keys.ENDED} x", f"HDEL {keys.ENDED} x"),
    *_all("the memory of what has ended", f"RENAME {keys.ENDED} {keys.ENDED_BEFORE}", f"SET {keys.ENDED_TURN} x"),
    *_all("dead letters", f"HSET {_DEAD} x x", f"HGET {_DEAD} x", f"DEL {_DEAD}", f"EXPIRE {_DEAD} 1"),
    *_all("dead letters", f"ZADD {keys.DEAD} 0 x", f"ZREM {keys.DEAD} x", f"ZREMRANGEBYSCORE {keys.DEAD} 0 0"),
    *_all("dead letters", f"LRANGE {keys.LETTERS} 0 0", f"LTRIM {keys.LETTERS} 0 0", f"LTRIM {keys.DELETES} 0 0"),
    *_all("the catalogue", f"HSET {keys.CATALOGUE} x x", f"HDEL {keys.CATALOGUE} x", f"EXPIRE {keys.CATALOGUE} 1"),
    *_all("finding lost workers within seconds, and not only once their lease has lapsed", "CLIENT LIST", vital=False),
    *_all(
        "telling a broker that has just started, within whose first seconds nobody is taken for lost",
        "INFO",
        vital=False,
    ),
)
"""What `Store` and its scripts run. Chords need what Celery's own backend runs beside that."""


def missing_among(numbers: Sequence[int]) -> list[Right]:
    """The rights that `rights.lua` has named, by number from 1."""
    return [RIGHTS[number - 1] for number in numbers]


def packed_rights() -> bytes:
    """All of them, as `rights.lua` takes them."""
    return _pack([right.command for right in RIGHTS])


def missing_rights(client: redis.Redis) -> list[Right]:
    """What the user of a connection lacks; nothing where the server is too old to be asked.

    Raises:
        redis.RedisError: the server is away, or this user may not run scripts at all.
    """
    reply: Any = client.eval(Script(script_text("rights")).text, 0, packed_rights())
    return missing_among(reply)


class Rights(Calls):
    """The same for a worker."""

    async def missing_rights(self) -> list[Right]:
        """What the worker's user lacks on the broker."""
        return missing_among(await self._run("rights", [], [packed_rights()]))
