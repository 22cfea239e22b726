"""Models whose process has died, and who brings them back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict

from samphire.errors import EndpointUnavailableError, SamphireError
from samphire_workers.intake.served import ServedModels
from samphire_workers.triton.endpoint import Endpoint

logger = logging.getLogger(__name__)

BEYOND_RELOAD_S = 10.0
"""Between two tries of a model whose process has died, where the worker may not reload it."""


class Reloads:
    """Reloads models whose process has died, each once a death."""

    def __init__(self, served: ServedModels) -> None:
        self._served = served
        self._beyond_reload: set[tuple[str, str]] = set()
        """Models, by endpoint, whose process has died and that may not be reloaded from here."""
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._reloaded_at: dict[tuple[str, str], float] = {}

    async def after(self, error: SamphireError, endpoint: Endpoint, model: str, asked_at: float) -> SamphireError:
        """Bring a model back whose process has died since `asked_at`; returns the error that those who asked get."""
        key = (endpoint.url, model)
        if await self._reload(endpoint, model, asked_at):
            self._beyond_reload.discard(key)
            return error
        self._served.lost(endpoint, model, BEYOND_RELOAD_S)
        if key in self._beyond_reload:  # it was dead already: nobody here is to blame
            return EndpointUnavailableError(f"somebody has to reload model {model!r}: {error}")
        self._beyond_reload.add(key)
        return error

    def has_answered(self, endpoint: Endpoint, model: str) -> None:
        """A model's process lives: whoever may reload it has done so."""
        self._beyond_reload.discard((endpoint.url, model))

    async def _reload(self, endpoint: Endpoint, model: str, asked_at: float) -> bool:
        """Bring a model back whose process has died; whoever finds it first, the others wait. Whether it is back."""
        async with self._turns[model]:
            if self._reloaded_at.get((endpoint.url, model), 0.0) > asked_at:
                return True  # it was the process before
            try:
                await endpoint.reload(model)
            except SamphireError as error:  # the control API is closed to us: somebody else has to
                logger.error(
                    "model %s has lost its process on %s and may not be loaded from here. Load it there: %s",
                    model,
                    endpoint.url,
                    error,
                    extra={"action": "reload_failed"},
                )
                return False
            logger.info("model %s was reloaded", model, extra={"action": "reloaded"})
            self._reloaded_at[endpoint.url, model] = time.monotonic()
            return True
