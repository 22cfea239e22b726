"""What the endpoints serve, as a lane knows it: signatures, kept fresh, and the models that are away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection

import msgspec

from samphire import keys
from samphire.errors import EndpointUnavailableError, SamphireError, TransientError
from samphire_workers.lane.request import Checker
from samphire_workers.triton import Endpoints

logger = logging.getLogger(__name__)

FRESH_S = 2.0
"""A signature in use is looked up again after this long, so new versions are noticed."""

UNUSED_FRESH_S = 5.0
"""And one that is not in use, which clients may still want to know."""

CHECK_S = 0.5


class Catalogue:
    """Checkers by model name. Nothing is claimed for the models in `away`."""

    def __init__(self, endpoints: Endpoints, max_request_bytes: int) -> None:
        self._endpoints = endpoints
        self._max_request_bytes = max_request_bytes
        self._checkers: dict[str, tuple[Checker, float]] = {}
        self._used: set[str] = set()
        self.away: set[str] = set()
        self.queues: set[str] = set()
        """Queues of the models in the endpoints' repositories."""

    def known(self, model: str) -> Checker | None:
        """The checker of a model, if it is in memory."""
        found = self._checkers.get(model)
        self._used.add(model)
        return found[0] if found else None

    def signatures(self) -> dict[str, bytes]:
        """What is known of the models, as clients read it (see the key schema)."""
        told = {keys.parse_queue(queue)[0]: b"" for queue in self.queues}
        if told:
            told[keys.CATALOGUE_COMPLETE] = b"1"
        return told | {model: msgspec.json.encode(checker.signature) for model, (checker, _) in self._checkers.items()}

    async def checker(self, model: str, *, fresh: bool = False) -> Checker:
        """Return the checker of a model, from memory or from an endpoint.

        Raises:
            UnknownModelError: no such model.
            EndpointUnavailableError: the model, or every endpoint, is away.
        """
        found = self.known(model)
        if found and not fresh:
            return found
        return await self._look_up(model)

    async def _look_up(self, model: str) -> Checker:
        endpoint = self._endpoints.pick()
        try:
            signature = await endpoint.signature(model)
        except TransientError as error:
            if await endpoint.is_ready():
                self.forget(model)
            else:
                self._endpoints.mark_away(endpoint)
            raise EndpointUnavailableError(str(error)) from error
        except SamphireError:
            self._checkers.pop(model, None)
            self.away.discard(model)
            raise
        checker, _ = self._checkers.get(model, (None, 0.0))
        if checker is None or checker.signature != signature:  # else what it has checked already still holds
            checker = Checker(signature, self._max_request_bytes)
        self._checkers[model] = (checker, time.monotonic())
        self.away.discard(model)
        return checker

    def forget(self, model: str) -> None:
        """Treat a model as away until it has been seen ready again."""
        self._checkers.pop(model, None)
        self.away.add(model)

    async def watch(self, on_back: Callable[[], None]) -> None:
        """Keep signatures fresh and look whether models that were away are back, for ever."""
        while True:
            await self._endpoints.some_ready.wait()
            try:
                endpoint = self._endpoints.pick()
                self.queues = {keys.queue_name(model) for model in await endpoint.models()}
                ready = await endpoint.models(ready=True)
            except SamphireError:
                await asyncio.sleep(CHECK_S)
                continue
            stale = self._stale(self._used, FRESH_S)
            self._used -= stale
            for model in self.away | stale | self._stale(ready | set(self._checkers), UNUSED_FRESH_S):
                was_away = model in self.away
                try:
                    await self._look_up(model)
                except SamphireError as error:
                    logger.debug("model %s: %s", model, error, extra={"action": "lookup_failed"})
                if was_away and model not in self.away:
                    logger.info("model %s is back", model, extra={"action": "model_back"})
                    on_back()
            await asyncio.sleep(CHECK_S)

    def _stale(self, models: Collection[str], fresh_s: float) -> set[str]:
        oldest = time.monotonic() - fresh_s
        return {model for model in models if model not in self._checkers or self._checkers[model][1] < oldest}
