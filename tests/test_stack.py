"""`samphire up`: what it starts, how it ends, what it survives."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from samphire import Client
from samphire_broker.embedded.ports import LOOPBACK, choose_port
from samphire_broker.embedded.tritonserver import SHARED_MEMORY
from tests.stacks import (
    ENDS_S,
    SAMPHIRE,
    Up,
    clean_environment,
    eventually,
    only,
    running_stack,
    running_valkey,
    stand_still,
    start_up,
    stop,
)

X = np.ones((1, 4), np.float32)


TIMEOUT_S = 60


def infer(broker_url: str) -> None:
    with Client(broker_url) as client:
        output = client.submit("identity", {"input_fp32": X}).result(TIMEOUT_S).outputs["output_fp32"]
    np.testing.assert_array_equal(output, X)


def shared_memory(up: Up) -> set[str]:
    command = " ".join(psutil.Process(up.ready["pids"]["triton"]).cmdline())
    prefix = command.partition("shm-region-prefix-name=")[2].partition("-python")[0]
    assert prefix.startswith("samphire-")
    return {path.name for path in SHARED_MEMORY.glob(f"{prefix}-*")}


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(is_gone(process) for process in processes)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it went in between
        return True


def kill(pid: int) -> None:
    """kill -9, and proof that it was no longer there afterwards."""
    process = psutil.Process(pid)
    process.kill()
    eventually(lambda: all_gone([process]), 10, f"the end of {pid}")


def test_the_ready_file_says_what_scripts_need(stack: Up) -> None:
    """Addresses, and process ids that are those of the parts."""
    ready = stack.ready
    assert ready["broker_url"].startswith("redis://127.0.0.1:")
    assert stack.ready_file.stat().st_mode & 0o777 == 0o600, "it may hold a password"
    assert set(ready["pids"]) == {"broker", "triton", "worker", "flower"}
    names = {part: psutil.Process(ready["pids"][part]).name() for part in ("broker", "triton")}
    assert names == {"broker": "valkey-server", "triton": "tritonserver"}
    assert all("samphire_workers.app" in psutil.Process(pid).cmdline() for pid in ready["pids"]["worker"])
    assert "flower" in psutil.Process(ready["pids"]["flower"]).cmdline()
    for address in (ready["triton_grpc"], ready["triton_http"], ready["flower_url"].removeprefix("http://")):
        host, _, port = address.rpartition(":")
        assert host == LOOPBACK and int(port)


def test_everything_listens_on_loopback_only(stack: Up) -> None:
    """Nothing of the stack is reached from outside."""
    listening: list[str] = []
    for process in stack.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that was short-lived
            connections = process.net_connections("inet")
            listening += [connection.laddr.ip for connection in connections if connection.status == "LISTEN"]
    assert len(listening) >= 5
    assert {ip.removeprefix("::ffff:") for ip in listening} == {LOOPBACK}


def test_the_broker_is_durable_and_bounded(stack: Up) -> None:
    """Append-only file on and synced before a submit returns, nothing evicted, memory limited."""
    with stack.redis() as client:
        settings = client.config_get("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
    assert (settings["appendonly"], settings["appendfsync"]) == ("yes", "always")
    assert settings["maxmemory-policy"] == "noeviction"
    assert int(settings["maxmemory"]) > 0


def test_the_shipped_models_are_not_written_to(stack: Up, repository: Path) -> None:
    """Triton serves a copy in the data directory."""
    command = " ".join(psutil.Process(stack.ready["pids"]["triton"]).cmdline())
    assert f"--model-repository={stack.data_dir / 'model_repository'}" in command
    assert "--model-control-mode=explicit" in command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Neither a process nor shared memory, not even after kill -9 of `samphire up`."""
    with running_stack(tmp_path, *only(tmp_path, "identity")) as up:
        children, regions = up.children(), shared_memory(up)
        assert len(children) >= 5 and regions
        stop(up, number)
        assert up.process.returncode == (-9 if number == signal.SIGKILL else 0)
        eventually(lambda: all_gone(children), 20, "the end of all children")
        eventually(lambda: not regions & {path.name for path in SHARED_MEMORY.iterdir()}, 20, "clean shared memory")


def test_ctrl_c_while_parts_start(tmp_path: Path) -> None:
    """Stops what had started."""
    up = start_up(tmp_path)
    try:
        eventually(lambda: len(up.children()) >= 2, 30, "the first parts")
        children = up.children()
        stop(up, signal.SIGINT)
        assert up.process.returncode == 0
        eventually(lambda: all_gone(children), 20, "the end of all children")
        assert not up.ready_file.exists()
    finally:
        stop(up, signal.SIGKILL)


