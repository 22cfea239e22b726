"""A Celery task that hands its work on to Samphire, with the SDK, in a prefork pool."""

from __future__ import annotations

import os

import numpy as np
from celery import Celery

from samphire import Client, TransientError

BROKER_URL = os.environ.get("SAMPHIRE_BROKER_URL", "redis://localhost:6379/0")

app = Celery("celery_producer", broker=BROKER_URL, backend=BROKER_URL)
app.conf.task_default_queue = "examples"  # a queue of this application's own worker
client = Client(BROKER_URL)  # made before the pool forks; each child connects with its first use


@app.task(autoretry_for=(TransientError,), retry_backoff=True)
def recognize(image: list[list[float]]) -> str:
    """Queue one image, 8 rows of 8 numbers from 0 to 1; returns the id of Samphire's task without waiting for it."""
    return client.submit("digits", {"image": np.array([image], dtype=np.float32)}).id
