"""The table of the kinds of task that a lane runs."""

from __future__ import annotations

from samphire.wire.contract import CANVAS_TASK, CHORD_PART_TASK, INFER_TASK
from samphire_workers.intake.reading import read_canvas_start, read_chord_part, read_inference
from samphire_workers.intake.request import Kind
from samphire_workers.settlement.endings import Endings


def kinds_of(endings: Endings) -> list[Kind]:
    """The kinds that Samphire has; `endings` runs its errands."""
    return [
        Kind(INFER_TASK, read_inference, run=None),
        Kind(CHORD_PART_TASK, read_chord_part, endings.return_chord_part, is_errand=True),
        Kind(CANVAS_TASK, read_canvas_start, endings.start_canvas, is_errand=True),
    ]
