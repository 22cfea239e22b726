"""Parts of the stack that die under load."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from samphire import Client, EndpointTimeoutError, SamphireError, Task, WorkerCrashError
from tests.stacks import (
    Up,
    eventually,
    only,
    running_stack,
    stand_still,
    standing_still,
)
from tests.support.names import KEYS
from tests.test_stack import TIMEOUT_S, X, all_gone, infer, kill


def test_a_killed_workers_tasks_are_done_by_another(tmp_path: Path) -> None:
    """kill -9 in the middle of it: every task is answered, none is lost."""
    with running_stack(tmp_path, *only(tmp_path, "slow"), "--workers", "2") as up:
        with Client(up.broker_url) as client:
            tasks = [client.submit("slow", {"seconds": np.array([[0.4]], np.float32)}) for _ in range(40)]
            victim = eventually(lambda: holder(up), 20, "a worker that holds started tasks")
            kill(victim)
            assert victim in {int(worker["pid"]) for worker in infos(up)}, "its lease was still there: it was lost"
            for task in tasks:
                assert task.result(TIMEOUT_S).outputs["slept"].shape == (1, 1)
        with up.redis() as client_:
            assert client_.zcard(KEYS.dead) == 0


def infos(up: Up) -> list[dict[str, object]]:
    with up.redis() as client:
        found = [client.get(f"samphire:worker:{worker.decode()}:info") for worker in client.smembers(KEYS.workers)]
    return [json.loads(info) for info in found if info]


def holder(up: Up) -> int:
    with up.redis() as client:
        for worker in client.smembers(KEYS.workers):
            info = client.get(f"samphire:worker:{worker.decode()}:info")
            if info and client.hlen(f"samphire:worker:{worker.decode()}:started"):
                return int(json.loads(info)["pid"])
    return 0


def test_a_task_that_takes_workers_down_is_dead_lettered_and_its_neighbours_are_not(tmp_path: Path) -> None:
    """Whenever it runs its worker dies: what ran beside it is answered, it ends at its budget, with its history."""
    with (
        running_stack(tmp_path, *only(tmp_path, "slow")) as up,
        Client(up.broker_url) as client,
        up.redis() as server,
    ):
        with standing_still(up.ready["pids"]["worker"][0]):  # so that one claim takes all: 16 of a new model at most
            poison = client.submit("slow", {"seconds": np.array([[55]], np.float32)})
            good = [client.submit("slow", {"seconds": np.array([[0.1]], np.float32)}) for _ in range(7)]
        beside = 0
        for attempt in range(1, 4):
            eventually(lambda: poison.status() == "running", 60, "its start")
            beside += sum(task.status() == "running" for task in good)
            pid = up.ready["pids"]["worker"][0]
            kill(pid)
            counted = str(attempt).encode()
            task_key = KEYS.task_prefix + poison.id
            eventually(lambda: server.hget(task_key, "attempts") == counted, 60, "its return")  # noqa: B023
        assert beside, "some ran in its micro-batch"
        for task in good:
            task.result(60)
        with pytest.raises(WorkerCrashError, match="3 of 3 attempts"):
            poison.result(60)
        letter = client.dead_letters.get(poison.id)
        assert (letter.reason, letter.attempts) == ("worker_crash", 3)
        assert [attempt.error for attempt in letter.history[:3]] == ["WorkerCrashError: the worker was lost"] * 3


def test_while_triton_is_away_nothing_is_burned(tmp_path: Path) -> None:
    """Tasks wait in their queue and are answered when it is back; no letter, no attempt."""
    with running_stack(tmp_path, *only(tmp_path, "identity")) as up:
        infer(up.broker_url)
        with Client(up.broker_url) as client, up.redis() as server:
            kill(up.ready["pids"]["triton"])
            tasks = [client.submit("identity", {"input_fp32": X + i}) for i in range(200)]
            for i, task in enumerate(tasks):
                np.testing.assert_array_equal(task.result(TIMEOUT_S).outputs["output_fp32"], X + i)
            assert "is away" in up.worker_log(), "the outage was noticed"
            assert server.zcard(KEYS.dead) == 0
            assert not list(server.scan_iter("samphire:task:*"))


def test_a_broker_restart_under_load_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    """The worker and the client reconnect by themselves; every accepted task is answered."""
    with running_stack(tmp_path, *only(tmp_path, "identity")) as up:
        before = up.ready["pids"]
        accepted = []
        stopping = threading.Event()
        with Client(up.broker_url) as client:

            def submit() -> None:
                while not stopping.is_set():
                    try:
                        accepted.append(client.submit("identity", {"input_fp32": X}))
                    except SamphireError:  # most are repeated by the client until the broker is back
                        time.sleep(0.05)

            submitter = threading.Thread(target=submit)
            submitter.start()
            eventually(lambda: len(accepted) > 200, 30, "some tasks")
            kill(before["broker"])
            eventually(lambda: up.ready["pids"]["broker"] != before["broker"], 60, "another broker")
            count = len(accepted)
            eventually(lambda: len(accepted) > count + 200, 30, "more tasks")
            stopping.set()
            submitter.join(30)
            for task in accepted:
                task.result(TIMEOUT_S)
        assert up.ready["pids"]["worker"] == before["worker"], "the worker was not restarted"


def test_a_warm_shutdown_finishes_what_is_held(tmp_path: Path) -> None:
    """SIGTERM under load: what was started is settled before the worker ends; the rest stays queued."""
    with running_stack(tmp_path, *only(tmp_path, "slow")) as up:
        with Client(up.broker_url) as client, up.redis() as server:
            tasks = [client.submit("slow", {"seconds": np.array([[0.3]], np.float32)}) for _ in range(60)]
            pid = eventually(lambda: holder(up), 20, "a worker that holds started tasks")
            worker = psutil.Process(pid)
            worker.terminate()
            eventually(lambda: all_gone([worker]), 60, "the end of the worker")
            assert not list(server.scan_iter("samphire:worker:*:inflight"))
            states = [task.status() for task in tasks]
            assert "succeeded" in states and set(states) <= {"succeeded", "queued", "running"}
            for task in tasks:  # the next worker
                task.result(TIMEOUT_S)
        assert "did not end in" not in up.worker_log()


@pytest.mark.parametrize("by", ["second signal", "timeout"])
def test_a_worker_that_may_not_finish_hands_back(tmp_path: Path, by: str) -> None:
    """What it holds returns to its queue as if it had not begun, and the worker ends at once."""
    env = {"SAMPHIRE_SHUTDOWN_TIMEOUT_S": "1" if by == "timeout" else "60"}
    with running_stack(tmp_path, *only(tmp_path, "slow"), env=env) as up:
        with Client(up.broker_url) as client, up.redis() as server:
            tasks = [
                client.submit("slow", {"seconds": np.array([[55 if i == 0 else 0]], np.float32)}) for i in range(30)
            ]
            worker = psutil.Process(eventually(lambda: holder(up), 20, "a worker that holds started tasks"))
            worker.terminate()
            if by == "second signal":
                eventually(lambda: "Warm shutdown" in up.worker_log(), 10, "the first signal")
                assert worker.is_running(), "it waits for what it holds"
                worker.terminate()
            eventually(lambda: all_gone([worker]), 10, "the end of the worker")
            assert not list(server.scan_iter("samphire:worker:*:inflight"))
            assert not list(server.scan_iter(KEYS.task_prefix + "*")), "no attempt is counted"
            assert tasks[0].status() in ("queued", "running")  # the next worker may have it already
            assert tasks[0].cancel(timeout_s=TIMEOUT_S) is True
            for task in tasks[1:]:
                task.result(TIMEOUT_S)
        assert "goes back to its queues" in up.worker_log()


def test_a_workers_memory_is_bounded_whatever_is_queued(tmp_path: Path) -> None:
    """50,000 small tasks, 100 of 600 KB, some of 16 MB, and messages near the limit: under 300 MB."""
    with running_stack(tmp_path, *only(tmp_path, "identity")) as up:
        worker = psutil.Process(up.ready["pids"]["worker"][0])
        most = 0

        def watch() -> None:
            nonlocal most
            while not done.is_set():
                most = max(most, worker.memory_info().rss)
                time.sleep(0.05)

        done = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with Client(up.broker_url) as client, up.redis() as server:
                list(client.map("identity", ({"input_fp32": X} for _ in range(50_000)), window=50_000))
                large = np.zeros((1, 150_000), np.float32)
                list(client.map("identity", ({"input_fp32": large} for _ in range(100)), window=100))
                huge = np.zeros((1, 4 * 2**20), np.float32)
                list(client.map("identity", ({"input_fp32": huge} for _ in range(6))))
                for number in range(40):
                    headers = b'"headers": {"id": "%d", "task": "samphire.infer"}' % number
                    server.lpush("inference.identity", b'{"body": "' + b"[" * 4_000_000 + b'", ' + headers + b"}")
                eventually(lambda: server.zcard(KEYS.dead) >= 40, 60, "40 dead letters")
        finally:
            done.set()
            watcher.join()
        print(f"most {most / 2**20:.0f} MB")
        assert most < 300 * 2**20, f"{most / 2**20:.0f} MB"


def stubs(up: Up, model: str) -> list[psutil.Process]:
    """The processes of a Python model."""
    commands = up.commands().items()
    return [process for process, words in commands if "triton_python_backend_stub" in words and f"/{model}/" in words]


def test_a_request_that_kills_its_model_is_isolated(stack: Up, client: Client) -> None:
    """Its neighbours are answered, the model comes back by itself, the guilty one is a dead letter at its budget."""
    values = [float(n) for n in range(20)]
    values[7] = 666.0
    before = {p.pid for p in stubs(stack, "deadly")}
    assert before
    tasks = [client.submit("deadly", {"x": np.array([[value]], np.float32)}) for value in values]
    for value, task in zip(values, tasks, strict=True):
        if value == 666:
            with pytest.raises(WorkerCrashError):
                task.result(120)
        else:
            assert task.result(120).outputs["y"].tolist() == [[2 * value]]
    assert not before & {p.pid for p in stubs(stack, "deadly")}  # it did die
    assert client.dead_letters.get(tasks[7].id).reason == "worker_crash"
    assert client.submit("deadly", {"x": np.ones((1, 1), np.float32)}).result(TIMEOUT_S)


def test_a_model_whose_process_is_killed_comes_back(stack: Up, client: Client) -> None:
    """Although Triton goes on to say that it is ready."""
    victims = stubs(stack, "deadly")
    assert victims
    for process in victims:
        kill(process.pid)
    results = list(client.map("deadly", [{"x": np.array([[n]], np.float32)} for n in range(50)]))
    assert [result.outputs["y"].tolist() for result in results] == [[[2.0 * n]] for n in range(50)]


def test_suspects_are_alone_among_all_workers(tmp_path: Path) -> None:
    """What dies while one of them runs is that one's doing; another worker's suspect waits, and is answered."""
    with (
        # Who is stopped for a while is not to be lost, however long the machine takes.
        running_stack(tmp_path, *only(tmp_path, "deadly"), "--workers", "2", env={"SAMPHIRE_LEASE_S": "120"}) as up,
        Client(up.broker_url) as client,
        up.redis() as server,
    ):
        one, two = up.ready["pids"]["worker"]

        def submit_suspect(value: float, tried: dict[str, int]) -> Task:
            task = client.submit("deadly", {"x": np.array([[value]], np.float32)})
            server.hset(KEYS.task_prefix + task.id, mapping={"attempts": 2, **tried})
            server.sadd(KEYS.tried, task.id)
            return task

        for value, tried in ((666.5, {"crashes": 2, "shared": 2}), (999.5, {"losses": 2})):
            triton, processes = up.ready["pids"]["triton"], {process.pid for process in stubs(up, "deadly")}
            assert processes
            try:
                stand_still(one)
                stand_still(two)
                poison = submit_suspect(value, tried)
                os.kill(one, signal.SIGCONT)
                eventually(lambda: poison.status() == "running", 20, "its start")  # noqa: B023
                stand_still(one)
                innocent = submit_suspect(1, tried)
                os.kill(two, signal.SIGCONT)
                eventually(
                    lambda: len(list(server.scan_iter("samphire:worker:*:inflight"))) == 2, 20, "the other's claim"
                )
            finally:
                os.kill(one, signal.SIGCONT)
                os.kill(two, signal.SIGCONT)
            with pytest.raises(WorkerCrashError, match="3 of 3 attempts" if value < 999 else "1 of 3 attempts"):
                poison.result(60)
            assert innocent.result(60).outputs["y"].tolist() == [[2]]
            assert not processes & {process.pid for process in stubs(up, "deadly")}  # it did die
            if value > 999:  # and all of Triton did
                eventually(lambda: up.ready["pids"]["triton"] != triton, 30, "another Triton")  # noqa: B023
            else:
                assert up.ready["pids"]["triton"] == triton
        eventually(lambda: not server.exists(KEYS.alone, KEYS.tried), 10, "the end")


def test_who_waits_for_another_worker_keeps_its_deadline(stack: Up, client: Client) -> None:
    """While another worker is alone with a model nothing of it is started here; the other models go on."""
    with stack.redis() as server:
        server.sadd(KEYS.tried, "somebody's")
        server.set(KEYS.alone, "elsewhere 1 identity", px=60_000)
        try:
            patient = client.submit("identity", {"input_fp32": X})
            hasty = client.submit("identity", {"input_fp32": X}, deadline_s=5)
            with pytest.raises(EndpointTimeoutError, match="deadline"):
                hasty.result(TIMEOUT_S)
            assert client.submit("deadly", {"x": np.ones((1, 1), np.float32)}).result(TIMEOUT_S)
            assert patient.status() == "queued"
            server.delete(KEYS.alone)
            assert patient.result(TIMEOUT_S)
        finally:
            server.delete(KEYS.alone)
            server.srem(KEYS.tried, "somebody's")
