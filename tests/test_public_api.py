"""What users of the SDK rely on: its names, its parameters, its types as a type checker sees them from outside."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import samphire
from samphire.client.sync_parts import DeadLetters
from tests.stacks import ENDS_S

CHANGED = "the public surface changed: change the test only together with the docs"

ERRORS = """
BrokerMemoryFullError(TransientError)
BrokerRightError(SamphireError)
BrokerUnavailableError(TransientError, ConnectionError)
ClientClosedError(SamphireError)
EndpointTimeoutError(TransientError, TimeoutError)
EndpointUnavailableError(TransientError)
IdempotencyConflictError(InvalidInputError)
InternalError(SamphireError)
InvalidInputError(SamphireError, ValueError)
LetterGoneError(SamphireError)
LetterRefusedError(SamphireError)
ModelFaultError(SamphireError)
PayloadTooLargeError(InvalidInputError)
ProtocolError(SamphireError)
QueueFullError(TransientError)
ResultDeletedError(TaskGoneError)
ResultExpiredError(TaskGoneError)
ResultTimeoutError(SamphireError, TimeoutError)
SamphireError(Exception)
StreamDiffersError(SamphireError)
StreamLimitError(ModelFaultError)
TaskCancelledError(TaskGoneError)
TaskExpiredError(TaskGoneError)
TaskGoneError(SamphireError)
TransientError(SamphireError)
UnknownModelError(InvalidInputError)
UnknownTaskError(SamphireError)
WebhookVerificationError(SamphireError)
WorkerCrashError(SamphireError)
"""

CLASSES = """
AsyncClient(broker_url=, *, namespace=, celery_key_prefix=, tenant=, queue_limit=, inline_limit_bytes=, \
max_request_bytes=, blob_ttl_s=, idempotency_ttl_s=, validate=)
    async chain(*stages, priority=, eta=, delay_s=, deadline_s=, webhook=)
    async close()
    dead_letters
    async for map(model, batches, *, return_exceptions=, progress=, window=, window_bytes=, version=, priority=, \
outputs=, parameters=, deadline_s=, webhook=)
    models
    async prepare(model, inputs, **options)
    async signature(model)
    async submit(model, inputs, *, version=, priority=, outputs=, parameters=, eta=, delay_s=, deadline_s=, \
idempotency_key=, max_attempts=, backoff=, collect=, webhook=)
    async submit_prepared(prepared, *, once_s=)
    task(task_id)
    webhooks
AsyncTask
    async cancel(timeout_s=)
    async for events(after=)
    async progress()
    async result(timeout_s=, *, delete=)
    async status(*, detail=)
    async for stream(after=, *, resume=)
Attempt(at, worker, error, traceback=)
Backoff(base_s=, cap_s=, jitter=)
Client(broker_url=, *, namespace=, celery_key_prefix=, tenant=, queue_limit=, inline_limit_bytes=, \
max_request_bytes=, blob_ttl_s=, idempotency_ttl_s=, validate=)
    chain(*stages, priority=, eta=, delay_s=, deadline_s=, webhook=)
    close()
    dead_letters
    map(model, batches, *, return_exceptions=, progress=, window=, window_bytes=, version=, priority=, outputs=, \
parameters=, deadline_s=, webhook=)
    models
    prepare(model, inputs, **options)
    signature(model)
    submit(model, inputs, *, version=, priority=, outputs=, parameters=, eta=, delay_s=, deadline_s=, \
idempotency_key=, max_attempts=, backoff=, collect=, webhook=)
    submit_prepared(prepared, *, once_s=)
    task(task_id)
    webhooks
DeadLetter(id, task_id, model, queue, reason, error, attempts, worker, died_at, run=, history=, message=, refusals=)
DeliveryAttempt(at, error=, status=, ms=, answer=)
InferResult(task_id, model_name, model_version, outputs, output_count=, timings=)
LetterFilter(model=, reason=, since=, until=)
    fits(letter)
ModelSignature(name, versions, inputs, outputs, max_batch_size, decoupled=, dynamic_batching=, sequence_batching=)
    champion
    check(request)
    resolve(version)
Output(step, name)
PreparedTask(id, queue, priority, message, stream, blobs=, key=)
ServedModel(name, signature, trouble=)
Step(model, inputs, *, version=, outputs=, parameters=)
    __getitem__(output)
Task
    cancel(timeout_s=)
    events(after=)
    progress()
    result(timeout_s=, *, delete=)
    status(*, detail=)
    stream(after=, *, resume=)
