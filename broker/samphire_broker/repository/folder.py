"""A folder of models as it lies on the disk: what each model has, and what stands in the way of serving it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from samphire.errors import InvalidInputError
from samphire.wire.contract import check_model_name

CONFIG = "config.pbtxt"
LAYOUT = "a folder for each model, with config.pbtxt and a folder for each version (1, 2, …)"


class ModelFolderError(Exception):
    """A folder of models cannot be read or copied; the message names the path and the reason."""


class File(NamedTuple):
    """What tells a file from what it was."""

    size: int
    """In bytes."""
    mtime_ns: int
    """When it was last changed, in ns since 1970."""


FOLDER = File(0, 0)
"""Stands for a folder: when it was changed says nothing that its files do not."""


class Model(NamedTuple):
    """One model's files and folders, by their paths within its folder; those of folders end with a slash."""

    files: dict[str, File]
    trouble: str = ""
    """Why it cannot be served; empty: nothing is known that stands in the way."""


def look(folder: Path) -> dict[str, Model]:
    """The models of a folder by name, links followed; names that begin with a dot, and caches of Python, left out.

    Raises:
        ModelFolderError: it cannot be read, or holds no models.
    """
    try:
        models = {plain(path.name): _model(path) for path in _listed(folder) if path.is_dir() or path.is_symlink()}
        has_config = (folder / CONFIG).exists()
    except OSError as error:
        raise ModelFolderError(f"{folder} cannot be read: {error.strerror}") from error
    if has_config or (models and all(name.isdecimal() for name in models)):
        raise ModelFolderError(f"{folder} is itself a model: expected the folder above it, which has {LAYOUT}")
    if not models:
        raise ModelFolderError(f"{folder} has no models: expected {LAYOUT}")
    return models


def mirrored(folder: Path) -> dict[str, Model]:
    """The models of a mirror, which may have none."""
    return {path.name: _model(path) for path in _listed(folder)} if folder.is_dir() else {}


def plain(text: str) -> str:
    """A name or message of the file system as text that UTF-8 can hold."""
    return text.encode(errors="backslashreplace").decode()


def ignored_versions(model: Model) -> list[str]:
    """Folders that look like versions and that Triton leaves out without a word: numbers that begin with 0."""
    folders = {path.split("/")[0] for path in model.files if "/" in path}
    return sorted(name for name in folders if name.isdecimal() and name.startswith("0"))


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not _is_left_out(path.name))


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _model(folder: Path) -> Model:
    try:
        check_model_name(folder.name)
        return Model(dict(_files(folder, "", ())))
    except InvalidInputError as error:
        return Model({}, plain(f"the name of {folder} is none for a model: {error}"))
    except OSError as error:
        return Model({}, plain(f"{os.fsdecode(error.filename or folder)} cannot be read: {error.strerror}"))
    except ModelFolderError as error:
        return Model({}, plain(str(error)))


def _files(folder: Path, within: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, File]]:
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise ModelFolderError(f"{folder} is no folder: expected one with config.pbtxt and a folder for each version")
    here = (found.st_dev, found.st_ino)
    if here in above:
        raise ModelFolderError(f"{folder} is a link to a folder that it lies in: it has no end")
    with os.scandir(folder) as entries:
        listed = sorted(entry.name for entry in entries if not _is_left_out(entry.name))
    for name in listed:
        path = folder / name
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            yield f"{within}{name}/", FOLDER
            yield from _files(path, f"{within}{name}/", (*above, here))
        elif stat.S_ISREG(info.st_mode):
            if not os.access(path, os.R_OK):
                raise ModelFolderError(f"{path} cannot be read: Permission denied")
            yield f"{within}{name}", File(info.st_size, info.st_mtime_ns)
        else:
            raise ModelFolderError(f"{path} is no regular file: expected files and folders only")
