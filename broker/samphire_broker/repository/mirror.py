"""The copy of a folder of models that the embedded Triton serves: it has exactly what the folder has.

A model is copied whole and put in its place by a rename: nobody reads half of one. What it was is kept until it is
known that the new one loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from samphire_broker.repository.folder import FOLDER, File, Model, ModelFolderError, look, mirrored

T = TypeVar("T")

NAME = "model_repository"
LOCK_PAUSE_S = 0.05


class Mirror:
    """The mirror of one folder in a data directory.

    Args:
        source: the folder of models; never written to.
        data_dir: of the stack.
    """

    def __init__(self, source: Path, data_dir: Path) -> None:
        self.source = source
        self.target = data_dir / NAME
        self._drafts = data_dir / f"{NAME}.drafts"
        self._lock = data_dir / f"{NAME}.lock"
        self._is_stopped = False

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Only one process changes the mirror at a time; the others wait."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_PAUSE_S)
            yield

    async def begin(self) -> dict[str, Model]:
        """Make the mirror what the folder is, before any Triton serves it; returns what the folder has.

        A model that is not in the mirror has a trouble that says why.

        Raises:
            ModelFolderError: the folder cannot be read, or holds no models.
        """
        models = await asyncio.to_thread(look, self.source)
        try:
            async with self.locked():
                return await self.work(self._begin, models)
        except OSError as error:
            raise ModelFolderError(f"the copy of the models, {self.target}, cannot be changed: {error}") from error

    async def work(self, do: Callable[..., T], *args: object) -> T:
        """Do something with files in a thread. Where this is cancelled, it ends first: the lock is still held then."""
        working = asyncio.ensure_future(asyncio.to_thread(do, *args))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            self._is_stopped = True
            await asyncio.wait([working])
            raise

    def _begin(self, models: dict[str, Model]) -> dict[str, Model]:
        shutil.rmtree(self._drafts, ignore_errors=True)
        have = mirrored(self.target)
        for name in have:
            if name not in models or models[name].trouble:
                self.remove(name)
        for name, model in models.items():
            if model.trouble or model == have.get(name):
                continue
            try:
                self.put(name, model)
                self.keep(name)
            except ModelFolderError as error:
                self.remove(name)
                models[name] = model._replace(trouble=str(error))
        return models

    def put(self, name: str, model: Model) -> None:
        """Copy a model and put it in its place; `keep` or `undo` follows.

        Raises:
            ModelFolderError: a file cannot be read or written, or has changed meanwhile; the mirror is as it was.
        """
        draft = self._drafts / name
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            for path, file in model.files.items():
                if file == FOLDER:
                    (draft / path).mkdir()
                else:
                    if self._is_stopped:
                        raise ModelFolderError(f"model {name} is not copied: the copy was stopped")
                    _copy(self.source / name / path, draft / path, file)
            self.target.mkdir(parents=True, exist_ok=True)
            former = self._former(name)
            shutil.rmtree(former, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                (self.target / name).rename(former)
            draft.rename(self.target / name)
        except OSError as error:
            path = os.fsdecode(error.filename) if error.filename else str(draft)
            raise ModelFolderError(f"model {name} cannot be copied: {path}: {error.strerror}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def keep(self, name: str) -> None:
        """A model that was put stays: what it was is deleted."""
        shutil.rmtree(self._former(name), ignore_errors=True)

    def undo(self, name: str) -> None:
        """Put what a model was back in its place, or nothing where it is new."""
        self.remove(name)
        with contextlib.suppress(FileNotFoundError):
            self._former(name).rename(self.target / name)

    def remove(self, name: str) -> None:
        """Delete a model of the mirror."""
        path = self.target / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _former(self, name: str) -> Path:
        return self._drafts / f"{name}~"  # no model is named so


def _copy(source: Path, target: Path, file: File) -> None:
    shutil.copy2(source, target)
    found = source.stat()
    if (found.st_size, found.st_mtime_ns) != file:
        raise ModelFolderError(f"{source} has changed while it was copied")