TaskDetail(status, why=, queue=, ahead=, attempts=, next_at=, worker=, running_s=, is_known=)
TaskEvent(task_id, kind, status, at, position, run=, attempt=, seq=, outputs=, index=, fraction=, message=, \
output_count=, output_bytes=, requested=, earliest=, latest=, begins_anew=)
TensorSpec(name, datatype, shape, optional=)
Timings(*, settled_at, queued_s=, waited_s, triton_s, triton_queue_s=, triton_compute_s=, settling_s, attempts, \
batch_size, worker)
    claimed_at
    submitted_at
WebhookDelivery(id, event, run, state, attempts=, next_at=)
WebhookEndpoint(name, disabled)
"""

HANDLES = ("AsyncTask", "Task")
"""Users get these and never make one."""


def public_classes(*, errors: bool) -> list[type]:
    classes = [getattr(samphire, name) for name in samphire.__all__]
    assert all(map(inspect.isclass, classes)), "a public function: show it in this test"
    return [each for each in classes if issubclass(each, samphire.SamphireError) == errors]


def members(owner: type) -> dict[str, object]:
    """Public methods and properties of a class's own."""
    return {
        name: member
        for name, member in sorted(vars(owner).items())
        if (not name.startswith("_") or name == "__getitem__")
        and (inspect.isfunction(member) or isinstance(member, property))
    }


def parameters(function: object) -> str:
    """Names and kinds, and which may be left out."""
    assert callable(function)
    own = [each for name, each in inspect.signature(function).parameters.items() if name != "self"]
    plain = [
        each.replace(annotation=each.empty, default=each.empty if each.default is each.empty else "") for each in own
    ]
    return str(inspect.Signature(plain)).replace("=''", "=")


def shown(name: str, member: object) -> str:
    """One line of the snapshot."""
    if isinstance(member, property):
        return name
    waits = (
        "async " if inspect.iscoroutinefunction(member) else "async for " if inspect.isasyncgenfunction(member) else ""
    )
    return f"{waits}{name}{parameters(member)}"


def test_names_are_locked() -> None:
    """`samphire.__all__` is what the two lists below show, and sorted."""
    listed = re.findall(r"^\w+", ERRORS + CLASSES, re.MULTILINE)
    assert samphire.__all__ == sorted(listed), CHANGED


def test_errors_are_locked() -> None:
    """Their places in the tree, and one way to make them all."""
    lines = []
    for each in public_classes(errors=True):
        lines.append(f"{each.__name__}({', '.join(base.__name__ for base in each.__bases__)})")
        assert parameters(each.__init__) == "(message=, *, retry_after_s=)", CHANGED
        assert isinstance(each.retryable, bool)
    assert "\n".join(lines) == ERRORS.strip(), CHANGED


def test_classes_are_locked() -> None:
    """Methods and parameters, and which of them have defaults."""
    lines = []
    for each in public_classes(errors=False):
        lines.append(each.__name__ + ("" if each.__name__ in HANDLES else parameters(each)))
        lines += [f"    {shown(name, member)}" for name, member in members(each).items()]
    assert "\n".join(lines) == CLASSES.strip(), CHANGED


@pytest.mark.parametrize("owner", [samphire, *(getattr(samphire, name) for name in samphire.__all__)], ids=str)
def test_everything_public_has_a_docstring(owner: type) -> None:
    """Of its own, written by hand: that of a dataclass is no docstring."""
    assert owner.__doc__ and not owner.__doc__.startswith(f"{owner.__name__}(")
    for name, member in members(owner).items() if inspect.isclass(owner) else ():
        assert name == "__getitem__" or (member.__doc__ and member.__doc__.strip()), name


def test_a_blocking_users_help_has_the_whole_text() -> None:
    """Not only where else to look."""
    for blocking in (samphire.Client, samphire.Task, DeadLetters):
        for name, member in members(blocking).items():
            told = inspect.getdoc(member) or ""
            assert not told.startswith("See `"), name
    for method in (samphire.Client.submit, samphire.Client.map, samphire.Task.result):
        assert "Raises:" in (inspect.getdoc(method) or "") and "Args:" in (inspect.getdoc(method) or "")


