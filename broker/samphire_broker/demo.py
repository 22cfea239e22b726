"""`samphire demo`: the main job on real input, once through the SDK and once by plain Celery."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import time
from typing import Any

import click
import numpy as np
from aiohttp import web
from celery import Celery
from numpy.typing import NDArray

from samphire import AsyncClient, InvalidInputError, SamphireError, Step, WebhookVerificationError
from samphire.webhooks import WebhookEvent, verify
from samphire.wire.contract import INFER_TASK
from samphire.wire.keys import INTAKE
from samphire_broker.digits import Digits
from samphire_broker.embedded.stack import Stack, serve
from samphire_broker.webhooks.endpoint import Endpoint
from samphire_broker.webhooks.registry import open_registry

ROUNDS = 6
"""How often the held-out images go through, one task an image, to have something to time."""
LATENCY_TASKS = 50
DRAWN = 4
SHADES = " .:-=+*#%@"
TIMEOUT_S = 60.0
STREAMED = "Partial results come from the queue as they are made – and a stream says truthfully how it ends."

OWN_MODEL = "ink"
OWN_CONFIG = """
name: "ink" backend: "python" max_batch_size: 64
input [ { name: "image", data_type: TYPE_FP32, dims: [ 8, 8 ] } ]
output [ { name: "ink", data_type: TYPE_FP32, dims: [ 1 ] } ]
"""
OWN_CODE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        sums = [image.sum(axis=(1, 2)).reshape(-1, 1) for image in images]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("ink", ink)]) for ink in sums]
"""


async def show(stack: Stack, digits: Digits, *, keep: bool) -> None:
    """Classify held-out digits, draw some, and show what an error looks like.

    Args:
        stack: that runs.
        digits: to be classified.
        keep: let it run until a signal comes.

    Raises:
        SamphireError: a task failed that must not.
    """
    images, labels = digits.held_out_images, digits.held_out_labels
    async with AsyncClient(stack.broker_url) as client, contextlib.AsyncExitStack() as begun:
        first = await client.submit("digits", {"image": images[:1]})
        await first.result(timeout_s=TIMEOUT_S)
        # Its files have to be still for a second before it is loaded: the others go on meanwhile.
        own = asyncio.create_task(_own_model(client, stack, images)) if stack.watches_models else None
        if own is not None:
            begun.push_async_callback(_ended, own)
        await _classify(client, images, labels)
        await _draw(client, images, labels)
        await asyncio.to_thread(_plain_celery, stack.broker_url, images[0], int(labels[0]))
        await _chain(client, images, labels)
        await _stream(client)
        await _webhook(client, stack, images)
        if own is not None:
            click.echo(await own)
        await _bad_request(client)
        await _dead_letter(client)
    hint = "" if keep else "; --keep leaves it running"
    click.echo(f"\nFlower shows the tasks: {stack.flower_url} (password in {stack.flower_password_file}{hint})")
    if keep:
        click.echo(
            f"\nThe stack goes on: SAMPHIRE_BROKER_URL={stack.broker_url} SAMPHIRE_TRITON_URLS={stack.triton_grpc}"
        )
        await serve(stack)


