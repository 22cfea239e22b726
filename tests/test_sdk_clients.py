"""Clients: threads, forks, event loops, reconnecting; and chains."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from samphire import (
    AsyncClient,
    BrokerUnavailableError,
    Client,
    ClientClosedError,
    InvalidInputError,
    ModelFaultError,
    SamphireError,
    Step,
)
from samphire.wire import keys
from tests.stacks import ENDS_S, Up, clean_environment, eventually, standing_still
from tests.support.names import KEYS
from tests.test_sdk import TIMEOUT_S, fp32, slow


def test_threads_share_a_client(client: Client) -> None:
    """Each gets its own answers."""
    answers: dict[int, list[float]] = {}

    def work(number: int) -> None:
        tasks = [client.submit("identity", fp32(number, i)) for i in range(40)]
        answers[number] = [float(task.result(TIMEOUT_S).outputs["output_fp32"].sum()) for task in tasks]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert answers == {number: [number + i for i in range(40)] for number in range(8)}


FORKED = """
import os, sys, warnings
import numpy as np
from samphire import AsyncClient, Client, SamphireError
import asyncio
warnings.simplefilter("ignore")
client = Client(sys.argv[1])
x = np.ones((1, 2), np.float32)
before = client.submit("identity", {"input_fp32": x})
client.submit("identity", {"input_fp32": x}).result(20)
aio = AsyncClient(sys.argv[1])
children = []
for number in range(3):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            assert before.result(20).outputs["output_fp32"].tolist() == [[1, 1]]
            for _ in range(50):
                answer = client.submit("identity", {"input_fp32": x * number}).result(20)
                assert answer.outputs["output_fp32"].tolist() == [[number, number]]
            assert len(list(client.map("identity", [{"input_fp32": x}] * 300))) == 300
            try:
                asyncio.run(aio.submit("identity", {"input_fp32": x}))
            except SamphireError as error:
                assert "does not survive a fork" in str(error)
                client.close()
                status = 0
        finally:
            os._exit(status)
    children.append(pid)
for _ in range(50):
    assert client.submit("identity", {"input_fp32": x * 9}).result(20).outputs["output_fp32"].tolist() == [[9, 9]]
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
assert before.result(20)
client.close()
print("survived")
"""


def test_a_client_survives_a_fork(stack: Up) -> None:
    """As under gunicorn and Celery's prefork pool: parent and children work side by side."""
    ended = subprocess.run(
        [sys.executable, "-c", FORKED, stack.broker_url],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
        env=clean_environment(),
    )
    assert ended.stdout.strip() == "survived", ended.stderr


def test_an_asynchronous_client_belongs_to_one_loop(stack: Up) -> None:
    """Says so instead of hanging."""
    client = AsyncClient(stack.broker_url)

    async def use() -> None:
        await (await client.submit("identity", fp32(1))).result(TIMEOUT_S)

    async def close() -> None:
        await client.close()

    with asyncio.Runner() as runner:
        runner.run(use())
        with pytest.raises(SamphireError, match="belongs to the event loop"):
            _in_another_loop(use)
        runner.run(close())


def _in_another_loop(use: Any) -> None:
    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(use())
        except SamphireError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(TIMEOUT_S)
    raise failure[0]


def test_cancelled_coroutines_leave_the_client_usable(stack: Up) -> None:
    """A cancelled wait ends at once and the task goes on; a cancelled submit harms no other."""

    async def test() -> None:
        async with AsyncClient(stack.broker_url) as client:
            with standing_still(stack.ready["pids"]["worker"][0]):
                task = await client.submit("identity", fp32(1))
                waiting = asyncio.create_task(task.result())
                await asyncio.sleep(0.05)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert (await task.result(TIMEOUT_S)).outputs["output_fp32"].tolist() == [[1]]
            for delay_s in (0, 0, 0.0005, 0.001, 0.002):
                submits = [asyncio.create_task(client.submit("identity", fp32(i))) for i in range(20)]
                await asyncio.sleep(delay_s)
                for submit in submits[::2]:
                    submit.cancel()
                ends = await asyncio.gather(*submits, return_exceptions=True)
                for number, end in enumerate(ends):
                    if isinstance(end, BaseException):
                        # The first has the connection: its end may cost the reply of those that went with it.
                        assert isinstance(end, asyncio.CancelledError | BrokerUnavailableError)
                    else:
                        assert (await end.result(TIMEOUT_S)).outputs["output_fp32"].tolist() == [[number]]
                assert any(not isinstance(end, BaseException) for end in ends)

    asyncio.run(test())


def test_a_client_reconnects(stack: Up, client: Client) -> None:
    """All connections cut, the clients' and the workers': who waits gets the result, who submits may try again."""
    task = client.submit("slow", slow(1.5))
    eventually(lambda: task.status() == "running", 10, "the start")
    with stack.redis() as redis:
        killed = redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        killed += redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert killed > 5
    assert task.result(TIMEOUT_S).outputs["slept"].tolist() == [[1.5]]

    def works() -> bool:
        try:
            return bool(client.submit("identity", fp32(1)).result(TIMEOUT_S))
        except BrokerUnavailableError:
            return False

    eventually(works, 20, "a submit after the cut")


