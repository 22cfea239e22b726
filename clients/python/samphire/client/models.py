"""What the models take, as the workers tell it: a client refuses what cannot succeed before it is queued."""

from __future__ import annotations

import math
import time

import msgspec

from samphire.errors import ProtocolError, UnknownModelError
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection
from samphire.wire.keys import CATALOGUE_COMPLETE, Keys
from samphire.wire.signature import ModelSignature

FRESH_S = 5.0
UNKNOWN_FRESH_S = 0.5
"""What is not known now may be told soon: a worker has just started."""
NAMED_MAX = 20

_decode = msgspec.json.Decoder(ModelSignature).decode


class ModelCatalogue:
    """Signatures by model, kept for a few seconds. Where no worker has told anything, nothing is refused."""

    def __init__(self, connection: DirectConnection, keys: Keys) -> None:
        self._connection = connection
        self._key = keys.catalogue
        self._known: dict[str, tuple[ModelSignature | None, float]] = {}

    async def signature(self, model: str, *, fresh: bool = False) -> ModelSignature | None:
        """What a model takes; None where that is not known.

        Raises:
            BrokerUnavailableError: no answer.
            UnknownModelError: the workers know all models, and there is none of that name.
        """
        found, at = self._known.get(model, (None, -math.inf))
        if not fresh and time.monotonic() - at < (UNKNOWN_FRESH_S if found is None else FRESH_S):
            return found
        found = await self._look_up(model)
        self._known[model] = (found, time.monotonic())
        return found

    async def _look_up(self, model: str) -> ModelSignature | None:
        told, complete = await self._connection.ask("HMGET", self._key, model, CATALOGUE_COMPLETE)
        if told is None:
            if complete is not None:
                names = sorted({key_text(name) for name in await self._connection.ask("HKEYS", self._key)})
                names.remove(CATALOGUE_COMPLETE)
                more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
                raise UnknownModelError(
                    f"no model {model!r}; there are {', '.join(map(repr, names[:NAMED_MAX])) or '(none)'}{more}"
                )
            return None
        if not told:  # it is there, and not ready
            return None
        try:
            return _decode(told)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"what the workers tell of model {model!r} is not understood: {error}") from error
