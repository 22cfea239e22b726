"""The shipped models that no other test is about, on a real Triton."""

from __future__ import annotations

import asyncio
import struct
import time
from typing import Any, NamedTuple

import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import InferInput, service_pb2
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub as Stub
from tritonclient.utils import InferenceServerException

from samphire import Client, InvalidInputError
from tests.stacks import Up, eventually

TIMEOUT_S = 30
STREAMS = 200
BROKEN_UTF8 = b"caf\xe9"


def texts(*given: str | bytes) -> np.ndarray:
    """BYTES [n, 1]."""
    return np.array([[text.encode() if isinstance(text, str) else text] for text in given], np.object_)


# -- normalize_text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "normalized"),
    [
        ("Hello  World\n", "hello world"),
        ("", ""),
        (" \t\u00a0\u3000 ", ""),
        ("Straße", "strasse"),
        ("ﬁne \uff21\uff22\uff23 ①", "fine abc 1"),
        ("cafe\u0301", "caf\u00e9"),
        ("ΣΊΣΥΦΟΣ", "σίσυφοσ"),
        ("naïve 🦀\u2028日本", "naïve 🦀 日本"),
        ("\u0345\u0399", "ιι"),
        ("ends in nul\0", "ends in nul\0"),
        ("x" * 100_000, "x" * 100_000),
    ],
)
def test_texts_that_mean_the_same_get_one_spelling(client: Client, given: str, normalized: str) -> None:
    """Through the whole way of a task, with the number of characters of what comes out."""
    outputs = client.submit("normalize_text", {"text": texts(given)}).result(TIMEOUT_S).outputs
    assert outputs["normalized"].tolist() == [[normalized.encode()]]
    assert outputs["characters"].dtype == np.int32
    assert outputs["characters"].tolist() == [[len(normalized)]]


def test_rows_and_tasks_keep_their_order(client: Client) -> None:
    """Tasks of several rows each, merged into batches of up to 32."""
    batches = [[f"  Row {row} OF {task}" for row in range(1 + task % 5)] for task in range(100)]
    results = client.map("normalize_text", ({"text": texts(*batch)} for batch in batches))
    for task, result in enumerate(results):
        expected = [[f"row {row} of {task}".encode()] for row in range(1 + task % 5)]
        assert result.outputs["normalized"].tolist() == expected


def test_bytes_that_are_no_text_fail_their_own_task(client: Client) -> None:
    """Every tenth is not UTF-8; its task says so, and the others are answered."""
    tasks = [
        client.submit("normalize_text", {"text": texts(BROKEN_UTF8 if i % 10 == 3 else f"Text {i}")}) for i in range(60)
    ]
    for i, task in enumerate(tasks):
        if i % 10 == 3:
            with pytest.raises(InvalidInputError, match=r"text: expected UTF-8, given bytes that are not.*0xe9"):
                task.result(TIMEOUT_S)
        else:
            assert task.result(TIMEOUT_S).outputs["normalized"].tolist() == [[f"text {i}".encode()]]


def test_triton_fails_the_one_request_that_is_no_text(stack: Up) -> None:
    """Requests that Triton itself puts into one batch do not share an error."""

    async def ask(triton: InferenceServerClient, text: str | bytes) -> Any:
        tensor = InferInput("text", [1, 1], "BYTES")
        tensor.set_data_from_numpy(texts(text))
        return await triton.infer("normalize_text", [tensor], client_timeout=TIMEOUT_S)

    async def ask_all() -> list[Any]:
        async with InferenceServerClient(stack.triton_grpc) as triton:
            given = [BROKEN_UTF8 if i % 2 else f"OK {i}" for i in range(40)]
            return await asyncio.gather(*(ask(triton, text) for text in given), return_exceptions=True)

    for i, answer in enumerate(asyncio.run(ask_all())):
        if i % 2:
            assert isinstance(answer, InferenceServerException)
            assert answer.status() == "StatusCode.INVALID_ARGUMENT"
        else:
            assert answer.as_numpy("normalized").tolist() == [[f"ok {i}".encode()]]


# -- token_stream -----------------------------------------------------------------------------------


OUTPUTS = [("token", "BYTES", [1]), ("index", "INT32", [1])]


class Response(NamedTuple):
    """One response of a stream; the last may be without a token."""

    token: str | None
    index: int | None
    final: bool


