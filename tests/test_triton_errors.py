"""Every error that Triton answers with, provoked on the real server; docs/errors.md is held to what was seen."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from samphire import (
    Backoff,
    Client,
    EndpointTimeoutError,
    EndpointUnavailableError,
    InvalidInputError,
    ModelFaultError,
    PayloadTooLargeError,
    QueueFullError,
    SamphireError,
    UnknownModelError,
)
from samphire_broker.retry import Retry, RetryPolicy, decide
from samphire_workers.triton.errors import EndpointDiedError, StubDiedError, translate
from tests.stacks import Up, eventually, only, running_stack, stand_still

DOCS = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
POLICY = RetryPolicy(3, Backoff())
Stub = service_pb2_grpc.GRPCInferenceServiceStub


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A stack that may be broken; in the order of the tests, the server dies last."""
    folder = tmp_path_factory.mktemp("errors")
    with running_stack(folder, *only(folder, "identity", "slow", "queued", "picky", "deadly", "misbehaving")) as stack:
        yield stack


@pytest.fixture(scope="module")
def stub(up: Up) -> Iterator[Stub]:
    with grpc.insecure_channel(up.triton_grpc) as channel:
        yield Stub(channel)


def request(model: str, name: str, array: Any, version: str = "", **parameters: int) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    datatype = {"float32": "FP32", "float64": "FP64"}[str(array.dtype)]
    message.inputs.add(name=name, datatype=datatype, shape=array.shape)
    message.raw_input_contents.append(array.tobytes())
    for key, value in parameters.items():
        message.parameters[key].int64_param = value
    return message


def slow(seconds: float, model: str = "slow", version: str = "", **parameters: int) -> service_pb2.ModelInferRequest:
    return request(model, "seconds", np.array([[seconds]], np.float32), version, **parameters)


def provoke(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value.code(), raised.value.details() or ""


def assert_documented(what: str, code: grpc.StatusCode, details: str, kind: type[SamphireError]) -> None:
    """The table has a row that says so, and what follows it."""
    error = translate(code, details)
    assert type(error) is kind, (code, details)
    if isinstance(error, EndpointUnavailableError | QueueFullError):
        follows = "back to its queue, an attempt" if kind is StubDiedError else "back to its queue, no attempt"
    else:
        follows = "retry" if isinstance(decide(error, 1, inf, POLICY), Retry) else "dead letter"
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| {what} |")]
    assert len(rows) == 1, f"docs/errors.md has no row {what!r}"
    _, _, shown_code, told, shown_kind, shown_follows, _ = (cell.strip(" `") for cell in rows[0].split("|"))
    assert (shown_code, shown_kind, shown_follows) == (code.name, kind.__name__, follows)
    assert told in details


F32 = np.float32


@pytest.mark.parametrize(
    ("what", "message", "kind"),
    [
        ("model not found", slow(0, "nope"), UnknownModelError),
        ("version not found", slow(0, version="9"), UnknownModelError),
        ("version is no number", slow(0, version="x"), InvalidInputError),
        ("wrong shape", request("slow", "seconds", np.zeros((1, 2), F32)), InvalidInputError),
        ("wrong datatype", request("slow", "seconds", np.zeros((1, 1))), InvalidInputError),
        ("unknown input", request("slow", "x", np.zeros((1, 1), F32)), InvalidInputError),
        ("too many rows", request("slow", "seconds", np.zeros((9, 1), F32)), InvalidInputError),
        ("model raises", request("picky", "x", np.array([[-1]], F32)), ModelFaultError),
        ("process of a Python model died", request("deadly", "x", np.array([[666]], F32)), StubDiedError),
    ],
)
def test_requests_that_fail(stub: Stub, what: str, message: service_pb2.ModelInferRequest, kind: type) -> None:
    """At once, by what they ask for."""
    assert_documented(what, *provoke(lambda: stub.ModelInfer(message, timeout=20)), kind)


def wait_until_busy(stub: Stub, model: str) -> None:
    """Return when the model, which does one thing at a time, has begun something that takes it a while."""

    def is_busy() -> bool:
        try:
            stub.ModelInfer(slow(0, model), timeout=1)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return False

    eventually(is_busy, 10, "a busy model")


def test_deadline_and_cancellation(stub: Stub) -> None:
    """The client's own, which also end the work at the server."""
    code, details = provoke(lambda: stub.ModelInfer(slow(20), timeout=0.3))
    assert_documented("deadline", code, details, EndpointTimeoutError)
    call = stub.ModelInfer.future(slow(20), timeout=60)
    wait_until_busy(stub, "slow")
    call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED
    assert_documented("cancelled by somebody else", grpc.StatusCode.CANCELLED, call.details(), EndpointUnavailableError)
    assert stub.ModelInfer(slow(0), timeout=10)  # twenty seconds of work were given up twice


def test_queues(stub: Stub) -> None:
    """Of a model whose queue policy has bounds."""
    calls = [stub.ModelInfer.future(slow(0.7, "queued"), timeout=20) for _ in range(5)]
    endings = [call.exception() for call in calls]
    full = next(ending for ending in endings if ending is not None)
    assert_documented("queue full", full.code(), full.details(), QueueFullError)
    blocker = stub.ModelInfer.future(slow(3, "queued"), timeout=60)
    wait_until_busy(stub, "queued")
    code, details = provoke(lambda: stub.ModelInfer(slow(0, "queued", timeout=200_000), timeout=20))
    assert_documented("Triton's timeout passed in its queue", code, details, EndpointTimeoutError)
    blocker.result()


def test_models_that_come_and_go(stub: Stub) -> None:
    """What is under way is finished; what comes too early or too late is told that there is no such model."""
    under_way = stub.ModelInfer.future(slow(3), timeout=60)
    wait_until_busy(stub, "slow")
    stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="slow"), timeout=30)
    assert_documented("unloaded", *provoke(lambda: stub.ModelInfer(slow(0), timeout=20)), UnknownModelError)
    assert under_way.result()
    load = service_pb2.RepositoryModelLoadRequest(model_name="slow")
    config = {
        "name": "slow",
        "backend": "python",
        "max_batch_size": 8,
        "input": [{"name": "seconds", "data_type": "TYPE_FP32", "dims": [1]}],
        "output": [{"name": "slept", "data_type": "TYPE_FP32", "dims": [1]}],
        "parameters": {"load_s": {"string_value": "5"}},
    }
    load.parameters["config"].string_param = json.dumps(config)
    loading = threading.Thread(target=lambda: stub.RepositoryModelLoad(load, timeout=30))
    loading.start()
    index = service_pb2.RepositoryIndexRequest()
    states = [("slow", "LOADING")]
    eventually(lambda: states[0] in [(m.name, m.state) for m in stub.RepositoryIndex(index).models], 10, "the load")
    assert_documented("loading", *provoke(lambda: stub.ModelInfer(slow(0), timeout=20)), UnknownModelError)
    loading.join()
    assert stub.ModelInfer(slow(0), timeout=20)


