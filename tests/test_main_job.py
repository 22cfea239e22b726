"""The main job on real parts: SDK or plain Celery -> Valkey -> worker -> Triton -> result."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest

from samphire import (
    AsyncClient,
    Client,
    ClientClosedError,
    InvalidInputError,
    ModelFaultError,
    ResultTimeoutError,
    SamphireError,
    Task,
)
from samphire.wire import keys
from samphire.wire.keys import Priority
from samphire_broker.digits import load_split
from tests.stacks import Up, eventually, standing_still
from tests.support.names import KEYS

TIMEOUT_S = 30


MOST_CONNECTIONS = 3
"""Of one client: submits, events, results."""


def fp32(*values: float, **more: Any) -> dict[str, Any]:
    tensor = {"name": "input_fp32", "datatype": "FP32", "shape": [1, len(values)], "data": list(values)}
    return {name: value for name, value in (tensor | more).items() if value is not None}


def array(*values: float) -> np.ndarray:
    return np.array([values], dtype=np.float32)


def test_digits_are_recognized(client: Client) -> None:
    """Held-out images, one a task, come back right in at least 97 of 100."""
    digits = load_split()
    inputs = ({"image": image[np.newaxis]} for image in digits.held_out_images)
    said = [result.outputs["probabilities"].argmax() for result in client.map("digits", inputs)]
    assert np.mean(said == digits.held_out_labels) >= 0.97


def test_both_versions_of_digits_serve(client: Client) -> None:
    """By number, and the newest by default."""
    image = load_split().held_out_images[:1]
    answers = [client.submit("digits", {"image": image}, version=v).result(TIMEOUT_S) for v in (1, "2", "champion")]
    assert [answer.model_version for answer in answers] == ["1", "2", "2"]
    first, second, champion = (answer.outputs["probabilities"] for answer in answers)
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(second, champion, rtol=1e-5)


def sample_inputs() -> dict[str, np.ndarray]:
    floats = np.array([[0.0, -0.0, np.nan, np.inf, -np.inf, 1.5]])
    words = np.empty((1, 3), dtype=np.object_)
    words[0] = ["Grüße".encode(), b"\x00\xff", b""]
    samples = {
        "bool": np.array([[True, False]]),
        "bytes": words,
        "bf16": floats.astype(ml_dtypes.bfloat16),
        "fp16": floats.astype(np.float16),
        "fp32": floats.astype(np.float32),
        "fp64": floats,
    }
    for bits in (8, 16, 32, 64):
        for name in (f"int{bits}", f"uint{bits}"):
            info = np.iinfo(name)
            samples[name] = np.array([[info.min, info.max]], dtype=name)
    return {f"input_{name}": sample for name, sample in samples.items()}


@pytest.mark.parametrize("name", sorted(sample_inputs()))
def test_every_datatype_comes_back_bit_for_bit(client: Client, name: str) -> None:
    """NaN, infinities, extremes, Unicode and binary included; numpy dtypes are kept."""
    sample = sample_inputs()[name]
    output = client.submit("identity", {name: sample}).result(TIMEOUT_S).outputs[name.replace("input", "output")]
    assert output.dtype == sample.dtype
    assert output.tolist() == sample.tolist() if sample.dtype == object else output.tobytes() == sample.tobytes()


def test_many_inputs_and_outputs_in_one_request(client: Client) -> None:
    """All datatypes at once."""
    result = client.submit("identity", sample_inputs()).result(TIMEOUT_S)
    assert {name.replace("output", "input") for name in result.outputs} == set(sample_inputs())


def test_only_the_asked_outputs_return(client: Client) -> None:
    """As the protocol's `outputs` says."""
    result = client.submit("versions", {"x": np.ones((1, 1), np.int32)}, outputs=["version"]).result(TIMEOUT_S)
    assert list(result.outputs) == ["version"]


def test_a_zero_size_tensor(client: Client) -> None:
    """One row without columns is a row."""
    output = client.submit("identity", {"input_fp32": np.zeros((1, 0), np.float32)}).result(TIMEOUT_S)
    assert output.outputs["output_fp32"].shape == (1, 0)


def test_a_model_without_a_batch_dimension(client: Client) -> None:
    """Any length, zero too; optional inputs; text in and out."""
    for length in (0, 1, 7):
        x = np.arange(length, dtype=np.float64)
        result = client.submit("unbatched", {"x": x, "text": np.array(["Jürgen"])}).result(TIMEOUT_S)
        assert result.outputs["y"].tolist() == x.tolist()
        assert result.outputs["greeting"].tolist() == ["hello Jürgen".encode()]
    assert client.submit("unbatched", {"x": x}).result(TIMEOUT_S).outputs["greeting"].tolist() == [b"hello nobody"]


