"""Dead letters: what failed for good, or was no task; looked at, redriven, purged.

Clients only read; to redrive or purge they ask the workers, who own all state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from samphire.errors import InvalidInputError, LetterGoneError, LetterRefusedError, ResultTimeoutError
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection
from samphire.wire.keys import Keys

PAGE = 500
CHECK_S = 0.05
_FIELDS = ("task_id", "model", "queue", "reason", "error", "attempts", "worker", "died_at", "run", "refusals")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a task that came to nothing."""

    at: datetime
    """When it was over."""
    worker: str
    """Host name of the worker."""
    error: str
    traceback: str = ""
    """Where it happened, of an `InternalError`."""


@dataclass(frozen=True)
class DeadLetter:
    """Why and when a task, or a message that is none, ended."""

    id: str
    task_id: str
    """Empty where the message could not be read."""
    model: str
    queue: str
    reason: str
    """Class of the error: invalid_input, model_fault, timeout, transient, worker_crash, internal."""
    error: str
    attempts: int
    """How often the task was started, the last time included."""
    worker: str
    died_at: datetime
    run: int = 1
    """1, and one more for each time that it was redriven, or sent again after it had failed."""
    history: tuple[Attempt, ...] = ()
    """The attempts, and what became of them; the last entry is how the task ended. Only `get` reads it."""
    message: bytes | None = None
    """The message as it was sent; only `get` reads it."""
    refusals: int = 0
    """How often it could not be redriven although somebody asked for it."""


_decode_history = msgspec.json.Decoder(tuple[Attempt, ...]).decode


@dataclass(frozen=True)
class LetterFilter:
    """Which letters are meant; what is not given does not matter."""

    model: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("since", "until"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, datetime) or value.tzinfo is None):
                raise InvalidInputError(f"expected {name} as a datetime with a time zone, given {value!r}")

    def fits(self, letter: DeadLetter) -> bool:
        """Whether a letter of the right time is one of those."""
        return self.model in (None, letter.model) and self.reason in (None, letter.reason)


Letters = list[DeadLetter]


class AsyncDeadLetters:
    """The dead letters of a broker."""

    def __init__(self, connection: DirectConnection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def list(self, which: LetterFilter | None = None, *, limit: int | None = 100) -> Letters:
        """Letters, the newest first, without their messages; all of them with a limit of None."""
        which = which or LetterFilter()
        newest = which.until.timestamp() if which.until else "+inf"
        oldest = which.since.timestamp() if which.since else "-inf"
        found: Letters = []
        offset = 0
        while limit is None or len(found) < limit:
            command = ("ZRANGE", self._keys.dead, newest, oldest, "BYSCORE", "REV", "LIMIT", offset, PAGE)
            ids = [key_text(letter) for letter in await self._connection.ask(*command)]
            for letter_id in ids:
                if limit is not None and len(found) >= limit:
                    break
                letter = await self._read(letter_id)
                if letter is not None and which.fits(letter):
                    found.append(letter)
            if len(ids) < PAGE:
                break
            offset += PAGE
        return found

    async def get(self, letter_id: str) -> DeadLetter:
        """One letter with its message.

        Raises:
            LetterGoneError: there is none of that id.
        """
        return _found(letter_id, await self._read(letter_id, whole=True))

    async def redrive(
        self, letter_ids: Iterable[str], *, rate_per_s: float | None = None, timeout_s: float = 30.0
    ) -> int:
        """Send messages again as they were, each as a new run of the same task; returns how many.

        Args:
            letter_ids: which; with `list` all that a filter names.
            rate_per_s: no faster than this.
            timeout_s: how long to wait for the workers after the last one was asked for.

        Raises:
            LetterGoneError: one of them is not there; nothing was redriven.
            LetterRefusedError: one of them cannot be redriven, and stays: its task was sent again and has not failed
                since, or its queue is a key of another type; the others are redriven.
            ResultTimeoutError: no worker has done it in time; the request stands.
        """
        return await self._ask("redrive", tuple(letter_ids), rate_per_s, timeout_s)

    async def purge(self, letter_ids: Iterable[str], *, timeout_s: float = 30.0) -> int:
        """Delete letters for good; returns how many. Raises as `redrive` does."""
        return await self._ask("purge", tuple(letter_ids), None, timeout_s)

    async def _ask(self, verb: str, letter_ids: Sequence[str], rate_per_s: float | None, timeout_s: float) -> int:
        if rate_per_s is not None and not rate_per_s > 0:
            raise InvalidInputError(f"expected rate_per_s above 0, given {rate_per_s}")
        letters = {letter_id: _found(letter_id, await self._read(letter_id)) for letter_id in letter_ids}
        began = time.monotonic()
        for number, letter_id in enumerate(letter_ids):
            if rate_per_s is not None:
                await asyncio.sleep(max(0.0, began + number / rate_per_s - time.monotonic()))
            # The run is named: a redriven task may fail again at once, and leave a letter of the same id.
            request = f"{verb}:{letters[letter_id].run} {letter_id}"
            await self._connection.execute("RPUSH", self._keys.letters, request, repeatable=True)
        give_up = time.monotonic() + timeout_s
        refused: list[str] = []
        for letter_id, asked in letters.items():
            while (letter := await self._read(letter_id)) is not None and letter.died_at == asked.died_at:
                if letter.refusals > asked.refusals:
                    why = await self._connection.ask("HGET", self._keys.dead_prefix + letter_id, "refused")
                    refused.append(key_text(why or b""))
                    break
                if time.monotonic() > give_up:
                    message = f"no worker has taken up the {verb} of {letter_id} in {timeout_s} s; the request stands"
                    raise ResultTimeoutError(message)
                await asyncio.sleep(CHECK_S)
        if refused:
            raise LetterRefusedError(f"{len(refused)} of {len(letters)} letters cannot be redriven: {refused[0]}")
        return len(letter_ids)

    async def _read(self, letter_id: str, *, whole: bool = False) -> DeadLetter | None:
        more = ("message", "history") if whole else ()
        values = await self._connection.ask("HMGET", self._keys.dead_prefix + letter_id, *_FIELDS, *more)
        if values[_FIELDS.index("died_at")] is None:  # its time is over, its name not yet removed
            return None
        texts = dict(zip(_FIELDS, [key_text(value or b"") for value in values], strict=False))
        return DeadLetter(
            letter_id,
            texts["task_id"],
            texts["model"],
            texts["queue"],
            texts["reason"],
            texts["error"],
            int(texts["attempts"] or 0),
            texts["worker"],
            datetime.fromtimestamp(float(texts["died_at"]), UTC),
            int(texts["run"] or 1),
            _decode_history(values[-1] or b"[]") if whole else (),
            values[-2] if whole else None,
            int(texts["refusals"] or 0),
        )


def _found(letter_id: str, letter: DeadLetter | None) -> DeadLetter:
    if letter is None:
        raise LetterGoneError(f"no dead letter {letter_id!r}: it was redriven or purged, or its time is over")
    return letter
