"""FastAPI in front of Samphire: no request waits for a model, and one client serves all of them."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from samphire import AsyncClient, ResultTimeoutError, SamphireError, TransientError, WebhookVerificationError
from samphire.webhooks import verify

SECRETS = os.environ.get("WEBHOOK_SECRETS", "").split()
"""As `samphire webhooks endpoints add` has shown them; several while one replaces another."""
handled: dict[str, str] = {}
"""Ids of webhooks and what they told; in an application a table with the id as its key."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for each server process, closed at its end."""
    async with AsyncClient() as client:  # SAMPHIRE_BROKER_URL
        app.state.samphire = client
        yield


app = FastAPI(lifespan=lifespan)


class Digit(BaseModel):
    """What is posted: 8 rows of 8 numbers from 0 to 1."""

    image: list[list[Annotated[float, Field(ge=0, le=1)]]]


@app.exception_handler(RequestValidationError)
async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
    """Not what `Digit` says; FastAPI's own answer repeats the input, and cannot where that is NaN."""
    first = error.errors()[0]
    return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)


@app.exception_handler(TransientError)
@app.exception_handler(ResultTimeoutError)
async def away(_: Request, error: SamphireError) -> JSONResponse:
    """The broker is away, or a queue is full: the same request may succeed later."""
    return JSONResponse({"error": str(error)}, 503, {"Retry-After": str(math.ceil(error.retry_after_s or 1))})


@app.post("/digits", status_code=202)
async def enqueue(digit: Digit, request: Request, response: Response) -> Any:
    """Queue an image and say where its answer will be."""
    try:
        image = np.array([digit.image], dtype=np.float32)
        task = await request.app.state.samphire.submit("digits", {"image": image})
    except ValueError as error:  # rows of several lengths, or the SDK's InvalidInputError
        return JSONResponse({"error": str(error)}, 422)
    response.headers["Location"] = f"/digits/{task.id}"
    return {"task_id": task.id}


@app.get("/digits/{task_id:uuid}")
async def answer(task_id: UUID, request: Request) -> Any:
    """How far a task is, and its digit once it has succeeded; an id that nobody knows counts as queued."""
    task = request.app.state.samphire.task(str(task_id))
    answer: dict[str, Any] = {"task_id": task.id, "status": await task.status()}
    if answer["status"] in ("queued", "scheduled", "running", "retrying"):
        return answer
    try:
        result = await task.result(timeout_s=5)
    except ResultTimeoutError:  # the broker went away in between
        raise
    except SamphireError as error:  # what the task ended with
        return JSONResponse({**answer, "error": str(error)}, 502)
    if result.model_name != "digits":
        raise HTTPException(404, "no digit")
    probabilities = result.outputs["probabilities"][0]
    return {**answer, "digit": int(probabilities.argmax()), "probability": float(probabilities.max())}


@app.post("/webhooks")
async def told(request: Request) -> Any:
    """Take a webhook: what is signed and new is handled once; whatever else comes is refused."""
    try:
        event = verify(await request.body(), request.headers, SECRETS)
    except WebhookVerificationError as error:
        return JSONResponse({"error": str(error)}, 400)
    handled.setdefault(event.id, f"{event.type} {event.data.get('task_id')}")  # it may come again, under the same id
    return {"handled": len(handled)}
