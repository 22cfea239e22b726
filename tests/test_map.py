"""`map`: where an element cannot be sent, sources that are asynchronous, and what is no source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from samphire import AsyncClient, Client, InferResult, InvalidInputError, ModelFaultError, SamphireError
from tests.stacks import Up
from tests.test_sdk import fp32


def value(result: InferResult | SamphireError) -> float:
    assert isinstance(result, InferResult)
    return float(result.outputs["output_fp32"][0, 0])


def test_a_bad_element_gives_its_error_in_its_place(client: Client) -> None:
    """Also many of them, of every kind, in any window; the others have their results."""
    bad: dict[int, Any] = {
        0: None,
        100: {"input_fp32": np.ones((1, 1))},
        101: {"input": np.ones((1, 1), np.float32)},
        102: {"input_fp32": [[1.0], [1.0, 2.0]]},
        103: {"input_fp32": np.zeros((1, 5_000_000), np.float32)},
        299: {},
    }
    batches: list[Any] = [bad.get(n, fp32(n)) for n in range(300)]
    for window in (1, 7, 4096):
        told: list[tuple[int, int | None]] = []
        got = list(
            client.map(
                "identity",
                batches,
                return_exceptions=True,
                window=window,
                progress=lambda done, of, told=told: told.append((done, of)),  # type: ignore[misc]
            )
        )
        assert [n for n, one in enumerate(got) if isinstance(one, SamphireError)] == list(bad)
        assert [value(one) for one in got if isinstance(one, InferResult)] == [n for n in range(300) if n not in bad]
        assert told == [(n, 300) for n in range(1, 301)]


def test_without_return_exceptions_the_results_before_it_come_first(client: Client) -> None:
    """Then its error is raised."""
    got: list[float] = []
    with pytest.raises(InvalidInputError, match="expected FP32, given FP64"):
        for result in client.map("identity", [fp32(1), fp32(2), {"input_fp32": np.ones((1, 1))}, fp32(4)]):
            got.append(value(result))
    assert got == [1, 2]


def test_map_goes_on_after_a_failed_task(client: Client) -> None:
    """A task that fails gives its error in its place too."""
    batches = [{"x": np.array([[value]], np.float32)} for value in (1, -1, 2)]
    ends = list(client.map("picky", batches, return_exceptions=True))
    assert [isinstance(end, ModelFaultError) for end in ends] == [False, True, False]


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ({"input_fp32": [[1.0]]}, "given the inputs of one task: put them into a list"),
        (5, "expected an iterable of inputs, or an asynchronous one, given int"),
    ],
)
def test_what_is_no_source(client: Client, batches: Any, text: str) -> None:
    """It is said before anything is sent."""
    with pytest.raises(InvalidInputError, match=text):
        next(client.map("identity", batches))


class Rows:
    """As data sets are: neither an iterator nor `Iterable`, and read by number."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == 3:
            raise IndexError
        return fp32(number)


class Both(list[dict[str, Any]]):
    """As bars of progress and rows of a database are, which can be read either way."""

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        for element in self:
            yield element


def test_sources_of_other_kinds(stack: Up, client: Client) -> None:
    """What Python can iterate over is a source; what is both is read as its client works."""
    assert [value(result) for result in client.map("identity", Rows())] == [0, 1, 2]  # type: ignore[call-overload]
    both = Both([fp32(0), fp32(1)])
    assert [value(result) for result in client.map("identity", both)] == [0, 1]

    async def check() -> None:
        async with AsyncClient(stack.broker_url) as client:
            assert [value(result) async for result in client.map("identity", both)] == [0, 1]

    asyncio.run(check())


def test_an_asynchronous_source_is_read_by_one_task(stack: Up) -> None:
    """A time limit and a context around its elements hold; it is closed, wherever it stands."""

    async def check() -> None:
        readers: set[Any] = set()
        closed = asyncio.Event()

        async def source() -> AsyncIterator[dict[str, Any]]:
            try:
                async with asyncio.timeout(600):
                    for number in range(10_000):
                        readers.add(asyncio.current_task())
                        yield fp32(number)
            finally:
                closed.set()

        async with AsyncClient(stack.broker_url) as client:
            with pytest.raises(LookupError):
                async for result in client.map("identity", source(), window=4):
                    if value(result) == 20:
                        raise LookupError
            async with asyncio.timeout(20):
                await closed.wait()
        assert len(readers) == 1

    asyncio.run(check())


def test_the_blocking_client_takes_no_asynchronous_source(client: Client) -> None:
    """It belongs to an event loop that is not this client's."""

    async def source() -> AsyncIterator[dict[str, Any]]:
        yield fp32(1)

    with pytest.raises(InvalidInputError, match=r"only `AsyncClient.map` takes an asynchronous one"):
        next(client.map("identity", source()))  # type: ignore[call-overload]


def test_an_asynchronous_source_is_read_no_further_than_the_window(stack: Up) -> None:
    """Its results are in its order, whether its elements are at hand or come late."""

    async def check(waits: bool) -> None:
        ahead = yielded = 0

        async def source() -> AsyncIterator[dict[str, Any]]:
            nonlocal ahead
            for number in range(60):
                if waits:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                ahead = max(ahead, number + 1 - yielded)
                yield fp32(number)

        async with AsyncClient(stack.broker_url) as client:
            async for result in client.map("identity", source(), window=8):
                assert value(result) == yielded
                yielded += 1
        assert yielded == 60
        assert ahead <= 10  # the one that is next, and one more that is ready

    asyncio.run(check(waits=False))
    asyncio.run(check(waits=True))


def test_results_do_not_wait_for_an_asynchronous_source(stack: Up) -> None:
    """The second element comes only once the result of the first was read: from any number on the map would hang."""

    async def check() -> None:
        read = asyncio.Event()

        async def source() -> AsyncIterator[dict[str, Any]]:
            for number in range(20):
                yield fp32(number)
                await read.wait()
                read.clear()

        async with AsyncClient(stack.broker_url) as client, asyncio.timeout(60):
            got = []
            async for result in client.map("identity", source()):
                got.append(value(result))
                read.set()
        assert got == list(range(20))

    asyncio.run(check())


def test_a_source_that_fails_ends_the_map(stack: Up, client: Client) -> None:
    """With its own error; one that is left is closed, and nothing is left behind."""

    def source() -> Iterator[dict[str, Any]]:
        yield fp32(1)
        raise LookupError("no more rows")

    async def check() -> None:
        ended = asyncio.Event()

        async def failing() -> AsyncIterator[dict[str, Any]]:
            yield fp32(1)
            await asyncio.sleep(0.01)
            raise LookupError("no more rows")

        async def endless() -> AsyncIterator[dict[str, Any]]:
            try:
                yield fp32(1)
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with AsyncClient(stack.broker_url) as client:
            with pytest.raises(LookupError, match="no more rows"):
                [_ async for _ in client.map("identity", failing())]
            results = client.map("identity", endless())
            assert value(await anext(results)) == 1
            await results.aclose()  # type: ignore[attr-defined]
            async with asyncio.timeout(20):
                await ended.wait()

    with pytest.raises(LookupError, match="no more rows"):
        list(client.map("identity", source()))
    asyncio.run(check())