@pytest.mark.parametrize("size", [2_000, 3_000, 150_000, 1_200_000])
def test_large_tensors_travel_as_claim_checks(client: Client, stack: Up, size: int) -> None:
    """Below and above the inline limit the same numbers come back; the input's claim check is removed."""
    x = np.random.default_rng(size).random((1, size), dtype=np.float32)
    task = client.submit("identity", {"input_fp32": x})
    np.testing.assert_array_equal(task.result(TIMEOUT_S).outputs["output_fp32"], x)
    with stack.redis() as redis:
        assert not list(redis.scan_iter(f"{KEYS.own(keys.BLOB_PREFIX)}{task.id}*"))
        blobs = list(redis.scan_iter(f"{KEYS.own(keys.RESULT_BLOB_PREFIX)}:{task.id}*"))
        assert len(blobs) == (x.nbytes > 8192)
        assert all(redis.ttl(blob) > 0 for blob in blobs)


def test_a_mix_of_sizes_rows_and_versions_is_never_mixed_up(client: Client) -> None:
    """Each answer has the numbers and the rows of its own question."""
    random = np.random.default_rng(1)
    questions = [random.random((rows, width), dtype=np.float32) for rows in (1, 3, 64) for width in (1, 16)] * 40
    results = client.map("identity", ({"input_fp32": question} for question in questions))
    for question, result in zip(questions, results, strict=True):
        np.testing.assert_array_equal(result.outputs["output_fp32"], question)


def test_micro_batches_do_not_mix_versions_and_do_happen(client: Client) -> None:
    """Interleaved versions are served by their own, in batches of more than one row."""
    x = np.ones((1, 1), np.int32)
    tasks = {v: [client.submit("versions", {"x": x}, version=v) for _ in range(100)] for v in (1, 2)}
    for version, submitted in tasks.items():
        assert {int(task.result(TIMEOUT_S).outputs["version"][0, 0]) for task in submitted} == {version}
    rows = [r.outputs["batch_rows"][0, 0] for r in client.map("versions", ({"x": x} for _ in range(2000)))]
    assert max(rows) > 8
    alone = client.map("versions", ({"x": x} for _ in range(200)), parameters={"micro_batch": False})
    assert {int(result.outputs["batch_rows"][0, 0]) for result in alone} == {1}


def test_one_bad_row_does_not_fail_its_neighbours(client: Client) -> None:
    """A batch that fails on its content is taken apart until only the bad ones fail."""
    bad = {17, 18, 333}
    inputs = ({"x": array(-1.0 if i in bad else float(i))} for i in range(500))
    results = list(client.map("picky", inputs, return_exceptions=True))
    assert {i for i, result in enumerate(results) if isinstance(result, SamphireError)} == bad
    for i, result in enumerate(results):
        if i in bad:
            assert isinstance(result, ModelFaultError)
            assert "negative" in str(result)
        else:
            assert not isinstance(result, SamphireError)
            assert result.outputs["y"].tolist() == [[2.0 * i]]


def test_a_task_is_seen_running_and_done(client: Client) -> None:
    """`status` follows it, and `result` can be asked again and again."""
    task = client.submit("slow", {"seconds": array(55.0)})
    eventually(lambda: task.status() == "running", 10, "running")
    with pytest.raises(ResultTimeoutError, match="it goes on"):
        task.result(timeout_s=0.05)
    assert task.cancel() is True
    task = client.submit("slow", {"seconds": array(0.1)})
    assert task.result(TIMEOUT_S).outputs["slept"].tolist() == array(0.1).tolist()
    assert task.status() == "succeeded"
    for _ in range(3):
        assert task.result(timeout_s=2).task_id == task.id


def test_priorities_overtake(client: Client, stack: Up) -> None:
    """With the model busy, a high task submitted last is answered before the low ones."""

    def submit(priority: Priority) -> Task:
        return client.submit("slow", {"seconds": array(0.1)}, priority=priority, parameters={"micro_batch": False})

    blockers = [submit("normal") for _ in range(4)]
    with standing_still(stack.ready["pids"]["worker"][0]):
        low = [submit("low") for _ in range(20)]
        high = submit("high")
    for task in [*blockers, *low, high]:
        task.result(TIMEOUT_S)
    with stack.redis() as redis:
        done = {task.id: json.loads(redis.get(KEYS.meta_prefix + task.id))["date_done"] for task in (*low, high)}
    assert sum(done[task.id] > done[high.id] for task in low) >= 5


