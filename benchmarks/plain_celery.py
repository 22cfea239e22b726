"""What one would write without Samphire: a plain Celery task that forwards to Triton.

Broker and result backend are the same Valkey; threads and prefork are both measured.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from celery import Celery
from tritonclient.grpc import InferenceServerClient, InferInput

QUEUE = "plain"

app = Celery("plain", broker=os.environ["BENCH_BROKER_URL"], backend=os.environ["BENCH_BROKER_URL"])
app.conf.update(
    task_default_queue=QUEUE,
    task_acks_late=True,
    worker_prefetch_multiplier=8,
    worker_send_task_events=True,
    task_send_sent_event=False,
    broker_connection_retry_on_startup=True,
)
_local = threading.local()


def _client() -> InferenceServerClient:
    if not hasattr(_local, "client"):
        _local.client = InferenceServerClient(os.environ["BENCH_TRITON_URL"])
    return _local.client


@app.task(name="plain.infer")  # type: ignore[untyped-decorator]
def infer(values: list[list[float]]) -> Any:
    """Send FP32 [1,16] to `identity` and return what comes back, as JSON lists."""
    array = np.array(values, dtype=np.float32)
    tensor = InferInput("input_fp32", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return _client().infer("identity", [tensor]).as_numpy("output_fp32").tolist()
