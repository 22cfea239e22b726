"""The Celery application: `celery -A samphire_workers.app worker`.

The stock consumer serves `samphire.control` alone. Inference queues belong to the lane: on Redis the
stock consumer loses messages when it is killed, and is many times slower.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from celery import Celery

from samphire.errors import InvalidInputError
from samphire.wire.contract import INFER_TASK
from samphire_broker.queues import control, intake
from samphire_broker.settings import read_settings
from samphire_workers import control as control_commands
from samphire_workers import worker_log
from samphire_workers.bootstep import LaneStep
from samphire_workers.celery_settings import celery_settings, refuse_other_addresses

try:
    refuse_other_addresses(os.environ)
    _settings = read_settings()
except InvalidInputError as _error:
    sys.exit(f"samphire: {_error}")  # the command that loads this application is to end with a line, not a traceback

app = Celery("samphire")
app.conf.update(
    **celery_settings(_settings.broker),
    result_expires=_settings.result_ttl_s,
    # A part may wait as long as anything does: in a queue, for its time, as a dead letter that is redriven.
    result_chord_expires=max(_settings.result_ttl_s, _settings.dead_letter_ttl_s),
    task_serializer="json",
    result_serializer="json",
    accept_content=["json"],
    task_queues=[control()],
    task_routes={INFER_TASK: {"queue": intake()}},
    worker_pool="solo",
    worker_send_task_events=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_channel_error_retry=True,  # a broker that refuses writes for a while (a replica, NOREPLICAS) ends no worker
)
app.steps["worker"].add(LaneStep)
assert control_commands and worker_log  # importing them is what takes effect


@app.task(name=INFER_TASK, shared=False)  # type: ignore[untyped-decorator]
def infer(*_args: Any, **_kwargs: Any) -> NoReturn:
    """Registered under its name for producers and `inspect`; the lane serves it, never this body."""
    raise RuntimeError(f"{INFER_TASK} reached the stock consumer: send it to an inference queue")
