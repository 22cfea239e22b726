"""How the store calls its scripts: each with what stands before all of them, on a connection of its kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from samphire.transport.clock import BrokerClock
from samphire.transport.direct import Argument, DirectConnection, Script
from samphire.wire.keys import Keys
from samphire_broker.settings import Settings

_FOLDER = resources.files("samphire_broker.store") / "lua"

VERBS = tuple(sorted(file.name.removesuffix(".lua") for file in _FOLDER.iterdir() if file.name.endswith(".lua")))
"""Each script of the folder; what they have in common is in `shared` below it."""

_WITH = re.compile(r"^-- With: (.*)$", re.MULTILINE)
"""How a script names what stands before it, beside `shared/common.lua`."""


def script_text(verb: str, keys: Keys) -> str:
    """The text of a script as it is loaded, for the keys of one deployment."""
    text = (_FOLDER / f"{verb}.lua").read_text()
    found = _WITH.search(text)
    parts = ["common", *(found[1].split(", ") if found else ())]
    names = f"local NAMESPACE, CELERY = '{keys.namespace}', '{keys.celery_prefix}'"
    return "\n".join([names, *((_FOLDER / "shared" / f"{part}.lua").read_text() for part in parts), text])


class Calls:
    """One worker's connections and scripts; the parts of `Store` build on it.

    Every method of theirs raises `BrokerUnavailableError` when the broker is away, `BrokerRightError` when it does not
    let this user do what it takes, and `ProtocolError` when it answers what cannot be.
    """

    def __init__(self, settings: Settings, worker_id: str) -> None:
        # Each has calls that others must not wait for.
        self._claims = DirectConnection(settings.broker.address)
        self._starts = DirectConnection(settings.broker.address)
        self._endings = DirectConnection(settings.broker.address)
        self._blobs = DirectConnection(settings.broker.address)
        self._rest = DirectConnection(settings.broker.address)
        self._counts = DirectConnection(settings.broker.address)
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
        for connection in (self._claims, self._starts, self._endings, self._blobs, self._rest, self._counts):
            await connection.close()

    async def _run(
        self,
        verb: str,
        key_names: Sequence[str],
        args: Sequence[Argument],
        connection: DirectConnection | None = None,
    ) -> Any:
        return await (connection or self._rest).call(self._scripts[verb], key_names, args)
