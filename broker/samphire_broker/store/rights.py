"""What a worker's user has to be allowed on the broker: found out at start and by name, not in the middle of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from samphire.wire.keys import (
    BLOB_PREFIX,
    INTAKE,
    RESULT_BLOB_PREFIX,
    STREAM_PREFIX,
    WEBHOOKS,
    Keys,
    delivery_queue,
)
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


def rights(keys: Keys) -> Sequence[Right]:
    """What `Store` and its scripts run. Chords need what Celery's own backend runs beside that."""
    meta, task, dead = keys.meta_prefix + "id", keys.task_prefix + "id", keys.dead_prefix + "id"
    worker, intake = keys.worker_prefix + "id", keys.of_celery(INTAKE)
    return (
        *_all("queues", f"LRANGE {intake} 0 0", f"LTRIM {intake} 0 0", f"RPUSH {intake} x"),
        *_all("queues", f"LPUSH {intake}.m x", f"BLMOVE {intake} {intake} RIGHT RIGHT 1"),
        *_all(
            "queues",
            f"SMEMBERS {keys.queues}",
            f"SADD {keys.queues} x",
            "SCAN 0",
            "TIME",
            f"SUBSCRIBE {keys.wake_channel}",
        ),
        *_all("telling metrics how much lies in queues", f"LLEN {intake}", vital=False),
        *_all("forgetting queues that nobody uses", f"SREM {keys.queues} x", vital=False),
        *_all("taking part in the deployment", f"SET {keys.schema} x", f"GET {keys.schema}"),
        *_all("telling other deployments whose the queues are", f"SET {keys.namespace_mark} x", vital=False),
        *_all("the worker's lease", f"INCR {worker}", f"PEXPIRE {worker} 1", f"SET {worker}:info x", f"DEL {worker}"),
        *_all("the worker's lease", f"SADD {keys.workers} x", f"SREM {keys.workers} x", f"SMEMBERS {keys.workers}"),
        *_all("claims", f"HSET {worker}:inflight x x", f"HDEL {worker}:inflight x", f"HKEYS {worker}:inflight"),
        *_all("claims", f"HSET {worker}:started x x", f"HDEL {worker}:started x", f"HVALS {worker}:started"),
        *_all("results", f"MGET {meta}", f"MSET {meta} x", f"SETEX {meta} 1 x", f"SET {meta} x", f"DEL {meta}"),
        *_all(
            "results",
            f"PUBLISH {meta} x",
            f"SET {keys.own(RESULT_BLOB_PREFIX)}x x",
            f"GETRANGE {keys.own(BLOB_PREFIX)}x 0 1",
        ),
        *_all("results", f"UNLINK {keys.own(BLOB_PREFIX)}x", f"UNLINK {keys.own(RESULT_BLOB_PREFIX)}x"),
        *_all("events", f"XADD {keys.own(STREAM_PREFIX)}c * x x", f"EXPIRE {keys.own(STREAM_PREFIX)}c 1"),
        *_all("events", f"PUBLISH {keys.wake_channel} x"),
        *_all("event logs", f"XADD {keys.log_prefix}x * x x", f"EXPIRE {keys.log_prefix}x 1", f"HSET {keys.logs} x x"),
        *_all("event logs", f"HGET {keys.logs} x", f"HDEL {keys.logs} x", f"XREVRANGE {keys.log_prefix}x + -"),
        *_all("event logs", f"XTRIM {keys.log_prefix}x MAXLEN 1", f"XRANGE {keys.log_prefix}x - +"),
        *_all(
            "event logs", f"GET {keys.epoch}", f"SET {keys.epoch} x", f"DEL {keys.epoch}", f"LTRIM {keys.follows} 0 0"
        ),
        *_all("event logs", f"PUBLISH {keys.channel_prefix}log:x x"),
        *_all("attempts", f"HSET {task} x x", f"HINCRBY {task} x 1", f"HMGET {task} x", f"UNLINK {task}"),
        *_all("attempts", f"SADD {keys.tried} x", f"SREM {keys.tried} x", f"SMISMEMBER {keys.tried} x"),
        *_all("sequences", f"HGET {keys.leaders} x", f"HSET {keys.leaders} x x", f"HDEL {keys.leaders} x"),
        *_all("attempts", f"SET {keys.alone} x", f"DEL {keys.alone}", f"GET {keys.alone}"),
        *_all("the schedule", f"ZADD {keys.scheduled} 0 x", f"ZREM {keys.scheduled} x", f"ZRANGE {keys.scheduled} 0 0"),
        *_all("the schedule", f"HSET {keys.scheduled_messages} x x", f"HDEL {keys.scheduled_messages} x"),
        *_all("cancellations", f"LRANGE {keys.cancels} 0 0", f"LTRIM {keys.cancels} 0 0", f"ZADD {keys.cancelled} 0 x"),
        *_all(
            "cancellations",
            f"ZREM {keys.cancelled} x",
            f"ZSCORE {keys.cancelled} x",
            f"SETEX {keys.answer_prefix}x 1 x",
        ),
        *_all("cancellations", f"SET {keys.cancelled_lately} x", f"SADD {keys.cancelled_running} x"),
        *_all(
            "the memory of what has ended", f"HSET {keys.ended} x x", f"HMGET {keys.ended} x", f"HDEL {keys.ended} x"
        ),
        *_all("the memory of what has ended", f"RENAME {keys.ended} {keys.ended_before}", f"SET {keys.ended_turn} x"),
        *_all("dead letters", f"HSET {dead} x x", f"HGET {dead} x", f"DEL {dead}", f"EXPIRE {dead} 1"),
        *_all("dead letters", f"ZADD {keys.dead} 0 x", f"ZREM {keys.dead} x", f"ZREMRANGEBYSCORE {keys.dead} 0 0"),
        *_all("dead letters", f"LRANGE {keys.letters} 0 0", f"LTRIM {keys.letters} 0 0", f"LTRIM {keys.deletes} 0 0"),
        *_all("webhooks", f"HGETALL {keys.webhook_config}", f"HGET {keys.webhook_config} x"),
        *_all("webhooks", f"HSET {keys.webhook_config} x x", f"HDEL {keys.webhook_config} x"),
        *_all("webhooks", f"HSET {keys.webhook_names} x x", f"HDEL {keys.webhook_names} x"),
        *_all("webhooks", f"HGET {keys.webhook_health} x", f"HSET {keys.webhook_health} x x"),
        *_all("webhooks", f"HDEL {keys.webhook_health} x", f"HINCRBY {keys.webhook_marks} x 1"),
        *_all("webhooks", f"HGET {keys.webhook_warned} x", f"HSET {keys.webhook_warned} x 1"),
        *_all("webhooks", f"HDEL {keys.webhook_warned} x", f"XADD {keys.operator_events} * x x"),
        *_all("webhooks", *(f"{command} x" for command in _of_deliveries(keys))),
        *_all("webhooks", f"LPUSH {keys.of_celery(delivery_queue('x'))} x", f"LPUSH {keys.of_celery(WEBHOOKS)} x"),
        *_all("the catalogue", f"HKEYS {keys.catalogue}", f"HGET {keys.catalogue} x"),
        *_all("the catalogue", f"HSET {keys.catalogue} x x", f"HDEL {keys.catalogue} x", f"EXPIRE {keys.catalogue} 1"),
        *_all(
            "finding lost workers within seconds, and not only once their lease has lapsed", "CLIENT LIST", vital=False
        ),
        *_all(
            "telling a broker that has just started: nobody is taken for lost then, and positions get a new epoch",
            "INFO",
            vital=False,
        ),
    )


