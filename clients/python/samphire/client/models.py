"""What the models take, as the workers tell it: a client refuses what cannot succeed before it is queued."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from samphire.errors import ProtocolError, UnknownModelError
from samphire.transport.connection import key_text
from samphire.transport.direct import DirectConnection
from samphire.wire.keys import CATALOGUE_COMPLETE, CATALOGUE_TELLER, CATALOGUE_TROUBLE, Keys
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
        self._last: dict[str, ModelSignature] = {}
        self._not_ready: dict[str, float] = {}
        """Since when models that the workers know are seen not to be loaded, by the monotonic clock."""

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
        if found is not None:
            self._last[model] = found
        return found

    def last_known(self, model: str) -> ModelSignature | None:
        """What a model took when that was known last."""
        return self._last.get(model)

    def not_ready_s(self, model: str) -> float | None:
        """For how long, in s, the workers are seen to know a model that is not loaded; None: it is, or nobody knows."""
        since = self._not_ready.get(model)
        return None if since is None else time.monotonic() - since

    async def _look_up(self, model: str) -> ModelSignature | None:
        fields = (model, CATALOGUE_COMPLETE, CATALOGUE_TROUBLE + model)
        told, complete, trouble = await self._connection.ask("HMGET", self._key, *fields)
        if told == b"":
            self._not_ready.setdefault(model, time.monotonic())
        else:
            self._not_ready.pop(model, None)
        if told is None:
            if complete is not None and trouble is not None:
                raise UnknownModelError(f"no model {model!r} is loaded: {key_text(trouble)}")
            if complete is not None:
                names = [key_text(name) for name in await self._connection.ask("HKEYS", self._key)]
                raise _unknown(model, [name for name in names if _names_a_model(name)])
            return None
        return _signature(model, told)


@dataclass(frozen=True)
class ServedModel:
    """A model of the endpoints, as the workers tell it."""

    name: str
    signature: ModelSignature | None
    """What it takes and returns, and its versions that are ready; None: none is."""
    trouble: str = ""
    """Why it is not loaded, or not as its files are now; "" where nothing is known of that."""


class AsyncModels:
    """The models of the endpoints, as the workers tell it; `AsyncClient.models` has one."""

    def __init__(self, connection: DirectConnection, keys: Keys) -> None:
        self._connection = connection
        self._key = keys.catalogue

    async def list(self) -> list[ServedModel]:
        """All models, by name; none where no worker has told of any.

        Raises:
            BrokerUnavailableError: no answer.
        """
        told = await self._connection.ask("HGETALL", self._key)
        fields = {key_text(name): value for name, value in zip(told[::2], told[1::2], strict=True)}
        names = {name.removeprefix(CATALOGUE_TROUBLE) for name in fields}
        return [_served(name, fields) for name in sorted(names) if _names_a_model(name)]

    async def get(self, model: str) -> ServedModel:
        """One model.

        Raises:
            BrokerUnavailableError: no answer.
            UnknownModelError: no worker has told of it.
        """
        found = await self.list()
        for one in found:
            if one.name == model:
                return one
        raise _unknown(model, [one.name for one in found])


def _served(model: str, fields: Mapping[str, Any]) -> ServedModel:
    trouble = fields.get(CATALOGUE_TROUBLE + model, b"")
    return ServedModel(model, _signature(model, fields.get(model, b"")), bytes(trouble).decode(errors="replace"))


def _signature(model: str, told: Any) -> ModelSignature | None:
    if not told:  # it is there, and not ready
        return None
    try:
        return _decode(told)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"what the workers tell of model {model!r} is not understood: {error}") from error


def _names_a_model(field: str) -> bool:
    return not field.startswith((CATALOGUE_COMPLETE, CATALOGUE_TROUBLE, CATALOGUE_TELLER))


def _unknown(model: str, names: Sequence[str]) -> UnknownModelError:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    known = ", ".join(map(repr, sorted(names)[:NAMED_MAX])) or "(none)"
    return UnknownModelError(f"no model {model!r}; there are {known}{more}")
