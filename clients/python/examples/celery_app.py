"""A plain Celery application as a producer; it needs nothing of Samphire's.

>>> recognize(pixels).get(timeout=10)["outputs"]
>>> recognize_and_copy(pixels).get(timeout=10)["outputs"]
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from celery import Celery
from celery.canvas import Signature, chain
from celery.result import AsyncResult

BROKER_URL = os.environ.get("SAMPHIRE_BROKER_URL", "redis://localhost:6379/0")

app = Celery("celery_app", broker=BROKER_URL, backend=BROKER_URL)


def _digits(pixels: Sequence[float]) -> dict[str, object]:
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": list(pixels)}
    return {"model_name": "digits", "inputs": [tensor]}


def recognize(pixels: Sequence[float]) -> AsyncResult:
    """Queue one image, 64 numbers from 0 to 1, by the name of Samphire's task."""
    return app.send_task("samphire.infer", queue="inference", kwargs=_digits(pixels))


def recognize_and_copy(pixels: Sequence[float]) -> AsyncResult:
    """Queue a chain: the second model takes an output of the first, which does not come back here in between."""
    copied: dict[str, object] = {"model_name": "identity", "inputs": [{"name": "input_fp32", "from": "probabilities"}]}
    return chain(_infer(_digits(pixels)), _infer(copied)).apply_async()


def _infer(request: dict[str, object]) -> Signature:
    return app.signature("samphire.infer", queue="inference", kwargs=request)
