"""Triton hangs, is away, or has lost one model: nothing is burned, and work resumes by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import redis
from tritonclient.grpc import service_pb2, service_pb2_grpc

from samphire import Backoff, Client, Task, WorkerCrashError
from samphire_workers.triton.endpoint import CONTROL_TIMEOUT_S
from tests.stacks import Up, eventually, only, running_stack, standing_still
from tests.support.names import KEYS

TIMEOUT_S = 60
OUTAGE_S = float(os.environ.get("SAMPHIRE_TEST_OUTAGE_S", "8"))
X = np.arange(4, dtype=np.float32).reshape(1, 4)


def submit_some(client: Client, count: int, model: str = "identity") -> list[Task]:
    return [client.submit(model, {"input_fp32": X + i}) for i in range(count)]


def check(tasks: list[Task]) -> None:
    for i, task in enumerate(tasks):
        np.testing.assert_array_equal(task.result(TIMEOUT_S).outputs["output_fp32"], X + i)


def nothing_burned(server: redis.Redis) -> bool:
    tried = server.scan_iter(KEYS.task_prefix + "*")
    return server.zcard(KEYS.dead) == 0 and not [key for key in tried if server.hexists(key, "attempts")]


def held(server: redis.Redis) -> int:
    """Messages between claim and settlement."""
    return sum(server.hlen(key) for key in server.scan_iter("samphire:worker:*:inflight"))


@contextmanager
def triton(address: str) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def test_a_triton_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    """What it holds goes back to the queue while it still stands; no attempt, no letter; then all are answered."""
    with (
        running_stack(tmp_path, *only(tmp_path, "identity")) as up,
        Client(up.broker_url) as client,
        up.redis() as server,
    ):
        check(submit_some(client, 10))
        with standing_still(up.ready["pids"]["triton"]):
            began = time.monotonic()
            tasks = submit_some(client, 300)
            eventually(lambda: held(server), 5, "tasks that it holds")
            eventually(lambda: not held(server), CONTROL_TIMEOUT_S, "their return")
            assert "does not answer" in up.worker_log() or "is away" in up.worker_log()
            time.sleep(max(0.0, OUTAGE_S - (time.monotonic() - began)))
            assert not held(server), "nothing is claimed meanwhile"
            assert {task.status() for task in tasks} == {"queued"}
            assert nothing_burned(server)
        check(tasks)
        assert nothing_burned(server)


def test_a_hang_is_told_from_a_slow_model(tmp_path: Path) -> None:
    """A short time limit of the worker's own burns no attempt while the server hangs."""
    env = {"SAMPHIRE_TRITON_TIMEOUT_S": "1"}
    with (
        running_stack(tmp_path, *only(tmp_path, "identity"), env=env) as up,
        Client(up.broker_url) as client,
        up.redis() as server,
    ):
        check(submit_some(client, 10))
        with standing_still(up.ready["pids"]["triton"]):
            tasks = submit_some(client, 20)
            eventually(lambda: held(server), 5, "tasks that it holds")
            eventually(lambda: not held(server), CONTROL_TIMEOUT_S, "their return")
            assert nothing_burned(server)
        check(tasks)
        assert nothing_burned(server)


def test_a_model_that_hangs_is_timed_out_and_tried_again(tmp_path: Path) -> None:
    """The server answers, the model does not: that is an attempt, and its budget ends it."""
    env = {"SAMPHIRE_TRITON_TIMEOUT_S": "0.5", "SAMPHIRE_BACKOFF_BASE_S": "0.05"}
    with running_stack(tmp_path, *only(tmp_path, "slow"), env=env) as up, Client(up.broker_url) as client:
        task = client.submit("slow", {"seconds": np.array([[30]], np.float32)})
        with pytest.raises(TimeoutError):
            task.result(TIMEOUT_S)
        letter = client.dead_letters.get(task.id)
        assert (letter.reason, letter.attempts, len(letter.history)) == ("timeout", 3, 3)
        # Triton was told each time: the model is free again.
        assert client.submit("slow", {"seconds": np.array([[0]], np.float32)}).result(TIMEOUT_S)


def test_a_request_that_kills_the_server_is_isolated(tmp_path: Path) -> None:
    """It cannot take Triton down for ever: it is a dead letter at its budget, and nobody else's budget suffers."""
    with (
        running_stack(tmp_path, *only(tmp_path, "identity", "deadly")) as up,
        Client(up.broker_url) as client,
        up.redis() as server,
    ):
        first = up.ready["pids"]["triton"]
        values = [1.0, 2.0, 999.0, 3.0]
        deadly = [client.submit("deadly", {"x": np.array([[x]], np.float32)}, max_attempts=1) for x in values]
        others = submit_some(client, 50)
        with pytest.raises(WorkerCrashError, match="1 of 1 attempts"):
            deadly[2].result(180)
        assert up.ready["pids"]["triton"] != first
        for x, task in zip(values, deadly, strict=True):
            if x != 999:
                assert task.result(TIMEOUT_S).outputs["y"].tolist() == [[2 * x]]
        check(others)
        assert server.zcard(KEYS.dead) == 1
        assert "died with this task alone" in client.dead_letters.get(deadly[2].id).history[0].error


