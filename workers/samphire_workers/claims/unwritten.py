"""What this worker has had at Triton and whose end, or return to its queue, is not yet on the broker."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable


class Unwritten:
    """Claims by model. Should the worker go down now, these would be taken for what took it down.

    So who is alone with a model, because it may take the worker down, waits until there is none of it, before it begins
    and before it lets others in.
    """

    def __init__(self) -> None:
        self._by_model: defaultdict[str, set[str]] = defaultdict(set)
        self._changed = asyncio.Event()

    def add(self, model: str, fields: Iterable[str]) -> None:
        """These have been at Triton."""
        self._by_model[model].update(fields)

    def discard(self, fields: Iterable[str]) -> None:
        """These are written, or are about to be asked again."""
        gone = set(fields)
        some = False
        for model, kept in list(self._by_model.items()):
            if kept & gone:
                some = True
                kept -= gone
                if not kept:
                    del self._by_model[model]
        if some:
            self._changed.set()
            self._changed = asyncio.Event()

    async def none_of(self, model: str) -> None:
        """Return once there is nothing of a model, or of any ("")."""
        while self._by_model if model == "" else model in self._by_model:
            await self._changed.wait()
