"""Django in front of Samphire, in one file, under a preforking server."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any
from uuid import UUID

import numpy as np
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.urls import path, reverse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST

from samphire import (
    Client,
    InvalidInputError,
    ResultTimeoutError,
    SamphireError,
    TransientError,
    WebhookVerificationError,
)
from samphire.webhooks import verify

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


def away_as_503(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """The broker is away, or a queue is full: the same request may succeed later."""

    def guarded(*arguments: Any, **named: Any) -> HttpResponse:
        try:
            return view(*arguments, **named)
        except (TransientError, ResultTimeoutError) as error:
            headers = {"Retry-After": str(math.ceil(error.retry_after_s or 1))}
            return JsonResponse({"error": str(error)}, status=503, headers=headers)

    return guarded


@require_POST
@away_as_503
def enqueue(request: HttpRequest) -> HttpResponse:
    """Queue an image and say where its answer will be."""
    try:
        task = client.submit("digits", {"image": image_of(json.loads(request.body))})
    except ValueError as error:  # no JSON, rows of several lengths, or the SDK's InvalidInputError
        return JsonResponse({"error": str(error)}, status=422)
    location = reverse("answer", args=[task.id])
    return JsonResponse({"task_id": task.id}, status=202, headers={"Location": location})


@require_GET
@away_as_503
def answer(_: HttpRequest, task_id: UUID) -> HttpResponse:
    """How far a task is, and its digit once it has succeeded; an id that nobody knows counts as queued."""
    task = client.task(str(task_id))
    answer: dict[str, Any] = {"task_id": task.id, "status": task.status()}
    if answer["status"] in ("queued", "scheduled", "running", "retrying"):
        return JsonResponse(answer)
    try:
        result = task.result(timeout_s=5)
    except ResultTimeoutError:  # the broker went away in between
        raise
    except SamphireError as error:  # what the task ended with
        return JsonResponse({**answer, "error": str(error)}, status=502)
    if result.model_name != "digits":
        raise Http404
    probabilities = result.outputs["probabilities"][0]
    found = {"digit": int(probabilities.argmax()), "probability": float(probabilities.max())}
    return JsonResponse({**answer, **found})


@csrf_exempt  # it is the signature that says who has sent it
@require_POST
def told(request: HttpRequest) -> HttpResponse:
    """Take a webhook: what is signed and new is handled once; whatever else comes is refused."""
    try:
        event = verify(request.body, request.headers, SECRETS)
    except WebhookVerificationError as error:
        return JsonResponse({"error": str(error)}, status=400)
    handled.setdefault(event.id, f"{event.type} {event.data.get('task_id')}")  # it may come again, under the same id
    return JsonResponse({"handled": len(handled)})


urlpatterns = [path("digits", enqueue), path("webhooks", told), path("digits/<uuid:task_id>", answer, name="answer")]
settings.configure(ALLOWED_HOSTS=["localhost", "127.0.0.1"], ROOT_URLCONF=__name__)
application = get_wsgi_application()