RIGHT = """
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, assert_type

import numpy as np
from numpy.typing import NDArray

from samphire import (
    AsyncClient, AsyncTask, Client, InferResult, InvalidInputError, ModelSignature, Output, QueueFullError,
    SamphireError, Step, Task, TaskEvent, TransientError,
)

Status = Literal["queued", "scheduled", "running", "retrying", "succeeded", "failed", "cancelled", "expired"]
Image = NDArray[np.float32]


def batches(images: list[Image]) -> Iterator[dict[str, Image]]:
    for image in images:
        yield {"image": image}


def tell(done: int, total: int | None) -> None: ...


def blocking(images: list[Image]) -> int:
    with Client("redis://localhost:6379/0", tenant="acme") as client:
        assert_type(client, Client)
        task = client.submit("digits", {"image": images[0]}, version=2, priority="high", deadline_s=1.5)
        assert_type(task, Task)
        assert_type(task.id, str)
        assert_type(task.status(), Status)
        assert_type(task.cancel(), bool)
        client.submit("digits", {"image": [[0.5]]}, eta=datetime.now(UTC), parameters={"micro_batch": False})
        result = task.result(timeout_s=10, delete=True)
        assert_type(result, InferResult)
        assert_type(result.outputs, Mapping[str, NDArray[Any]])
        for event in task.events(after="queued"):
            assert_type(event, TaskEvent)
            assert_type(event.status, Status)
        for one in client.map("digits", batches(images), progress=tell):
            assert_type(one, InferResult)
        for either in client.map("digits", batches(images), return_exceptions=True):
            assert_type(either, InferResult | SamphireError)
        seen = Step("digits", {"image": images[0]})
        assert_type(seen["probabilities"], Output)
        kept = Step("identity", {"input_fp32": seen["probabilities"]}, outputs=["output_fp32"])
        assert_type(client.chain(seen, kept), Task)
        assert_type(client.chain([seen, seen], kept, priority="low"), Task)
        assert_type(client.task("an id"), Task)
        assert_type(client.signature("digits"), ModelSignature | None)
    try:
        client.submit("digits", {})
    except InvalidInputError as error:
        value_error: ValueError = error
    except QueueFullError as error:
        transient: TransientError = error
        assert_type(error.retryable, bool)
        assert_type(error.retry_after_s, float | None)
    return int(result.outputs["probabilities"].argmax())


async def asynchronous(images: list[Image]) -> None:
    async with AsyncClient(queue_limit=10, validate=False) as client:
        assert_type(client, AsyncClient)
        task = await client.submit("digits", {"image": images[0]})
        assert_type(task, AsyncTask)
        assert_type(await task.status(), Status)
        assert_type(await task.cancel(timeout_s=1), bool)
        assert_type(await task.result(), InferResult)
        async for event in task.events():
            assert_type(event.at, float)
        results = client.map("digits", batches(images))
        assert_type(results, AsyncIterator[InferResult])
        async for either in client.map("digits", batches(images), return_exceptions=True):
            if isinstance(either, SamphireError):
                raise either
            assert_type(either, InferResult)
        assert_type(await client.chain(Step("digits", {"image": images[0]})), AsyncTask)
        assert_type(client.task("an id"), AsyncTask)
        assert_type(await client.signature("digits"), ModelSignature | None)
"""

WRONG = """
from samphire import AsyncClient, Client, InferResult, Step


def blocking(client: Client) -> None:
    client.submit(1)  # wrong
    client.submit(1, {})  # wrong
    client.submit("digits", [[0.5]])  # wrong
    client.submit("digits", {}, priority="urgent")  # wrong
    client.submit("digits", {}, deadline_s="soon")  # wrong
    client.submit("digits", {}, 2)  # wrong
    client.map("digits", {"image": [0.5]})  # wrong
    client.chain("digits")  # wrong
    client.task("an id").result("soon")  # wrong
    client.task("an id").output  # wrong
    results: list[InferResult] = list(client.map("digits", [], return_exceptions=True))  # wrong
    Step("digits", {})[0]  # wrong


async def asynchronous(client: AsyncClient) -> None:
    client.submit("digits", {}).id  # wrong
    await client.task("an id")  # wrong
    AsyncClient(tennant="acme")  # wrong
"""


def test_types_as_users_see_them(tmp_path: Path) -> None:
    """mypy --strict on the installed package: right uses pass, each wrong one is reported, nothing else is."""
    assert (resources.files("samphire") / "py.typed").is_file()
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "right.py", "wrong.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")},
        timeout=ENDS_S,
        check=False,
    )
    reported = set(re.findall(r"^(\w+\.py):(\d+): error", ended.stdout, re.MULTILINE))
    lines = WRONG.splitlines()
    expected = {("wrong.py", str(number)) for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert reported == expected, ended.stdout + ended.stderr
