"""How the store calls its scripts: each with what stands before all of them, on a connection of its kind."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Sequence
from importlib import resources
from typing import Any

from redis.exceptions import ResponseError

from samphire.transport.clock import BrokerClock
from samphire.transport.direct import Argument, DirectConnection, Exchange, Script
from samphire.wire.keys import Keys
from samphire_broker.settings import Settings

logger = logging.getLogger(__name__)

_FOLDER = resources.files("samphire_broker.store") / "lua"

VERBS = tuple(sorted(file.name.removesuffix(".lua") for file in _FOLDER.iterdir() if file.name.endswith(".lua")))
"""Each script of the folder; what they have in common is in `shared` below it."""

RUN_ID = re.compile(rb"run_id:(\w+)")
"""In what the server tells of itself (INFO)."""
_WITH = re.compile(r"^-- With: (.*)$", re.MULTILINE)
"""How a script names what stands before it, beside `shared/common.lua`."""


def script_text(verb: str, keys: Keys) -> str:
    """The text of a script as it is loaded, for the keys of one deployment."""
    text = (_FOLDER / f"{verb}.lua").read_text()
    found = _WITH.search(text)
    parts = ["common", *(found[1].split(", ") if found else ())]
    names = f"local NAMESPACE, CELERY, CHANNEL = '{keys.namespace}', '{keys.celery_prefix}', '{keys.channel_prefix}'"
    return "\n".join([names, *((_FOLDER / "shared" / f"{part}.lua").read_text() for part in parts), text])


class Calls:
    """One worker's connections and scripts; the parts of `Store` build on it.

    Every method of theirs raises `BrokerUnavailableError` when the broker is away, `BrokerRightError` when it does not
    let this user do what it takes, and `ProtocolError` when it answers what cannot be.
    """

    def __init__(self, settings: Settings, worker_id: str) -> None:
        # Each has calls that others must not wait for. Through those with `on_open` logs are written.
        address = settings.broker.address
        self._claims = DirectConnection(address)
        self._starts = DirectConnection(address, on_open=self._see_epoch)
        self._endings = DirectConnection(address, on_open=self._see_epoch)
        self._logs = DirectConnection(address, on_open=self._see_epoch)
        self._blobs = DirectConnection(address)
        self._rest = DirectConnection(address, on_open=self._see_epoch)
        self._counts = DirectConnection(address)
        self._broker_run = ""
        """The run of the broker for which the epoch was seen to."""
        self._settings = settings
        self.clock = BrokerClock(self._rest)
        self.worker_id = worker_id
        self.keys = settings.broker.keys
        self._lease = self.keys.worker_prefix + worker_id
        self._inflight = f"{self._lease}:inflight"
        self._started = f"{self._lease}:started"
        self._scripts = {verb: Script(script_text(verb, self.keys)) for verb in VERBS}

    async def close(self) -> None:
        """Close all connections."""
        for connection in (
            self._claims,
            self._starts,
            self._endings,
            self._logs,
            self._blobs,
            self._rest,
            self._counts,
        ):
            await connection.close()

    async def _see_epoch(self, exchange: Exchange) -> None:
        """Begin a new epoch of positions after a restart of the broker, before anything is written to a log.

        A restart breaks every connection, so whoever opens one looks. Where this user may not ask which run of the
        broker it is, each connection counts as another.
        """
        try:
            found = RUN_ID.search(await exchange("INFO", "server"))
            run_id = found[1].decode() if found else ""
        except ResponseError:
            run_id = ""
        run_id = run_id or uuid.uuid4().hex
        if run_id == self._broker_run:
            return
        try:
            told = await exchange("CONFIG", "GET", "append*")
            modes = dict(zip(told[::2], told[1::2], strict=True))
        except ResponseError:
            modes = {}
        keeps_all = modes.get(b"appendonly") == b"yes" and modes.get(b"appendfsync") == b"always"
        try:
            await exchange("EVAL", self._scripts["epoch"].text, 1, self.keys.epoch, run_id, int(keeps_all))
        except ResponseError as error:
            logger.warning(
                "the epoch of positions was not set, so readers of streams may miss a restart of the broker: %s",
                error,
                extra={"action": "epoch_failed"},
            )
        else:
            self._broker_run = run_id

    async def _run(
        self,
        verb: str,
        key_names: Sequence[str],
        args: Sequence[Argument],
        connection: DirectConnection | None = None,
    ) -> Any:
        return await (connection or self._rest).call(self._scripts[verb], key_names, args)
