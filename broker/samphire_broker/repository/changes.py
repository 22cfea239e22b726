"""Changes of a folder of models, taken over by a running Triton: what does not load leaves what is served."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection

from samphire_broker.repository.folder import Model, ModelFolderError, ignored_versions, look, mirrored
from samphire_broker.repository.loads import Loads, StillLoadingError, TritonAwayError
from samphire_broker.repository.mirror import Mirror

LOOK_S = 0.25
LOOK_SHARE = 10
"""Between two looks at a large folder so many times as long as a look takes."""
AWAY_MAX = 2
STILL_S = 1.0
"""A change is taken once the model's files have been still for so long: nothing is read while it is being written."""


class Changes:
    """Takes changes of a folder over into its mirror and into Triton.

    Args:
        mirror: of the folder.
        loads: of the Triton that serves the mirror.
        say: is told what happens.
        note: is told why a model is not loaded as it is in the folder; an empty reason: it is.
    """

    def __init__(
        self,
        mirror: Mirror,
        loads: Loads,
        say: Callable[[str], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._mirror = mirror
        self._loads = loads
        self._say = say
        self._note = note
        self._away: dict[str, int] = {}
        """How often Triton was away as a model was to be loaded, one time after the other."""

    async def is_ready(self) -> bool:
        """Whether Triton answers."""
        return await self._loads.is_ready()

    async def take(self, name: str, model: Model | None) -> str:
        """Load a model as it is in the folder now; None: unload it, since it is not there any more.

        Returns why that failed, empty if it did not.

        Raises:
            TritonAwayError: no answer. The second time in a row that counts as the model's trouble.
        """
        stays = ". What is served stays"
        try:
            async with self._mirror.locked():
                try:
                    trouble = await (self._drop(name) if model is None else self._take(name, model))
                except StillLoadingError as error:
                    trouble, stays = str(error), ""
                # Who mends it mends it in the folder, not in the copy that Triton reads.
                trouble = trouble.replace(str(self._mirror.target), str(self._mirror.source))
                self._note(name, trouble)
            self._away.pop(name, None)
        except TritonAwayError as error:
            self._away[name] = self._away.get(name, 0) + 1
            if self._away[name] < AWAY_MAX:
                raise
            del self._away[name]
            trouble = f"Triton was gone {AWAY_MAX} times while it was loading: {error}"
            self._note(name, trouble)
        except OSError as error:
            trouble = f"its files cannot be changed: {error}"
        if trouble:
            self._say(f"model {name} is not as it is in {self._mirror.source}: {trouble}{stays}")
        else:
            done = "loaded as it is in" if model is not None else "unloaded, since it is no more in"
            self._say(f"model {name} is {done} {self._mirror.source}")
        return trouble

    async def _take(self, name: str, model: Model) -> str:
        if model.trouble:
            return model.trouble
        say_ignored(name, model, self._say)
        try:
            await self._mirror.work(self._mirror.put, name, model)
        except ModelFolderError as error:
            return str(error)
        is_kept = False
        try:
            trouble = await self._loads.load(name)
            is_kept = not trouble
        except StillLoadingError:  # it reads these files
            is_kept = True
            raise
        finally:
            await self._mirror.work(self._mirror.keep if is_kept else self._mirror.undo, name)
        return trouble

    async def _drop(self, name: str) -> str:
        await self._mirror.work(self._mirror.remove, name)
        try:
            return await self._loads.unload(name)
        except TritonAwayError:
            return ""  # it begins again without it


def say_ignored(name: str, model: Model, say: Callable[[str], None]) -> None:
    """Say which folders of a model Triton leaves out without a word."""
    for folder in ignored_versions(model):
        say(f"model {name}: Triton ignores the folder {folder}, since a version begins with 1 to 9: rename it")


async def watch(mirror: Mirror, changes: Changes, taken: dict[str, Model], say: Callable[[str], None]) -> None:
    """Take changes of the folder over, each once its files have been still for `STILL_S`, for ever.

    Args:
        mirror, changes: of the folder.
        taken: what the folder had as it was mirrored.
        say: is told why the folder cannot be read.
    """
    taken = dict(taken)
    seen, since = dict(taken), dict.fromkeys(taken, time.monotonic())
    told = ""
    looked_s = 0.0
    while True:
        await asyncio.sleep(max(LOOK_S, LOOK_SHARE * looked_s))
        began = time.monotonic()
        try:
            now = await asyncio.to_thread(look, mirror.source)
        except ModelFolderError as error:
            if str(error) != told:
                say(f"changes of models are not taken: {error}. What is served stays")
            told = str(error)
            continue
        told = ""
        looked_s = time.monotonic() - began
        for name in now.keys() | seen.keys():
            if now.get(name) != seen.get(name):
                since[name] = time.monotonic()
        seen = now
        differing = sorted(name for name in now.keys() | taken.keys() if now.get(name) != taken.get(name))
        for name in differing:
            if time.monotonic() - since[name] >= STILL_S:
                await _take(changes, name, now.get(name), taken)
                break  # that may have taken long: the folder is looked at again


async def _take(changes: Changes, name: str, model: Model | None, taken: dict[str, Model]) -> None:
    """Take one change over; it comes again where Triton is away."""
    if not await changes.is_ready():
        return
    with contextlib.suppress(TritonAwayError):
        await changes.take(name, model)
        if model is None:
            del taken[name]
        else:
            taken[name] = model


async def reload(mirror: Mirror, changes: Changes, names: Collection[str], troubled: Collection[str]) -> dict[str, str]:
    """Take over what differs from the mirror or is `troubled`, or these models whether they differ or not.

    Returns why that failed, by name; empty where it did not.

    Raises:
        ModelFolderError: the folder cannot be read, or has no such model.
        TritonAwayError: no answer.
    """
    models = await asyncio.to_thread(look, mirror.source)
    have = await asyncio.to_thread(mirrored, mirror.target)
    known = models.keys() | have.keys() | set(troubled)
    if unknown := sorted(set(names) - known):
        raise ModelFolderError(f"{mirror.source} has no model {unknown[0]}; there are {', '.join(sorted(models))}")
    chosen = names or (name for name in known if name in troubled or models.get(name) != have.get(name))
    return {name: await changes.take(name, models.get(name)) for name in sorted(chosen)}