def test_two_endpoints_each_with_a_breaker_for_each_model(tmp_path: Path, stack: Up) -> None:
    """One loses a model, then all of itself: the other serves on, and nothing is burned."""
    with running_stack(tmp_path / "second", *only(tmp_path, "identity", "digits")) as second:
        urls = f"{stack.triton_grpc},{second.triton_grpc}"
        with (
            running_stack(tmp_path / "both", env={"SAMPHIRE_TRITON_URLS": urls}) as up,
            Client(up.broker_url) as client,
            up.redis() as server,
        ):
            check(submit_some(client, 100))
            with triton(second.triton_grpc) as stub:
                stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="identity"), timeout=30)
            check(submit_some(client, 200))
            eventually(lambda: f"model identity is away on {second.triton_grpc}" in up.worker_log(), 10, "the breaker")
            image = np.zeros((1, 8, 8), np.float32)
            before = executions(second.triton_grpc, "digits")
            for _ in range(20):
                client.submit("digits", {"image": image}).result(TIMEOUT_S)
            assert executions(second.triton_grpc, "digits") > before, "its other models are asked still"
            with triton(second.triton_grpc) as stub:
                stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="identity"), timeout=30)
            eventually(lambda: f"model identity is back on {second.triton_grpc}" in up.worker_log(), 10, "its return")
            before = executions(second.triton_grpc, "identity")
            check(submit_some(client, 200))
            assert executions(second.triton_grpc, "identity") > before
            os.kill(second.ready["pids"]["triton"], signal.SIGKILL)
            check(submit_some(client, 200))
            assert nothing_burned(server)


def executions(address: str, model: str) -> int:
    """How many requests a Triton has answered for a model."""
    with triton(address) as stub:
        stats = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model), timeout=10).model_stats
        return sum(version.inference_count for version in stats)


def test_an_endpoint_that_never_was_holds_up_nobody(tmp_path: Path, stack: Up) -> None:
    """Nor does a model that nobody has wait for it for ever."""
    urls = f"127.0.0.1:9,{stack.triton_grpc}"
    with running_stack(tmp_path, env={"SAMPHIRE_TRITON_URLS": urls}) as up, Client(up.broker_url) as client:
        check(submit_some(client, 50))


def test_a_full_queue_at_triton_burns_nothing(stack: Up, client: Client) -> None:
    """It has more than it can do: the model is left alone for a while, and all are answered."""
    with triton(stack.triton_grpc) as stub:
        seconds = {"seconds": np.array([[0.01]], np.float32)}
        tasks = [client.submit("queued", seconds, backoff=Backoff(600, 600, 0)) for _ in range(12)]
        began = stack.worker_log().count("model queued is away")

        def is_refused() -> bool:
            """Whether the worker was, while somebody else fills the queue."""
            calls = [stub.ModelInfer.future(slow_request(0.5), timeout=60) for _ in range(4)]
            tasks.append(client.submit("queued", seconds, backoff=Backoff(600, 600, 0)))
            for call in calls:
                call.exception()  # it waits for the end
            return stack.worker_log().count("model queued is away") > began

        eventually(is_refused, 20, "a task that meets the full queue")
        for task in tasks:  # a single retry would take ten minutes
            task.result(TIMEOUT_S)
    with stack.redis() as server:
        assert not [task for task in tasks if server.exists(KEYS.task_prefix + task.id)]


def slow_request(seconds: float) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="queued")
    request.inputs.add(name="seconds", datatype="FP32", shape=[1, 1])
    request.raw_input_contents.append(np.float32(seconds).tobytes())
    return request


def test_the_time_that_is_left_is_tritons_timeout(client: Client) -> None:
    """So that a model whose queue policy lets requests say so never begins what nobody waits for."""
    seconds = {"seconds": np.array([[0]], np.float32)}
    usual = client.submit("queued", seconds).result(TIMEOUT_S).outputs["timeout_us"].item()
    assert usual == 60e6, "SAMPHIRE_TRITON_TIMEOUT_S"
    short = client.submit("queued", seconds, deadline_s=20).result(TIMEOUT_S).outputs["timeout_us"].item()
    assert 10e6 < short < 21e6  # by a clock that is the broker's but for its round trip
    own = client.submit("queued", seconds, parameters={"timeout": 5_000_000}).result(TIMEOUT_S)
    assert own.outputs["timeout_us"].item() == 5e6