def _of_deliveries(keys: Keys) -> Sequence[str]:
    """What is run on the keys of deliveries, with one argument more."""
    waiting, ended = keys.waiting_deliveries("x"), keys.ended_deliveries("x")
    record, order = keys.delivery("x"), keys.order_of_deliveries("x", "x")
    return (
        *(f"ZADD {waiting} 0", f"ZREM {waiting}", f"ZSCORE {waiting}", f"EXPIRE {waiting}"),
        *(f"ZADD {ended} 0", f"ZSCORE {ended}", f"ZPOPMIN {ended}"),
        *(f"HSET {record} x", f"HGET {record}", f"EXPIRE {record}"),
        *(f"RPUSH {order}", f"LINDEX {order}", f"EXPIRE {order}"),
        *(f"SADD {keys.tried_deliveries}", f"SREM {keys.tried_deliveries}", f"SMISMEMBER {keys.tried_deliveries}"),
    )


def missing_rights(client: redis.Redis, keys: Keys) -> list[Right]:
    """What the user of a connection lacks; nothing where the server is too old to be asked.

    Raises:
        redis.RedisError: the server is away, or this user may not run scripts at all.
    """
    needed = rights(keys)
    reply: Any = client.eval(script_text("rights", keys), 0, _packed(needed))
    return [needed[number - 1] for number in reply]


class Rights(Calls):
    """The same for a worker."""

    async def missing_rights(self) -> list[Right]:
        """What the worker's user lacks on the broker."""
        needed = rights(self.keys)
        return [needed[number - 1] for number in await self._run("rights", [], [_packed(needed)])]


def _packed(needed: Sequence[Right]) -> bytes:
    return _pack([right.command for right in needed])