async def _ended(task: asyncio.Task[str]) -> None:
    """End what was begun beside; what it has raised was told, or another error goes before."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


async def _classify(client: AsyncClient, images: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    count = len(images) * ROUNDS
    click.echo(f"\n{len(images)} held-out images, {ROUNDS} times, one task an image:")
    right, began = 0, time.perf_counter()
    inputs = ({"image": images[i % len(images)][np.newaxis]} for i in range(count))
    number = 0
    async for result in client.map("digits", inputs):
        right += int(result.outputs["probabilities"].argmax() == labels[number % len(labels)])
        number += 1
    elapsed_s = time.perf_counter() - began
    latencies_ms = []
    for i in range(LATENCY_TASKS):
        began = time.perf_counter()
        task = await client.submit("digits", {"image": images[i : i + 1]})
        await task.result(timeout_s=TIMEOUT_S)
        latencies_ms.append((time.perf_counter() - began) * 1000)
    click.echo(f"accuracy: {right / count:.4f}")
    click.echo(f"requests/s: {count / elapsed_s:,.0f} (submit to result)")
    click.echo(f"p50: {np.median(latencies_ms):.2f} ms (one at a time)")


async def _draw(client: AsyncClient, images: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    click.echo()
    chosen = images[:DRAWN]
    task = await client.submit("digits", {"image": chosen})
    probabilities = (await task.result(timeout_s=TIMEOUT_S)).outputs["probabilities"]
    for row in range(8):
        click.echo("   ".join("".join(SHADES[round(float(v) * 9)] * 2 for v in image[row]) for image in chosen))
    said = (f"says {p.argmax()} ({p.max():.0%}), is {label}" for p, label in zip(probabilities, labels, strict=False))
    click.echo("   ".join(f"{text:<16}" for text in said))


def _plain_celery(broker_url: str, image: NDArray[np.float32], label: int) -> None:
    """What an application without the SDK does: only Celery, and JSON lists."""
    app = Celery("plain", broker=broker_url, backend=broker_url)
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8], "data": image.ravel().tolist()}
    with app:
        sent = app.send_task(INFER_TASK, kwargs={"model_name": "digits", "inputs": [tensor]}, queue=INTAKE)
        answer: dict[str, Any] = sent.get(timeout=TIMEOUT_S)
    said = int(np.argmax(answer["outputs"][0]["data"]))
    click.echo(f"\nplain Celery: send_task({INFER_TASK!r}, queue={INTAKE!r}) says {said}, is {label}")


async def _chain(client: AsyncClient, images: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    """Two versions of a model side by side, and one model more that joins what they say."""
    first, second = (Step("digits", {"image": images[1:2]}, version=version) for version in (1, 2))
    joined = Step("identity", {"input_fp32": [first["probabilities"], second["probabilities"]]})
    task = await client.chain([first, second], joined)
    probabilities = (await task.result(timeout_s=TIMEOUT_S)).outputs["output_fp32"]
    said = ", ".join(f"version {n} says {p.argmax()} ({p.max():.0%})" for n, p in enumerate(probabilities, 1))
    click.echo(f"a chain, digits 1 + digits 2 -> identity: {said}, is {labels[1]}")


async def _stream(client: AsyncClient) -> None:
    """A text that comes word by word, as of a language model."""
    inputs = {"text": np.array([STREAMED.encode()], dtype=object), "delay_ms": np.array([25], np.int32)}
    task = await client.submit("token_stream", inputs)
    decoder = codecs.getincrementaldecoder("utf-8")()
    click.echo("\na stream: ", nl=False)
    count = 0
    async for event in task.stream():
        if event.kind != "output":
            raise SamphireError(f"the stream had a {event.kind} although nothing went wrong")
        click.echo(decoder.decode(event.outputs["token"][0]), nl=False)
        count += 1
    end = [event async for event in client.task(task.id).events()][-1]
    click.echo(f" ({count} outputs of {end.output_count})")
    if count != end.output_count:
        raise SamphireError("the stream is not whole")


class _Receiver:
    """A small web server on loopback, which verifies what it gets."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self.event: asyncio.Future[WebhookEvent] = asyncio.get_running_loop().create_future()

    async def take(self, request: web.BaseRequest) -> web.Response:
        """Answer one request."""
        try:
            event = verify(await request.read(), request.headers, self._secret)
        except WebhookVerificationError as error:
            return web.Response(status=400, text=str(error))
        if not self.event.done():
            self.event.set_result(event)
        return web.Response(text="thanks")


async def _webhook(client: AsyncClient, stack: Stack, images: NDArray[np.float32]) -> None:
    """Who has submitted may forget the task: a signed webhook tells of its end."""
    with open_registry(stack.settings()) as registry:
        url = f"http://127.0.0.1:{stack.webhook_port}/hook"
        (secret,) = registry.add(Endpoint("demo", url, result_bytes=4096), "v1").secrets
        receiver = _Receiver(secret)
        runner = web.ServerRunner(web.Server(receiver.take))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", stack.webhook_port).start()
            task = await client.submit("digits", {"image": images[:1]}, webhook="demo")
            event = await asyncio.wait_for(receiver.event, TIMEOUT_S)
        finally:
            await runner.cleanup()
            registry.remove("demo")
    if event.data["task_id"] != task.id:
        raise SamphireError("the webhook tells of another task")
    outputs = event.data["result"]["outputs"]
    click.echo(
        f"\na webhook, verified by its receiver: {event.type}, its result has {outputs[0]['name']}, id {event.id}"
    )


async def _own_model(client: AsyncClient, stack: Stack, images: NDArray[np.float32]) -> str:
    """A model that is dropped into the watched folder answers, without a restart."""
    folder = stack.model_folder / OWN_MODEL
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(OWN_CONFIG)
    (folder / "1" / "model.py").write_text(OWN_CODE)
    began = time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S):
        while not any(model.name == OWN_MODEL and model.signature for model in await client.models.list()):
            await asyncio.sleep(0.1)
    task = await client.submit(OWN_MODEL, {"image": images[:1]})
    ink = float((await task.result(timeout_s=TIMEOUT_S)).outputs["ink"][0, 0])
    took_s = time.perf_counter() - began
    if abs(ink - float(images[0].sum())) > 1e-3:
        raise SamphireError(f"the model of one's own says {ink}, expected {images[0].sum()}")
    return f"\na model of one's own, dropped into {folder}, answers {took_s:.1f} s later: {ink:.1f}"


async def _bad_request(client: AsyncClient) -> None:
    try:
        await client.submit("digits", {"image": np.zeros((1, 7, 7), np.float32)})
    except InvalidInputError as error:
        click.echo(f"\na bad request is not even queued: {type(error).__name__}: {error}")
    else:
        raise SamphireError("a request of the wrong shape was queued")


async def _dead_letter(client: AsyncClient) -> None:
    """A request that only the model itself can find wrong: it fails, and its message is kept."""
    task = await client.submit("normalize_text", {"text": np.array([[b"\xff is no UTF-8"]], dtype=object)})
    try:
        await task.result(timeout_s=TIMEOUT_S)
    except SamphireError as error:
        click.echo(f"a failure of the model: {type(error).__name__}: {error}")
    else:
        raise SamphireError("bytes that are no UTF-8 were normalized")
    letter = await client.dead_letters.get(task.id)
    click.echo(
        f"its dead letter: reason {letter.reason}, {len(letter.message or b'')} bytes as sent; it can be redriven"
    )
