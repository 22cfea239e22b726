"""Where a task's message lies in the queues, and what is before it.

No list is read whole that is long: an id tells when it was made, and messages lie in the order in which they were
submitted, so a place is found by interpolation (W. W. Peterson, "Addressing for Random-Access Storage", 1957), and by
bisection where that takes too long. The broker walks to each place that it is asked for, so few are. Nor is more read
than `READ_BYTES`, so a look costs the same whatever is queued.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from samphire.client.messages import mentions, message_id, sent_at_of
from samphire.errors import BrokerRightError, ProtocolError
from samphire.transport.direct import Argument, DirectConnection
from samphire.wire.envelope import time_of_id
from samphire.wire.keys import INTAKE, PRIORITY_STEPS, PRIORITY_WEIGHTS, WEBHOOKS, Keys, known_form, queue_lists

SMALL = 4000
"""Where no more messages are queued in all, they are all read."""
READ_BYTES = 16 * 2**20
"""Most bytes of messages that one search reads, but for the last page."""
PAGE = 100
"""Messages that are read at once, if they are small."""
FIRST_PAGE = 8
PAGE_BYTES = 256 * 2**10
AROUND = 1000
"""Messages that are read on each side of the place that an id's time tells, before it is given up."""
NEAR = 40
"""So near to a message that was read the place is not narrowed further."""
INTERPOLATIONS = 12
"""Where these do not narrow it enough, bisections follow."""
UNTIMED = 32
"""Messages among which one has to tell when it was submitted."""
SCAN_PAGE = 1000
LISTS_MAX = 2000
"""Lists with messages that are searched."""

_WEIGHTS = tuple(PRIORITY_WEIGHTS[step] for step in PRIORITY_STEPS)

Command = tuple[Argument, ...]
Search = Generator[Command, Any, int | None]
"""Asks for one command after the other, and ends with a position: how many messages of its list are before it."""


class Place(NamedTuple):
    """Where a message lies."""

    queue: str
    ahead: int
    """Tasks of its queue that are claimed before it, if nothing more urgent comes."""
    queued: int
    """Tasks in its queue, of all priorities."""


class Found(NamedTuple):
    """What a search has found."""

    place: Place | None
    is_certain: bool
    """Without a place: whether it is in no queue."""
    is_mentioned: bool = False
    """Another message names it, as the step before it in a chain does."""


