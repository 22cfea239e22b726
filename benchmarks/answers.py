"""Whether every answer is right and came once. Each measurement looks, in every run; what is wrong ends the benchmark.

The names of keys and fields are those of the wire, not of a version's code: versions are compared with it.
"""

from __future__ import annotations

import base64
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import msgspec
import numpy as np
import redis
from numpy.typing import NDArray

QUEUE = "inference.identity"
NORMAL = "\x06\x163"
"""What kombu appends to the name of a queue for the priority that is not given."""
META_PREFIX = "celery-task-meta-"
NAMESPACES = ("samphire:", "")
"""What own keys begin with, now and in the versions before there was a namespace."""
ENDED = ("succeeded", "failed", "cancelled", "expired")
PAGE = 1000
SHOWN = 3

FloatArray = NDArray[np.float32]


class WrongAnswerError(AssertionError):
    """An answer is missing, wrong, or came more than once."""


def rows(count: int, width: int = 16) -> list[FloatArray]:
    """FP32 [1, width], each with other numbers: an answer that belongs to another question is noticed."""
    base = np.random.default_rng(0).random((1, width), dtype=np.float32)
    return [base + np.float32(number) for number in range(count)]


def check_equal(what: str, asked: Sequence[FloatArray], answered: Sequence[FloatArray | None]) -> None:
    """Each answer is the number that was asked: `identity` returns what it is given.

    Raises:
        WrongAnswerError: some are not, or their count is another.
    """
    if len(asked) != len(answered):
        raise WrongAnswerError(f"{what}: {len(asked)} questions, {len(answered)} answers")
    wrong = [
        number
        for number, (question, answer) in enumerate(zip(asked, answered, strict=True))
        if answer is None or answer.tobytes() != question.tobytes()
    ]
    if wrong:
        raise WrongAnswerError(f"{what}: {len(wrong)} of {len(asked)} answers are wrong, the first: {wrong[:SHOWN]}")


def check_once(what: str, task_ids: Iterable[str]) -> None:
    """No task is answered twice.

    Raises:
        WrongAnswerError: one is.
    """
    twice = [task_id for task_id, count in Counter(task_ids).items() if count > 1]
    if twice:
        raise WrongAnswerError(f"{what}: {len(twice)} tasks were answered more than once: {twice[:SHOWN]}")


# -- what is queued, and what becomes of it -----------------------------------------------------------


def queued(server: redis.Redis, queue: str = QUEUE) -> list[bytes]:
    """The messages of a queue, oldest first."""
    found: list[bytes] = []
    length = int(server.llen(queue + NORMAL))
    for begin in range(0, length, PAGE):
        page: Any = server.lrange(queue + NORMAL, begin, begin + PAGE - 1)
        found += page
    return found[::-1]


def stream_of(message: bytes) -> str:
    """The event stream of the client that sent it."""
    stream: str = msgspec.json.decode(message)["headers"]["samphire_stream"]
    return stream


class Ends:
    """Counts the terminal events of a client's tasks as they come, while it runs as a context."""

    def __init__(self, server_url: str, stream: str) -> None:
        self._server = redis.Redis.from_url(server_url, socket_timeout=60)
        self._last: dict[Any, Any] = {namespace + stream: "0-0" for namespace in NAMESPACES}
        self._seen: list[dict[bytes, bytes]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """All that was there when the context ended is read."""
        self._done.set()
        self._thread.join()
        self._server.close()

    def _read(self) -> None:
        while True:
            was_done = self._done.is_set()
            found: Any = self._server.xread(self._last, count=PAGE, block=50)
            for stream, entries in found or ():
                self._seen += [fields for _, fields in entries]
                self._last[stream.decode()] = entries[-1][0]
            if was_done and not found:
                return

    def counted(self) -> Counter[str]:
        """How often each task has ended."""
        lists = (fields[state.encode()] for fields in self._seen for state in ENDED if state.encode() in fields)
        return Counter(task_id for ids in lists for task_id in ids.decode().split(" "))


def unsettled(server: redis.Redis, queue: str = QUEUE) -> int:
    """Tasks of a queue that are queued, and all that are in flight."""
    workers = [(namespace, name.decode()) for namespace in NAMESPACES for name in _members(server, namespace)]
    with server.pipeline(transaction=True) as at_once:  # what a worker claims between two looks would be in neither
        at_once.llen(queue + NORMAL)
        for namespace, name in workers:
            at_once.hlen(f"{namespace}worker:{name}:inflight")
        return sum(at_once.execute())


def _members(server: redis.Redis, namespace: str) -> Any:
    return server.smembers(f"{namespace}workers")


def check_backlog(server: redis.Redis, messages: Sequence[bytes], ends: Counter[str]) -> None:
    """Each queued task has succeeded with the answer to its own question, and has ended once.

    Raises:
        WrongAnswerError: some have not.
    """
    asked = dict(_question(message) for message in messages)
    if len(asked) != len(messages):
        raise WrongAnswerError(f"{len(messages)} messages have only {len(asked)} ids")
    check_ended(server, asked, ends, operator.eq)


def check_ended(
    server: redis.Redis, expected: Mapping[str, bytes], ends: Counter[str], same: Callable[[bytes, bytes], bool]
) -> None:
    """Each of these tasks has succeeded with the numbers that are expected of it, and has ended once.

    Raises:
        WrongAnswerError: some have not.
    """
    ids, wrong = list(expected), list[str]()
    for begin in range(0, len(ids), PAGE):
        page = ids[begin : begin + PAGE]
        metas: Any = server.mget([META_PREFIX + task_id for task_id in page])
        for task_id, meta in zip(page, metas, strict=True):
            answer = _answer(meta)
            if answer is None or not same(expected[task_id], answer):
                wrong.append(task_id)
    _complain("have no answer, or a wrong one", wrong, len(ids))
    _complain("have not ended exactly once", [task_id for task_id in ids if ends[task_id] != 1], len(ids))
    if letters := sum(server.zcard(f"{namespace}dead") for namespace in NAMESPACES):
        raise WrongAnswerError(f"{letters} dead letters")


def _complain(what: str, task_ids: Sequence[str], count: int) -> None:
    if task_ids:
        raise WrongAnswerError(f"{len(task_ids)} of {count} tasks {what}: {', '.join(task_ids[:SHOWN])}")


def _question(message: bytes) -> tuple[str, bytes]:
    whole = msgspec.json.decode(message)
    _, kwargs, _ = msgspec.json.decode(whole["body"])
    return whole["headers"]["id"], _values(kwargs["inputs"][0])


def _answer(meta: bytes | None) -> bytes | None:
    if meta is None:
        return None
    found = msgspec.json.decode(meta)
    return _values(found["result"]["outputs"][0]) if found["status"] == "SUCCESS" else None


def _values(tensor: dict[str, Any]) -> bytes:
    """The bytes of an FP32 tensor, however it is written."""
    if "raw" in tensor:
        return base64.b64decode(tensor["raw"])
    return np.array(tensor["data"], np.float32).tobytes()
