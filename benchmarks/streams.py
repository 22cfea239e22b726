"""The measurements of streams: the first output, the rate of one, many at once, and readers that are cut off."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient

from benchmarks.measure import percentile
from benchmarks.stack import BenchStack, Figures
from samphire import AsyncClient, AsyncTask

FIRSTS = 300
TOKENS = 20_000
STREAMS, OUTPUTS, INTERVAL_S = 200, 150, 0.1
READERS, CUTS = 4, 250
CUT_INTERVAL_S = 0.01
TIMEOUT_S = 300.0


def text_of(tokens: int) -> str:
    """A text of so many tokens, no two neighbours of which are alike."""
    return " ".join(f"{number:05d}" for number in range(tokens))


def _text(text: str) -> dict[str, np.ndarray]:
    return {"text": np.array([text.encode()], dtype=object)}


def _ticks(count: int, interval_s: float) -> dict[str, np.ndarray]:
    return {"count": np.array([count], np.int32), "interval_s": np.array([interval_s], np.float64)}


async def _straight(triton: InferenceServerClient, text: str) -> tuple[float, float]:
    """Seconds to the first output and to the end, by the straight client; the text must come out whole."""
    tensor = InferInput("text", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))

    async def requests() -> AsyncIterator[dict[str, object]]:
        yield {"model_name": "token_stream", "inputs": [tensor], "enable_empty_final_response": True}

    began, first, pieces = time.perf_counter(), 0.0, []
    async for result, error in triton.stream_infer(requests()):
        if error is not None:
            raise error
        answer = result.get_response()
        if answer.outputs:
            first = first or time.perf_counter() - began
            pieces.append(result.as_numpy("token")[0])
        if answer.parameters["triton_final_response"].bool_param:
            break
    assert b"".join(pieces).decode() == text
    return first, time.perf_counter() - began


async def _through(client: AsyncClient, text: str) -> tuple[float, float]:
    """The same through Samphire."""
    began, first, pieces = time.perf_counter(), 0.0, []
    task = await client.submit("token_stream", _text(text))
    async for event in task.stream():
        assert event.kind == "output"
        assert event.index == len(pieces)
        first = first or time.perf_counter() - began
        pieces.append(event.outputs["token"][0])
    assert b"".join(pieces).decode() == text
    return first, time.perf_counter() - began


def stream(stack: BenchStack, scale: float) -> Figures:
    """First outputs one at a time, and one long stream at full speed; the straight client and Samphire by turns."""

    async def run() -> Figures:
        straight, through = list[float](), list[float]()
        rates: dict[str, list[float]] = {"direct": [], "samphire": []}
        long, tokens = text_of(max(500, int(TOKENS * scale / 2))), 2 * max(500, int(TOKENS * scale / 2)) - 1
        async with InferenceServerClient(stack.triton_grpc) as triton, AsyncClient(stack.broker_url) as client:
            for number in range(int(FIRSTS * scale) + 20):
                ours, theirs = (await _through(client, "one two"))[0], (await _straight(triton, "one two"))[0]
                if number >= 10:
                    through.append(ours * 1000)
                    straight.append(theirs * 1000)
            for _ in range(3):
                rates["direct"].append(tokens / (await _straight(triton, long))[1])
                rates["samphire"].append(tokens / (await _through(client, long))[1])
        return {
            "direct_first_output_p50_ms": statistics.median(straight),
            "samphire_first_output_p50_ms": statistics.median(through),
            "direct_stream_per_s": statistics.median(rates["direct"]),
            "samphire_stream_per_s": statistics.median(rates["samphire"]),
        }

    return asyncio.run(run())


def many_streams(stack: BenchStack, scale: float) -> Figures:
    """200 streams of 10 outputs a second each, and how late the reader gets what the model gives out.

    What counts is given out while all 200 go on, from the first output of the last one to the last of the first one.
    A machine so busy that this is less than half of all gets longer streams.
    """

    async def read(task: AsyncTask, outputs: int) -> list[tuple[float, float]]:
        given_out = list[tuple[float, float]]()
        async for event in task.stream():
            now = time.time()
            assert event.kind == "output"
            assert int(event.outputs["number"][0]) == event.index == len(given_out)
            at = float(event.outputs["at"][0])
            given_out.append((at, (now - at) * 1000))
        assert len(given_out) == outputs
        return given_out

    async def run() -> Figures:
        outputs, lags = max(30, int(OUTPUTS * scale) // 2), list[float]()
        async with AsyncClient(stack.broker_url) as client, asyncio.timeout(TIMEOUT_S):
            while len(lags) <= STREAMS * outputs / 2:
                outputs *= 2
                tasks = [await client.submit("ticker", _ticks(outputs, INTERVAL_S)) for _ in range(STREAMS)]
                found = await asyncio.gather(*(read(task, outputs) for task in tasks))
                begin, end = max(of_one[0][0] for of_one in found), min(of_one[-1][0] for of_one in found)
                lags = [lag for of_one in found for at, lag in of_one if begin <= at <= end]
        return {
            "streams_200_lag_p50_ms": statistics.median(lags),
            "streams_200_lag_p99_ms": percentile(lags, 0.99),
            "streams_200_slowest_per_s": min((len(of_one) - 1) / (of_one[-1][0] - of_one[0][0]) for of_one in found),
        }

    return asyncio.run(run())


class Cutter:
    """A TCP proxy before the broker, which closes all its connections when it is told to."""

    def __init__(self, broker_url: str) -> None:
        self._port = urlsplit(broker_url).port
        self._writers: set[asyncio.StreamWriter] = set()
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Cutter]:
        """As long as it serves."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> int:
        """Close all connections; how many there were."""
        count = len(self._writers)
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        return count

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_broker, broker = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, broker}
        with contextlib.suppress(asyncio.CancelledError):  # the measurement is over
            await asyncio.gather(self._pass(reader, broker), self._pass(to_broker, writer))

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
        self._writers.discard(target)
        target.transport.abort()


