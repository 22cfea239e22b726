"""The table of the kinds of task that a lane runs."""

from __future__ import annotations

from samphire.wire.contract import CANVAS_TASK, CHORD_PART_TASK, DELIVER_TASK, INFER_TASK
from samphire.wire.keys import WEBHOOKS
from samphire_workers.intake.reading import read_canvas_start, read_chord_part, read_delivery, read_inference
from samphire_workers.intake.request import Kind
from samphire_workers.settlement.endings import Endings
from samphire_workers.webhooks.deliveries import Deliveries


def kinds_of(endings: Endings, deliveries: Deliveries) -> list[Kind]:
    """The kinds that Samphire has; `endings` runs its errands, `deliveries` its webhooks."""
    return [
        Kind(INFER_TASK, read_inference, run=None),
        Kind(CHORD_PART_TASK, read_chord_part, endings.return_chord_part, is_errand=True),
        Kind(CANVAS_TASK, read_canvas_start, endings.start_canvas, is_errand=True),
        Kind(DELIVER_TASK, read_delivery, deliveries.run, queue=WEBHOOKS, ends_itself=True, close=deliveries.close_as),
    ]
