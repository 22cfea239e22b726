"""The table of kinds for tests that read messages and run nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from samphire_workers.intake.kinds import Kinds
from samphire_workers.lane.kinds import kinds_of


async def _never(request: Any) -> None:
    raise AssertionError(f"{request.task_id} is not to be run")


_ENDINGS: Any = SimpleNamespace(return_chord_part=_never, start_canvas=_never)
_DELIVERIES: Any = SimpleNamespace(run=_never, close_as=None)
KINDS = Kinds(kinds_of(_ENDINGS, _DELIVERIES))