def test_tenants_have_queues_of_their_own(stack: Up) -> None:
    """The queue is named after both."""
    with Client(stack.broker_url, tenant="acme") as acme:
        result = acme.submit("identity", {"input_fp32": array(1.0)}).result(TIMEOUT_S)
        assert result.outputs["output_fp32"].tolist() == [[1.0]]
    with stack.redis() as redis:
        assert redis.sismember(KEYS.queues, "inference.identity@acme")


def test_ten_thousand_results_are_awaited_on_one_connection(stack: Up) -> None:
    """Ten thousand waiters at once, and the number of connections stays what it was for one."""

    async def test() -> None:
        before = connections()
        async with AsyncClient(stack.broker_url) as client:
            one = await client.submit("identity", {"input_fp32": array(0.0)})
            await one.result(TIMEOUT_S)
            submits = [client.submit("identity", {"input_fp32": array(float(i))}) for i in range(10_000)]
            tasks = await asyncio.gather(*submits)
            waiting = [asyncio.create_task(task.result(120)) for task in tasks]
            await asyncio.sleep(0)
            assert connections() - before <= MOST_CONNECTIONS
            results = await asyncio.gather(*waiting)
            assert connections() - before <= MOST_CONNECTIONS
            assert [result.outputs["output_fp32"][0, 0] for result in results] == list(range(10_000))

    def connections() -> int:
        return len([c for c in psutil.Process().net_connections("tcp") if c.status == "ESTABLISHED"])

    asyncio.run(test())


def test_a_task_can_be_found_again_by_its_id(client: Client, stack: Up) -> None:
    """Another client waits for it, and reads it when it is long done."""
    task = client.submit("slow", {"seconds": array(0.5)})
    with Client(stack.broker_url) as other:
        again = other.task(task.id)
        assert again.result(TIMEOUT_S).outputs["slept"].tolist() == [[0.5]]
        assert again.status() == "succeeded"
        assert other.task("nobody-knows-this").status() == "queued"
        with pytest.raises(ResultTimeoutError):
            other.task("nobody-knows-this").result(0.1)
        with pytest.raises(InvalidInputError, match="task id"):
            other.task("")


def test_map_keeps_the_order_and_bounds_what_is_under_way(client: Client) -> None:
    """However large the source is, no more than the window is taken from it ahead of the results."""
    taken = 0

    def source() -> Iterator[dict[str, np.ndarray]]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield {"input_fp32": array(float(i))}

    ahead = []
    for number, result in enumerate(client.map("identity", source(), window=64)):
        assert result.outputs["output_fp32"].tolist() == [[float(number)]]
        ahead.append(taken - number)
    assert len(ahead) == 1000
    assert max(ahead) <= 2 * 64
    assert list(client.map("identity", [])) == []


def test_map_raises_the_first_error_unless_told_otherwise(client: Client) -> None:
    """And can be left early."""
    inputs = [{"x": array(1.0)}, {"x": array(-1.0)}, {"x": array(2.0)}]
    results = client.map("picky", inputs)
    assert next(results).outputs["y"].tolist() == [[2.0]]
    with pytest.raises(ModelFaultError):
        next(results)
    with pytest.raises(InvalidInputError, match="window"):
        next(client.map("picky", inputs, window=0))


def listening(stack: Up) -> int:
    """Clients that wait at their event streams."""
    with stack.redis() as redis:
        return sum(other["cmd"] == "xread" for other in redis.client_list())


def test_a_client_that_is_closed_leaves_nobody_waiting(stack: Up) -> None:
    """Another thread that waits for a result is told."""
    client = Client(stack.broker_url)
    errors: list[SamphireError] = []

    def wait() -> None:
        try:
            client.task("nobody-knows-this").result()
        except SamphireError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    before = listening(stack)
    waiting.start()
    eventually(lambda: listening(stack) > before, 10, "a client that waits")
    client.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert [type(error) for error in errors] == [ClientClosedError]
    client.close()
    with pytest.raises(ClientClosedError):
        client.submit("identity", {"input_fp32": array(1.0)})


def test_a_client_used_inside_its_own_map_is_an_error_and_no_deadlock(client: Client) -> None:
    """The source of `map` is read on the client's thread."""

    def source() -> Iterator[dict[str, np.ndarray]]:
        yield client.submit("identity", {"input_fp32": array(1.0)}).result().outputs  # type: ignore[misc]

    with pytest.raises(SamphireError, match="within its own thread"):
        list(client.map("identity", source()))