class QueueSearch:
    """Searches all queues of a deployment for one task's message; to be used once.

    Args:
        connection: to the broker.
        keys: of the deployment.
        task_id: of the task.
    """

    def __init__(self, connection: DirectConnection, keys: Keys, task_id: str) -> None:
        self._connection = connection
        self._keys = keys
        self._id = task_id
        self._left = READ_BYTES
        self._is_certain = True
        self._is_mentioned = False

    async def find(self) -> Found:
        """Look once; raises SamphireError where the broker does not answer, or this user may not look."""
        named = await self._named()
        place = await self._search(named)
        if place is None and self._is_certain:
            try:  # what plain producers send is named only once a worker has seen it
                place = await self._search(await self._unnamed(named))
            except BrokerRightError:
                self._is_certain = False
        return Found(place, self._is_certain, self._is_mentioned)

    async def _search(self, queues: Iterable[str]) -> Place | None:
        lengths = await self._lengths(sorted(queues))
        lists = {(queue, step): length for queue in lengths for step, length in enumerate(lengths[queue]) if length}
        all_are_read = sum(lists.values()) <= SMALL
        made_at = time_of_id(self._id)
        self._is_certain = self._is_certain and all_are_read
        if len(lists) > LISTS_MAX or not (all_are_read or made_at is not None):
            self._is_certain = False
            return None
        searches = {
            (queue, step): self._read_all(self._list_key(queue, step))
            if all_are_read
            else self._narrow(self._list_key(queue, step), length, made_at or 0.0)
            for (queue, step), length in lists.items()
        }
        found = await self._run(searches)
        if found is None:
            return None
        (queue, step), position = found
        self._is_certain = True
        return Place(queue, before(lengths[queue], step, position), sum(lengths[queue]))

    def _list_key(self, queue: str, step: int) -> str:
        return self._keys.of_celery(queue_lists(queue)[step])

    async def _named(self) -> set[str]:
        names = {INTAKE, WEBHOOKS}
        async for page in self._connection.scan("SSCAN", self._keys.queues, options=("COUNT", SCAN_PAGE)):
            names.update(known_form(name) or INTAKE for name in page)
        return names

    async def _unnamed(self, named: set[str]) -> set[str]:
        """Queues whose lists lie there without their names being known."""
        options = ("MATCH", self._keys.of_celery(f"{INTAKE}*"), "TYPE", "list", "COUNT", SCAN_PAGE)
        found = {
            self._keys.queue_in(key) async for page in self._connection.scan("SCAN", options=options) for key in page
        }
        return {queue for queue in found if queue is not None} - named

    async def _lengths(self, queues: Sequence[str]) -> dict[str, list[int]]:
        names = [name for queue in queues for name in queue_lists(queue)]
        commands: list[Command] = [("LLEN", self._keys.of_celery(name)) for name in names]
        replies: list[int] = []
        for begin in range(0, len(commands), SCAN_PAGE):
            page = commands[begin : begin + SCAN_PAGE]
            try:
                replies += await self._connection.ask_all(page)
            except (ProtocolError, BrokerRightError):
                replies += [await self._length(command) for command in page]
        steps = len(PRIORITY_STEPS)
        return {queue: replies[n * steps : (n + 1) * steps] for n, queue in enumerate(queues)}

    async def _length(self, command: Command) -> int:
        try:
            return int(await self._connection.ask(*command))
        except ProtocolError:  # a key of another type lies there: no lane takes it for a list either
            return 0
        except BrokerRightError:  # another tenant's
            self._is_certain = False
            return 0

    async def _run(self, searches: dict[tuple[str, int], Search]) -> tuple[tuple[str, int], int] | None:
        """Carry on all searches at once, a command each in one round trip, until one has found it."""
        asked = {place: next(search) for place, search in searches.items()}
        while asked:
            if self._left < 0:
                self._is_certain = False
                return None
            replies = await self._connection.ask_all(list(asked.values()))
            then: dict[tuple[str, int], Command] = {}
            for place, reply in zip(asked, replies, strict=True):
                self._left -= _size(reply)
                try:
                    then[place] = searches[place].send(reply)
                except StopIteration as ended:
                    if ended.value is not None:
                        return place, int(ended.value)
            asked = then
        return None

    def _read_all(self, key: str) -> Search:
        """From the newest to the oldest: then a claim, which takes the oldest, moves nothing that was not read yet."""
        begin, count = 0, FIRST_PAGE
        while True:
            page: list[bytes] = yield ("LRANGE", key, begin, begin + count - 1)
            for n, message in enumerate(page):
                if self._is_it(message):
                    length: int = yield ("LLEN", key)
                    return max(0, length - 1 - begin - n)
            if len(page) < count:
                return None
            begin += len(page)
            count = _next_count(page)

    def _narrow(self, key: str, length: int, made_at: float) -> Search:
        first = yield from _timed(key, 0, length)
        last = yield from _timed(key, length - 1, length)
        if first is None or last is None:
            return None
        low, early_s, high, late_s = first.position, made_at - first.at, last.position, last.at - made_at
        position, size, looks, side = low if early_s <= 0 else high, first.size, 0, 0
        while early_s > 0 and late_s > 0:
            part = early_s / (early_s + late_s) if looks < INTERPOLATIONS else 0.5
            position = min(max(low, low + round(part * (high - low))), high)
            if min(position - low, high - position) <= NEAR:
                break
            looks += 1
            found = yield from _timed(key, position, length)
            if found is None:
                return None
            if not low < found.position < high or found.at == made_at:
                position = found.position
                break
            size, ahead_s = found.size, made_at - found.at
            if ahead_s > 0:
                low, early_s, late_s, side = found.position, ahead_s, late_s / 2 if side > 0 else late_s, 1
            else:
                high, late_s, early_s, side = found.position, -ahead_s, early_s / 2 if side < 0 else early_s, -1
        return (yield from self._around(key, position, length, _count_of(size)))

    def _around(self, key: str, position: int, length: int, count: int) -> Search:
        """Read what lies around a position, ever further away."""
        begin = end = max(0, position - count // 2)
        while end - begin < 2 * AROUND and (begin > 0 or end < length):
            for start, stop in ((end, min(length, end + count)), (max(0, begin - count), begin)):
                if start >= stop:
                    continue
                page: list[bytes] = yield _page(key, start, stop - start)
                for n, message in enumerate(reversed(page)):
                    if self._is_it(message):
                        return start + n
                begin, end = min(begin, start), max(end, stop)
                count = _next_count(page)
        return None

    def _is_it(self, message: bytes) -> bool:
        if message_id(message) == self._id:
            return True
        mentioned = mentions(message, self._id)
        self._is_mentioned = self._is_mentioned or mentioned is True
        self._is_certain = self._is_certain and mentioned is not None
        return False


class _Timed(NamedTuple):
    """A message that tells when it was submitted."""

    position: int
    at: float
    """In s since 1970."""
    size: int


def _timed(key: str, position: int, length: int) -> Generator[Command, Any, _Timed | None]:
    """The message at a position, or near it where that one tells no time, as those of plain Celery producers."""
    message: bytes | None = yield ("LINDEX", key, -1 - position)
    if message is None:  # it was claimed meanwhile
        return None
    if (at := sent_at_of(message)) is not None:
        return _Timed(position, at, len(message))
    begin = max(0, min(position - UNTIMED // 2, length - UNTIMED))
    page: list[bytes] = yield _page(key, begin, min(UNTIMED, _count_of(len(message))))
    for n, message in enumerate(reversed(page)):
        if (at := sent_at_of(message)) is not None:
            return _Timed(begin + n, at, len(message))
    return None


def _page(key: str, position: int, count: int) -> Command:
    """Reads so many messages from a position on; they come in the other order than that in which they are claimed."""
    return ("LRANGE", key, -position - count, -position - 1)


def _size(reply: object) -> int:
    if isinstance(reply, list):
        return sum(map(len, reply))
    return len(reply) if isinstance(reply, bytes) else 0


def _count_of(size: int) -> int:
    """How many messages of a size are read at once."""
    return max(1, min(PAGE, PAGE_BYTES // max(1, size)))


def _next_count(page: Sequence[bytes]) -> int:
    return _count_of(_size(page) // max(1, len(page)))


def before(lengths: Sequence[int], step: int, position: int) -> int:
    """About how many tasks of a queue are claimed before one: those before it in its list, and others by priority.

    Each round of claims takes tasks of each priority by its weight, the highest first. What one leaves, the first of
    the others takes.

    Args:
        lengths: messages of each priority, the highest first.
        step: the priority of the task, as a place in `lengths`.
        position: messages of that priority before it.
    """
    left = [Fraction(length) for length in lengths]
    left[step] = Fraction(position)
    while left[step]:
        shares = [weight if rest else 0 for weight, rest in zip(_WEIGHTS, left, strict=True)]
        shares[next(n for n, share in enumerate(shares) if share)] += sum(_WEIGHTS) - sum(shares)
        rounds = min(rest / share for rest, share in zip(left, shares, strict=True) if share)
        left = [rest - rounds * share for rest, share in zip(left, shares, strict=True)]
    taken = sum(lengths) - lengths[step] + position - sum(left)
    return int(taken) + sum(min(int(left[n]), _WEIGHTS[n]) for n in range(step))
