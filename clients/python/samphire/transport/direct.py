"""A bare connection to the broker for the calls that every task waits for.

redis-py's client adds a retry frame, a pool's health check and two timers to each command, which costs
more than the command. Here its connection (address, TLS, authentication) is used directly: one command at
a time, one timeout around it, and no repetition but of what may be carried out twice: who calls decides what a lost
reply means.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    ConnectionError,  # noqa: A004 - redis-py's name for it
    InvalidResponse,
    NoScriptError,
    RedisError,
    ResponseError,
)

from samphire.errors import BrokerUnavailableError
from samphire.transport.address import Address
from samphire.transport.connection import connection_pool, translate

COMMAND_TIMEOUT_S = 15.0

Argument = str | bytes | int | float

Exchange = Callable[..., Awaitable[Any]]
"""Sends a command on a connection that has just been opened, and returns its reply."""


class Script:
    """A Lua script, called by its SHA-1 and loaded where the server does not know it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class DirectConnection:
    """One connection; opened with the first command, and again after an error."""

    def __init__(
        self,
        address: Address,
        *,
        name: str | None = None,
        on_open: Callable[[Exchange], Awaitable[None]] | None = None,
    ) -> None:
        self._on_open = on_open
        """What is done on each connection before anything else."""
        self._pool = connection_pool(address, name)
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.WriteTransport | None = None
        """Of the connection, which forgets it where it closes itself (after a cancellation, for one)."""
        self._lock = asyncio.Lock()
        self.opened = 0
        """How often it was opened: more than once means that it broke, or was closed."""

    async def call(
        self, script: Script, keys: Iterable[str], args: Iterable[Argument], *, repeatable: bool = False
    ) -> Any:
        """Run a script and return its reply; `repeatable` as for `execute`.

        Raises:
            BrokerUnavailableError: no answer; the script may or may not have run.
            SamphireError: the translation of the error that the broker answered with.
            MemoryError: this process has no memory for the reply; the script may or may not have run.
        """
        names = list(keys)
        command = ("EVALSHA", script.sha, len(names), *names, *args)
        try:
            return await self.execute(*command, repeatable=repeatable)
        except NoScriptError:  # it did not run
            await self.execute("SCRIPT", "LOAD", script.text)
            return await self.execute(*command, repeatable=repeatable)

    async def ask(self, *command: Argument) -> Any:
        """Run a command that changes nothing; raises as `call` does."""
        return await self.execute(*command, repeatable=True)

    async def ask_all(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        """Run commands that change nothing, one after the other on one connection, sent together; raises as `call`."""
        replies: list[Any] = await self._guarded(lambda: self._run_all(commands), COMMAND_TIMEOUT_S, repeatable=True)
        return replies

    async def scan(self, *command: Argument, options: Sequence[Argument] = ()) -> AsyncGenerator[list[Any], None]:
        """Pages of SCAN, SSCAN or HSCAN, from the first to the last; raises as `call` does.

        Args:
            command: its name, and the key of what has one.
            options: what stands behind the cursor.
        """
        cursor: Any = b"0"
        while True:
            cursor, page = await self.ask(*command, cursor, *options)
            yield page
            if cursor in (b"0", "0"):
                return

    async def execute(self, *command: Argument, timeout_s: float = COMMAND_TIMEOUT_S, repeatable: bool = False) -> Any:
        """Run a command and return its reply; raises as `call` does.

        Args:
            command: its name and arguments.
            timeout_s: how long it may take; a repetition may take as long again.
            repeatable: whether it may be carried out twice. Then it is sent once more, at once, if the connection was
                opened before and is found broken: brokers and routers close those that are idle.

        Raises:
            NoScriptError: the server does not know the script; it did not run.
        """
        return await self._guarded(lambda: self._run(command), timeout_s, repeatable=repeatable)

    async def _guarded(self, run: Callable[[], Awaitable[Any]], timeout_s: float, *, repeatable: bool) -> Any:
        async with self._lock:
            was_open = self._connection is not None
            try:
                try:
                    return await self._within(timeout_s, run)
                except (ConnectionError, OSError) as error:
                    if not (repeatable and was_open) or isinstance(error, TimeoutError):
                        raise
                    await self.close()
                    return await self._within(timeout_s, run)
            except NoScriptError:
                raise
            except ResponseError as error:
                raise translate(error) from error
            except (RedisError, OSError) as error:  # TimeoutError is an OSError
                await self.close()
                if isinstance(error, InvalidResponse) and "Out of memory" in str(error):  # hiredis's words for its own
                    raise MemoryError("a reply of the broker has no room in this process") from error
                raise translate(error) from error
            except BaseException:
                # Cancelled: the reply will still come, and must not be taken for the next command's.
                await self.close()
                raise

    async def _within(self, timeout_s: float, run: Callable[[], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(timeout_s):
            if self._connection is None:
                connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
                await connection.connect()  # type: ignore[no-untyped-call]
                self._connection = connection
                self._transport = connection._writer.transport if connection._writer is not None else None
                self.opened += 1
                if self._on_open is not None:
                    await self._on_open(self._exchange)
            return await run()

    async def _run(self, command: tuple[Argument, ...]) -> Any:
        return await self._exchange(*command)

    async def _run_all(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        assert self._connection is not None
        packed = b"".join([hiredis.pack_command(command) for command in commands])  # type: ignore[arg-type]
        await self._connection.send_packed_command(packed, check_health=False)
        replies = []
        failed: ResponseError | None = None
        for _ in commands:  # each reply is read, or it would be taken for that of a later command
            try:
                replies.append(await self._connection.read_response())
            except ResponseError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return replies

    async def _exchange(self, *command: Argument) -> Any:
        await self._send(command)
        assert self._connection is not None
        return await self._connection.read_response()

    async def _send(self, command: tuple[Argument, ...]) -> None:
        if self._connection is None:
            raise BrokerUnavailableError("the broker is away: not connected")
        packed = hiredis.pack_command(command)  # type: ignore[arg-type]  # any number of arguments
        await self._connection.send_packed_command(packed, check_health=False)

    async def send(self, *command: Argument) -> None:
        """Send a command whose reply `read` gets, on a connection that has subscribed.

        Raises:
            BrokerUnavailableError: it is not connected any more.
        """
        try:
            await self._send(command)
        except (RedisError, OSError) as error:
            await self.close()
            raise translate(error) from error

    async def read(self, timeout_s: float) -> Any:
        """Return the next reply of a connection that has subscribed; None after `timeout_s` without one."""
        connection = self._connection
        if connection is None:
            raise BrokerUnavailableError("the broker is away: not connected")
        try:
            async with asyncio.timeout(timeout_s):
                return await connection.read_response(disconnect_on_error=False)
        except TimeoutError:
            return None
        except (RedisError, OSError) as error:
            await self.close()
            raise BrokerUnavailableError(f"the broker is away: {error}", retry_after_s=1.0) from error

    async def close(self) -> None:
        """Close the connection; the next command opens it again."""
        connection, self._connection = self._connection, None
        transport, self._transport = self._transport, None
        if connection is not None:
            await connection.disconnect(nowait=True)
        if transport is not None:  # else TLS waits for the other side, and is left open where the loop ends before
            transport.abort()


async def read_blob(connection: DirectConnection, key: str, size: int) -> bytes | None:
    """Bytes of a claim check, at most one more than `size`; None when it has expired."""
    # A range, so that what lies there cannot be larger than what was announced.
    data: bytes = await connection.ask("GETRANGE", key, 0, size)
    if not data and not await connection.ask("EXISTS", key):
        return None
    return data
