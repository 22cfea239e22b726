"""What a running stack tells of its models, in a file of its data directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

RECORD = "models.json"
LOCK = "lock"
"""A stack holds it while it runs."""


class Record(NamedTuple):
    """What a running stack tells of its models, for the commands and workers of its machine."""

    triton: str
    """host:port of the gRPC endpoint."""
    source: str
    """The folder of models that is served."""
    is_own: bool
    """Whether that folder was named by the user; else it ships with Samphire."""
    troubles: dict[str, str]
    """Why models are not loaded, or not as they are in the folder, by name."""


def write_record(data_dir: Path, record: Record) -> None:
    """Tell it to whoever reads the data directory."""
    draft = data_dir / f"{RECORD}.{os.getpid()}.part"
    draft.unlink(missing_ok=True)
    draft.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
    draft.write_text(json.dumps(record._asdict(), indent=2) + "\n")
    draft.replace(data_dir / RECORD)


def read_record(data_dir: Path) -> Record | None:
    """What the stack of a data directory tells; None: none runs."""
    try:
        return Record(**json.loads((data_dir / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def running_record(data_dir: Path) -> Record | None:
    """What the stack of a data directory tells; None: none runs, whatever one that was killed has left."""
    try:
        with (data_dir / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_record(data_dir)
    except OSError:
        pass
    return None


def note_trouble(data_dir: Path, model: str, reason: str) -> None:
    """Tell why a model is not loaded as it is in its folder; an empty reason: it is. Nothing is told on a full disk."""
    with contextlib.suppress(OSError):
        _note(data_dir, model, reason)


def _note(data_dir: Path, model: str, reason: str) -> None:
    record = read_record(data_dir)
    if record is None:
        return
    troubles = {name: why for name, why in record.troubles.items() if name != model}
    if reason:
        troubles[model] = reason
    if troubles != record.troubles:
        write_record(data_dir, record._replace(troubles=troubles))