def resume(stack: BenchStack, scale: float) -> Figures:
    """Readers whose connections are cut again and again: each output comes once, and soon after the cut."""
    cuts = max(5, int(CUTS * scale))

    async def read_once(client: AsyncClient, cutter: Cutter, outputs: int) -> tuple[list[float], int]:
        resumed: list[float] = []
        number, cut_at, closed = 0, 0.0, 0
        task = await client.submit("ticker", _ticks(outputs, CUT_INTERVAL_S))
        async for event in task.stream():
            assert event.kind == "output"
            assert int(event.outputs["number"][0]) == event.index == number, "an output is missing, or came twice"
            number += 1
            if cut_at and float(event.outputs["at"][0]) >= cut_at:  # those before it may be here already
                resumed.append((time.time() - cut_at) * 1000)
                cut_at = 0.0
            elif not cut_at and len(resumed) < cuts and number % 3 == 0:
                closed += cutter.cut()
                cut_at = time.time()
        assert number == outputs
        return resumed, closed

    async def read() -> tuple[list[float], int]:
        outputs = cuts * 10
        cutter, resumed, closed = Cutter(stack.broker_url), list[float](), 0
        async with cutter.running(), AsyncClient(cutter.url) as client:
            while len(resumed) < cuts:  # a reader that takes longer to be back needs a longer stream
                outputs *= 2
                resumed, closed = await read_once(client, cutter, outputs)
        return resumed, closed

    async def run() -> Figures:
        async with asyncio.timeout(TIMEOUT_S):
            found = await asyncio.gather(*(read() for _ in range(READERS)))
        resumed = [ms for times, _ in found for ms in times]
        assert all(len(times) == cuts and closed >= cuts for times, closed in found)
        return {
            "resumes": len(resumed),
            "resume_p50_ms": statistics.median(resumed),
            "resume_p99_ms": percentile(resumed, 0.99),
        }

    return asyncio.run(run())
