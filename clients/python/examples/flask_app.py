"""Flask in front of Samphire, under a preforking server."""

from __future__ import annotations

import math
import os
from typing import Any
from uuid import UUID

import numpy as np
from flask import Flask, abort, request, url_for

from samphire import (
    Client,
    InvalidInputError,
    ResultTimeoutError,
    SamphireError,
    TransientError,
    WebhookVerificationError,
)
from samphire.webhooks import verify

app = Flask(__name__)
client = Client()  # SAMPHIRE_BROKER_URL; each worker process connects with its first use

SECRETS = os.environ.get("WEBHOOK_SECRETS", "").split()
"""As `samphire webhooks endpoints add` has shown them; several while one replaces another."""
handled: dict[str, str] = {}
"""Ids of webhooks and what they told; in an application a table with the id as its key."""


def image_of(body: Any) -> Any:
    """The image as the model takes it, 8 rows of 8 numbers from 0 to 1; the SDK says what is wrong with others."""
    if not isinstance(body, dict) or "image" not in body:
        raise InvalidInputError('expected JSON {"image": 8 lists of 8 numbers}')
    image = np.array([body["image"]])
    if image.dtype.kind not in "iuf":
        return image
    if not ((image >= 0) & (image <= 1)).all():
        raise InvalidInputError("expected numbers from 0 to 1")
    return image.astype(np.float32)


@app.errorhandler(TransientError)
@app.errorhandler(ResultTimeoutError)
def away(error: SamphireError) -> Any:
    """The broker is away, or a queue is full: the same request may succeed later."""
    return {"error": str(error)}, 503, {"Retry-After": str(math.ceil(error.retry_after_s or 1))}


@app.post("/digits")
def enqueue() -> Any:
    """Queue an image and say where its answer will be."""
    try:
        task = client.submit("digits", {"image": image_of(request.get_json(silent=True))})
    except ValueError as error:  # rows of several lengths, or the SDK's InvalidInputError
        return {"error": str(error)}, 422
    return {"task_id": task.id}, 202, {"Location": url_for("answer", task_id=task.id)}


@app.get("/digits/<uuid:task_id>")
def answer(task_id: UUID) -> Any:
    """How far a task is, and its digit once it has succeeded; an id that nobody knows counts as queued."""
    task = client.task(str(task_id))
    answer: dict[str, Any] = {"task_id": task.id, "status": task.status()}
    if answer["status"] in ("queued", "scheduled", "running", "retrying"):
        return answer
    try:
        result = task.result(timeout_s=5)
    except ResultTimeoutError:  # the broker went away in between
        raise
    except SamphireError as error:  # what the task ended with
        return {**answer, "error": str(error)}, 502
    if result.model_name != "digits":
        abort(404)
    probabilities = result.outputs["probabilities"][0]
    return {**answer, "digit": int(probabilities.argmax()), "probability": float(probabilities.max())}


@app.post("/webhooks")
def told() -> Any:
    """Take a webhook: what is signed and new is handled once; whatever else comes is refused."""
    try:
        event = verify(request.get_data(), request.headers, SECRETS)
    except WebhookVerificationError as error:
        return {"error": str(error)}, 400
    handled.setdefault(event.id, f"{event.type} {event.data.get('task_id')}")  # it may come again, under the same id
    return {"handled": len(handled)}