def test_messages_over_a_limit(up: Up) -> None:
    """Samphire itself sets no limit on gRPC messages; a proxy in between may."""
    large = request("identity", "input_fp32", np.zeros((1, 1000), F32))
    for what, option in (
        ("answer over a message limit", "grpc.max_receive_message_length"),
        ("request over a message limit", "grpc.max_send_message_length"),
    ):
        with grpc.insecure_channel(up.triton_grpc, options=[(option, 1000)]) as channel:
            code, details = provoke(lambda: Stub(channel).ModelInfer(large, timeout=20))
        assert_documented(what, code, details, PayloadTooLargeError)


def says(how: str, model: str = "misbehaving") -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="how", datatype="BYTES", shape=[1, 1])
    message.raw_input_contents.append(len(how).to_bytes(4, "little") + how.encode())
    return message


@pytest.mark.parametrize(
    "how",
    [
        "raise:Connection reset by peer",
        "internal:Connection reset by peer",
        "internal:Stub process is not healthy",
        "not_found:my own model is not found",
        "large:100000",
    ],
)
def test_a_models_own_words_are_the_models_fault(stub: Stub, how: str) -> None:
    """Whatever they resemble."""
    code, details = provoke(lambda: stub.ModelInfer(says(how), timeout=20))
    assert type(translate(code, details)) is ModelFaultError, (code, details[:200])


def test_a_status_of_the_models_own_choice(client: Client, stack: Up) -> None:
    """The server and the model are ready: it is the model that says so, which costs an attempt each time."""
    for how in ("unavailable:my database is away", "cancelled:I give up", "not_found:x", "large:100000"):
        inputs = {"how": np.array([[how.encode()]], np.object_)}
        with pytest.raises(ModelFaultError) as caught:
            client.submit("misbehaving", inputs, max_attempts=2, backoff=Backoff(0.01)).result(30)
        assert (
            "x" * 1000 in str(caught.value) if how.startswith("large") else how.partition(":")[2] in str(caught.value)
        )
    log = stack.worker_log()
    assert "misbehaving is away" not in log and "misbehaving was reloaded" not in log


def test_the_server_hangs_and_dies(up: Up, stub: Stub) -> None:
    """With a request under way, and with none."""
    under_way = stub.ModelInfer.future(slow(20), timeout=60)
    wait_until_busy(stub, "slow")
    server = psutil.Process(up.ready["pids"]["triton"])
    stand_still(server.pid)
    assert_documented("server hangs", *provoke(lambda: stub.ModelInfer(slow(0), timeout=1)), EndpointTimeoutError)
    os.kill(server.pid, signal.SIGKILL)
    ending = under_way.exception()
    assert_documented("server killed", ending.code(), ending.details(), EndpointDiedError)

    def refusal() -> tuple[grpc.StatusCode, str] | None:
        """What a call gets once it is no longer sent on the broken connection."""
        code, details = provoke(lambda: stub.ModelInfer(slow(0), timeout=5))
        return None if type(translate(code, details)) is EndpointDiedError else (code, details)

    assert_documented("server away", *eventually(refusal, 10, "a refusal"), EndpointUnavailableError)