async def whole_stream(stub: Stub, text: str | bytes, delay_ms: int | None = None) -> list[Response]:
    """Send one request on a stream of its own and return what comes, up to the final response."""
    given = text.encode() if isinstance(text, str) else text
    request = service_pb2.ModelInferRequest(model_name="token_stream")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.inputs.add(name="text", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(struct.pack("<I", len(given)) + given)
    if delay_ms is not None:
        request.inputs.add(name="delay_ms", datatype="INT32", shape=[1])
        request.raw_input_contents.append(struct.pack("<i", delay_ms))
    responses, problem = [], ""
    async for answer in stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S):
        if answer.error_message:  # read on to the end: leaving here would cancel the stream as it ends
            problem = answer.error_message
            continue
        infer = answer.infer_response
        final = infer.parameters["triton_final_response"].bool_param
        if not infer.outputs:
            responses.append(Response(None, None, final))
            continue
        assert [(output.name, output.datatype, list(output.shape)) for output in infer.outputs] == OUTPUTS
        token, index = infer.raw_output_contents
        responses.append(Response(token[4:].decode(), struct.unpack("<i", index)[0], final))
    if problem:
        raise InferenceServerException(problem)
    return responses


def run_stream(stack: Up, text: str | bytes, delay_ms: int | None = None) -> list[Response]:
    async def run() -> list[Response]:
        async with grpc.aio.insecure_channel(stack.triton_grpc) as channel:
            return await whole_stream(Stub(channel), text, delay_ms)

    return asyncio.run(run())


def streaming_threads(stack: Up) -> int:
    """How many threads the model's process has: one a stream, beside its own."""
    for process, command in stack.commands().items():
        if "triton_python_backend_stub" in command and "/token_stream/" in command:
            return process.num_threads()
    raise AssertionError("the process of token_stream is not there")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello, wide world!", ["Hello", ",", " wide", " world", "!"]),
        ("internationalization", ["internat", "ionaliza", "tion"]),
        (" naïve\n🦀 日本  ", [" naïve", "\n🦀", " 日本", "  "]),
        ("", []),
    ],
)
def test_a_stream_gives_the_tokens_and_then_ends(stack: Up, text: str, tokens: list[str]) -> None:
    """One response a token, counted from 0, then a final response without one."""
    *responses, last = run_stream(stack, text)
    assert responses == [Response(token, index, False) for index, token in enumerate(tokens)]
    assert last == Response(None, None, True)
    assert "".join(tokens) == text


def test_two_hundred_streams_run_side_by_side(stack: Up) -> None:
    """Each takes a second by itself; all together do not take the sum of it, and none gets another's tokens."""

    async def run_all() -> list[list[Response]]:
        async with grpc.aio.insecure_channel(stack.triton_grpc) as channel:
            return await asyncio.gather(
                *(whole_stream(Stub(channel), f"this is stream {i} of many", delay_ms=150) for i in range(STREAMS))
            )

    started = time.monotonic()
    streams = asyncio.run(run_all())
    took_s = time.monotonic() - started
    for i, responses in enumerate(streams):
        assert "".join(response.token or "" for response in responses) == f"this is stream {i} of many"
        assert [response.index for response in responses] == [0, 1, 2, 3, 4, 5, None]
        assert [response.final for response in responses] == [False] * 6 + [True]
    print(f"{STREAMS} streams of 0.9 s took {took_s:.1f} s")
    assert 0.9 <= took_s < STREAMS * 0.9 / 2


def test_a_cancelled_stream_stops(stack: Up) -> None:
    """While it waits for its next token, which is a minute away."""
    before = streaming_threads(stack)

    async def begin_and_cancel() -> None:
        async with grpc.aio.insecure_channel(stack.triton_grpc) as channel:
            running = [
                asyncio.create_task(whole_stream(Stub(channel), "never sent", delay_ms=60_000)) for _ in range(10)
            ]
            while streaming_threads(stack) < before + 10:
                await asyncio.sleep(0.02)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.to_thread(eventually, lambda: streaming_threads(stack) <= before, 5, "the threads' end")

    asyncio.run(asyncio.wait_for(begin_and_cancel(), TIMEOUT_S))


@pytest.mark.parametrize(
    ("text", "delay_ms", "message"),
    [
        (BROKEN_UTF8, None, "text: expected UTF-8, given bytes that are not.*0xe9"),
        ("fine", -1, "delay_ms: expected 0 to 60000, given -1"),
        ("fine", 60_001, "delay_ms: expected 0 to 60000, given 60001"),
    ],
)
def test_bad_input_ends_a_stream_with_what_was_expected(
    stack: Up, text: str | bytes, delay_ms: int | None, message: str
) -> None:
    """And leaves no thread behind: the next stream is served."""
    with pytest.raises(InferenceServerException, match=message):
        run_stream(stack, text, delay_ms)
    assert run_stream(stack, "next")[-1].final