def is_of_group(process: psutil.Process, group: int) -> bool:
    """Whether a process belongs to a group, and runs: what has ended waits for init, which takes its time."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_a_part_that_dies_is_restarted(tmp_path: Path) -> None:
    """The ready file names the new process, the models are back, and work goes on: each part in turn."""
    with running_stack(tmp_path, *only(tmp_path, "identity", "digits"), "--workers", "2") as up:
        infer(up.broker_url)
        for part in ("broker", "triton", "worker", "flower"):
            before = up.ready["pids"]
            victim = before[part][0] if part == "worker" else before[part]
            kill(victim)
            eventually(lambda: up.ready["pids"][part] != before[part], 60, f"another {part} in the ready file")  # noqa: B023
            left = [each for each in psutil.process_iter() if is_of_group(each, victim)]
            assert not left, f"{part} left processes behind"
            infer(up.broker_url)
            with Client(up.broker_url) as client:
                for version in (1, 2):
                    image = np.zeros((1, 8, 8), np.float32)
                    result = client.submit("digits", {"image": image}, version=version).result(TIMEOUT_S)
                    assert result.model_version == str(version), part


def test_queued_tasks_survive_a_restart_of_the_stack(tmp_path: Path) -> None:
    """The data directory is all that it takes."""
    options = ("--broker-port", str(choose_port(0, "")), *only(tmp_path, "identity"))
    with running_stack(tmp_path / "first", *options, data_dir=tmp_path / "data") as up:
        for pid in up.ready["pids"]["worker"]:
            stand_still(pid)  # so that they stay queued
        with Client(up.broker_url) as client:
            ids = [client.submit("identity", {"input_fp32": X + i}).id for i in range(50)]
            assert client.task(ids[-1]).status() == "queued"
        stop(up, signal.SIGKILL)
    second = running_stack(tmp_path / "second", *options, data_dir=tmp_path / "data")
    with second as up, Client(up.broker_url) as client:
        for i, task_id in enumerate(ids):
            output = client.task(task_id).result(TIMEOUT_S).outputs["output_fp32"]
            np.testing.assert_array_equal(output, X + i)


def run_up(tmp_path: Path, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [SAMPHIRE, "up", "--data-dir", str(tmp_path / "data"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=ENDS_S, check=False, env={**clean_environment(), **(env or {})}
    )


@pytest.mark.parametrize(("flag", "address"), [("--broker-port", "broker_url"), ("--flower-port", "flower_url")])
def test_a_taken_port_names_the_flag(tmp_path: Path, stack: Up, flag: str, address: str) -> None:
    """And starts nothing."""
    taken = str(urlsplit(stack.ready[address]).port)
    ended = run_up(tmp_path, "--ports", "free", flag, taken)
    assert ended.returncode == 1
    assert f"port {taken} on 127.0.0.1 is taken" in ended.stderr
    assert flag in ended.stderr
    assert "starting" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_all_taken_ports_are_named_at_once(tmp_path: Path, stack: Up) -> None:
    """Also one that two flags want; and the flag that moves all parts aside."""
    broker, flower = (str(urlsplit(stack.ready[address]).port) for address in ("broker_url", "flower_url"))
    asked = ("--broker-port", broker, "--flower-port", flower)
    twice = str(choose_port(0, ""))
    ended = run_up(tmp_path, "--ports", "free", *asked, "--triton-grpc-port", twice, "--triton-http-port", twice)
    assert ended.returncode == 1
    assert f"port {broker} on 127.0.0.1 is taken" in ended.stderr
    assert f"port {flower} on 127.0.0.1 is taken" in ended.stderr
    assert f"port {twice} of --triton-http-port is that of another flag" in ended.stderr
    assert "--ports free chooses a free one for all" in ended.stderr
    assert "starting" not in ended.stderr


def test_a_second_stack_in_the_same_folder_is_refused(stack: Up) -> None:
    """Two brokers on one append-only file would destroy it."""
    ended = subprocess.run(
        [SAMPHIRE, "up", "--data-dir", str(stack.data_dir)],
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
        env=clean_environment(),
    )
    assert ended.returncode == 1
    assert "another stack runs in" in ended.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--broker-port", "70000"], "0<=x<=65535"),
        (["--workers", "0"], "1<=x<=64"),
        (["--broker-memory", "much"], "expected a size such as 512mb"),
        (["--broker-fsync", "never"], "'always', 'everysec'"),
        (["--model-repository", "/nowhere"], "does not exist"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: list[str], text: str) -> None:
    """As click does, with exit code 2."""
    ended = run_up(tmp_path, *options)
    assert ended.returncode == 2
    assert text in ended.stderr


def test_environment_replaces_parts(tmp_path: Path, stack: Up) -> None:
    """With both replaced only a worker and Flower are started, and the worker serves."""
    env = {"SAMPHIRE_TRITON_URLS": stack.triton_grpc}
    with running_valkey(tmp_path / "valkey") as valkey:
        env["SAMPHIRE_BROKER_URL"] = valkey.url
        with running_stack(tmp_path, env=env) as up:
            assert up.ready["broker_url"] == valkey.url
            assert up.ready["pids"]["broker"] is None
            assert up.ready["pids"]["triton"] is None
            infer(valkey.url)


def test_a_broker_elsewhere_that_is_away_or_refuses(tmp_path: Path) -> None:
    """The wait is told at once; a password that is wrong ends it, and nothing is started."""
    port = choose_port(0, "")
    with running_valkey(tmp_path / "valkey") as valkey:
        wrong = valkey.url.replace("redis://", "redis://somebody:wrong@")
        refused = run_up(tmp_path, "--ports", "free", env={"SAMPHIRE_BROKER_URL": wrong})
    assert (refused.returncode, "starting" in refused.stderr) == (1, False)
    assert "refused the credentials" in refused.stderr and ":wrong" not in refused.stderr, refused.stderr
    env = {"SAMPHIRE_BROKER_URL": f"redis://127.0.0.1:{port}/0"}
    up = start_up(tmp_path / "away", env=env)
    try:
        eventually(lambda: "waiting for it, for at most 60 s" in up.output.read_text(), 30, "the message")
        assert not up.children()
    finally:
        stop(up, signal.SIGINT)
    assert up.process.returncode == 0