def test_repr_and_close(stack: Up) -> None:
    """Helpful, and without the password."""
    with Client("redis://:secret@127.0.0.1:1/0", tenant="acme") as client:
        assert repr(client) == "<Client redis://:***@127.0.0.1:1/0 tenant=acme>"
        with pytest.raises(BrokerUnavailableError) as caught:
            client.submit("identity", fp32(1))
        assert "secret" not in str(caught.value)
        assert caught.value.retryable and caught.value.retry_after_s
    assert "closed" in repr(client)
    with pytest.raises(ClientClosedError):
        client.submit("identity", fp32(1))
    client = Client(stack.broker_url)
    task = client.submit("identity", fp32(1))
    assert repr(task) == f"<Task {task.id}>"
    assert repr(Step("identity", fp32(1))) == "Step('identity', {'input_fp32'})"
    client.close()
    with pytest.raises(ClientClosedError):
        task.result()


def test_a_chain_of_steps(client: Client) -> None:
    """One model's output is the next one's input; the handle is the last step's."""
    seen = Step("digits", {"image": np.zeros((3, 8, 8), np.float32)}, version=1)
    kept = Step("identity", {"input_fp32": seen["probabilities"]}, outputs=["output_fp32"])
    result = client.chain(seen, kept).result(TIMEOUT_S)
    assert result.model_name == "identity"
    assert result.outputs["output_fp32"].shape == (3, 10)


def test_stages_side_by_side(client: Client) -> None:
    """At the start and in between; one part, or all joined in their order."""
    first = [Step("identity", fp32(n, n)) for n in range(3)]
    joined = Step("identity", {"input_fp32": [step["output_fp32"] for step in first]})
    left = Step("identity", {"input_fp32": joined["output_fp32"]})
    right = Step("versions", {"x": np.ones((3, 1), np.int32)})
    last = Step("identity", {"input_fp32": left["output_fp32"], "input_int32": right["version"]})
    result = client.chain(first, joined, [left, right], last).result(TIMEOUT_S)
    assert result.outputs["output_fp32"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_chains_with_claim_checks_priority_delay_and_deadline(client: Client, stack: Up) -> None:
    """Large tensors go from step to step as claim checks; inputs of later steps too."""
    big = np.random.default_rng(1).random((1, 300_000), np.float32)
    first = Step("identity", {"input_fp32": big})
    later = Step("identity", {"input_fp32": first["output_fp32"], "input_fp64": big.astype(np.float64)})
    task = client.chain(first, later, priority="high", delay_s=0.3, deadline_s=30)
    outputs = task.result(TIMEOUT_S).outputs
    np.testing.assert_array_equal(outputs["output_fp32"], big)
    np.testing.assert_array_equal(outputs["output_fp64"], big.astype(np.float64))
    with stack.redis() as redis:
        assert not list(redis.scan_iter(f"{KEYS.own(keys.BLOB_PREFIX)}{task.id}:*"))


def test_a_failed_step_is_the_chains_error(client: Client) -> None:
    """In a line, and before a joining step."""
    bad = Step("picky", {"x": np.array([[-1]], np.float32)})
    after = Step("identity", {"input_fp32": bad["y"]})
    with pytest.raises(ModelFaultError, match="negative"):
        client.chain(bad, after).result(TIMEOUT_S)
    good, bad = Step("identity", fp32(1)), Step("picky", {"x": np.array([[-1]], np.float32)})
    with pytest.raises(SamphireError, match="negative"):
        client.chain([good, bad], Step("identity", {"input_fp32": good["output_fp32"]})).result(TIMEOUT_S)


def test_chains_that_cannot_work_are_refused(client: Client) -> None:
    """By what they are, before anything is queued."""
    one, two = Step("identity", fp32(1)), Step("identity", fp32(2))
    taking = Step("identity", {"input_fp32": one["output_fp32"]})
    itself = Step("identity", {})
    itself.inputs["input_fp32"] = itself["output_fp32"]
    misfit = Step("digits", {"image": one["output_fp32"]})
    both = {"input_fp32": [two["output_fp32"], one["output_fp32"]]}
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((), "at least one step"),
        ((one, []), "stage 2 is an empty list"),
        ((one, "two"), "expected a Step"),
        (([one, two],), "a chain has one result"),
        ((one, one), "stands in stages 1 and 2"),
        ((taking,), "which is not in the chain"),
        ((taking, one), "wait for each other in a cycle"),
        ((itself,), "wait for each other in a cycle"),
        ((one, two, taking), "only the stage right before"),
        ((one, Step("identity", {"input_fp32": one["nope"]})), "asked for 'nope'"),
        ((one, misfit), r"expected FP32\[-1, 8, 8\], output 'output_fp32'"),
        ((one, Step("nope", {"x": one["output_fp32"]})), "no model 'nope'"),
        (([one, two], Step("identity", both)), "of every step of the stage before, in their order"),
        ((one, Step("digits", {"picture": one["output_fp32"]})), "missing 'image'"),
    ]
    for stages, text in cases:
        with pytest.raises(InvalidInputError, match=text):
            client.chain(*stages)


def test_a_broken_canvas_message_is_a_dead_letter(client: Client, stack: Up) -> None:
    """And who waits for its id gets the error."""
    from samphire.wire.contract import CANVAS_TASK, CanvasStart
    from samphire.wire.envelope import encode_task, new_task_id

    task_id = new_task_id(time.time())
    message = encode_task(CANVAS_TASK, task_id, CanvasStart({"task": "celery.chain", "kwargs": 7}), "inference", 0)
    with stack.redis() as redis:
        redis.lpush("inference", message)
        with pytest.raises(InvalidInputError, match="canvas"):
            client.task(task_id).result(TIMEOUT_S)
        assert json.loads(redis.hget(KEYS.dead_prefix + task_id, "message"))["headers"]["task"] == CANVAS_TASK
