"""Requests of a sequence: in order, one at a time, on one endpoint, over all workers; or refused with a reason."""

from __future__ import annotations

import os
import signal
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samphire import Client, InvalidInputError, ModelFaultError, SamphireError, Task
from samphire.wire import keys
from tests.stacks import Up, Valkey, eventually
from tests.support.plain import plain_celery
from tests.workers import running_worker

TIMEOUT_S = 60


def ask(client: Client, name: str | int, x: int, *, start: bool = False, ms: int = 0, **more: Any) -> Task:
    inputs = {"x": np.array([[x]], np.int32), "ms": np.array([[ms]], np.int32)}
    return client.submit("counter", inputs, parameters={"sequence_id": name, "sequence_start": start}, **more)


def ask_all(client: Client, name: str | int, numbers: list[int], ms: int = 0) -> list[Task]:
    return [ask(client, name, x, start=n == 0, ms=ms) for n, x in enumerate(numbers)]


def sums(tasks: list[Task]) -> list[int]:
    return [int(task.result(TIMEOUT_S).outputs["sum"][0, 0]) for task in tasks]


@pytest.mark.parametrize("kind", [str, int])
def test_sequences_that_are_sent_without_waiting(client: Client, kind: type) -> None:
    """Side by side, each in its order."""
    numbers = list(range(1, 13))
    named = {kind(900 + n): ask_all(client, kind(900 + n), numbers) for n in range(6)}
    for tasks in named.values():
        assert sums(tasks) == list(accumulate(numbers))


def test_sequences_are_interleaved(client: Client) -> None:
    """As their requests come; no sequence waits for another's end."""
    tasks: dict[str, list[Task]] = {"a": [], "b": []}
    for n in range(1, 8):
        for name, asked in tasks.items():
            asked.append(ask(client, name, n, start=n == 1, ms=5))
    assert sums(tasks["a"]) == sums(tasks["b"]) == list(accumulate(range(1, 8)))


@pytest.mark.parametrize("wrong", ["the model raises", "a shape that does not fit", "cancelled", "expired"])
def test_what_follows_a_request_that_did_not_succeed(client: Client, wrong: str) -> None:
    """Fails, for its answer could not be right; until the sequence begins again."""
    name = f"broken by {wrong}"
    before = ask_all(client, name, [1, 2], ms=200)
    if wrong == "the model raises":
        bad = ask(client, name, -1)
    elif wrong == "a shape that does not fit":
        with Client(client._client.broker.address.url, validate=False) as careless:
            inputs = {"x": np.zeros((1, 3), np.int32), "ms": np.zeros((1, 1), np.int32)}
            bad = careless.submit("counter", inputs, parameters={"sequence_id": name})
    elif wrong == "cancelled":
        bad = ask(client, name, 3)
        assert bad.cancel()
    else:
        bad = ask(client, name, 3, deadline_s=0.01)
    after = [ask(client, name, 4), ask(client, name, 5)]
    again = ask_all(client, name, [6, 7])
    assert sums(before) == [1, 3]
    with pytest.raises(SamphireError):
        bad.result(TIMEOUT_S)
    for task in after:
        with pytest.raises(InvalidInputError, match="is broken: its request"):
            task.result(TIMEOUT_S)
    assert sums(again) == [6, 13]


def test_what_nothing_keeps_in_order_is_refused(client: Client, stack: Up) -> None:
    """A model without sequence_batching, at the SDK and at the worker; and a queue that several workers empty."""
    one = {"input_fp32": np.ones((1, 1), np.float32)}
    with pytest.raises(InvalidInputError, match="has no sequence_batching in its config"):
        client.submit("identity", one, parameters={"sequence_id": 1, "sequence_start": True})
    with Client(stack.broker_url, validate=False) as careless:
        task = careless.submit("identity", one, parameters={"sequence_id": 1, "sequence_start": True})
        with pytest.raises(InvalidInputError, match="has no sequence_batching in its config"):
            task.result(TIMEOUT_S)
    numbers = [{"name": name, "datatype": "INT32", "shape": [1, 1], "data": [0]} for name in ("x", "ms")]
    start = {"sequence_id": "plain", "sequence_start": True}
    body = {"model_name": "counter", "inputs": numbers, "parameters": start}
    with plain_celery(stack.broker_url) as app:
        with pytest.raises(Exception, match=r"send them to inference\.counter"):
            app.send_task("samphire.infer", kwargs=body, queue="inference").get(timeout=TIMEOUT_S)
        assert app.send_task("samphire.infer", kwargs=body, queue="inference.counter").get(timeout=TIMEOUT_S)


def test_two_workers(stack: Up, valkey: Valkey, tmp_path: Path) -> None:
    """One of them leads the model; when it is killed, the other goes on, and no wrong sum is ever told."""
    with (
        running_worker(tmp_path / "one", valkey.url, stack.triton_grpc) as one,
        running_worker(tmp_path / "two", valkey.url, stack.triton_grpc) as two,
        Client(valkey.url) as client,
    ):
        numbers = list(range(1, 11))
        tasks = {f"both {n}": ask_all(client, f"both {n}", numbers, ms=2) for n in range(4)}
        for asked in tasks.values():
            assert sums(asked) == list(accumulate(numbers))
        workers = {worker.log().count("leads model counter"): worker for worker in (one, two)}
        assert set(workers) == {0, 1}, "one leads"
        tasks = {f"killed {n}": ask_all(client, f"killed {n}", numbers, ms=20) for n in range(4)}
        tasks["killed 0"][2].result(TIMEOUT_S)
        os.killpg(workers[1].process.pid, signal.SIGKILL)
        ends = {name: [end(task) for task in asked] for name, asked in tasks.items()}
        right = list(accumulate(numbers))
        for told in ends.values():
            for n, (got, should_be) in enumerate(zip(told, right, strict=True)):
                assert got == should_be or isinstance(got, SamphireError), (n, told)
        assert any(isinstance(got, SamphireError) for told in ends.values() for got in told), "the kill was felt"
        assert "leads model counter" in workers[0].log()
        assert sums(ask_all(client, "afterwards", numbers)) == right


def end(task: Task) -> int | SamphireError:
    try:
        return int(task.result(TIMEOUT_S).outputs["sum"][0, 0])
    except SamphireError as error:
        return error


def test_an_endpoint_that_is_away(stack: Up, client: Client) -> None:
    """What was not asked yet waits in its order; a model whose process died has lost its state, and that is told."""
    import psutil

    first = ask_all(client, "stub", [1, 2])
    assert sums(first) == [1, 3]
    triton = psutil.Process(stack.ready["pids"]["triton"])
    stub = next(child for child in triton.children(recursive=True) if "counter" in " ".join(child.cmdline()))
    stub.kill()
    rest = [ask(client, "stub", n) for n in (3, 4)]
    for task in rest:
        with pytest.raises((ModelFaultError, InvalidInputError)):
            task.result(TIMEOUT_S)
    assert sums(ask_all(client, "stub", [5, 6])) == [5, 11]
    with stack.redis() as server:
        eventually(lambda: not server.llen(keys.queue_name("counter")), 10, "an empty queue")
