"""`samphire submit | watch | result | cancel | queues` against the real stack."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from samphire import Client
from samphire.wire import keys
from tests.stacks import ENDS_S, SAMPHIRE, Up, Valkey, bound, clean_environment, eventually, samphire


def lines(ended: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_submit_watch_and_result(stack: Up, tmp_path: Path) -> None:
    """The id goes to stdout, so a script can go on with it; the datatypes are the model's."""
    submitted = samphire(stack.broker_url, "submit", "slow", "--input", "seconds=[[1]]")
    task_id = submitted.stdout.strip()
    assert submitted.returncode == 0
    watched = samphire(stack.broker_url, "watch", task_id, "--json")
    assert watched.returncode == 0
    assert [event["status"] for event in lines(watched)][-1] == "succeeded"
    saved = tmp_path / "answer.npz"
    answered = samphire(stack.broker_url, "result", task_id, "--json", "--save", str(saved))
    assert lines(answered)[0]["outputs"] == [{"name": "slept", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]
    with np.load(saved) as arrays:
        assert arrays["slept"].tolist() == [[1.0]]
    assert "slept FP32[1, 1]: 1.0" in samphire(stack.broker_url, "result", task_id).stdout
    assert samphire(stack.broker_url, "cancel", task_id).returncode == 1


@pytest.mark.parametrize("form", ["json", "stdin", "npz", "npy"])
def test_inputs_come_from_files(stack: Up, tmp_path: Path, form: str) -> None:
    """JSON, also from stdin, .npz and .npy."""
    array = np.array([[1, 2]], np.float32)
    arguments = {
        "json": ["--inputs", str(tmp_path / "in.json")],
        "stdin": ["--inputs", "-"],
        "npz": ["--inputs", str(tmp_path / "in.npz")],
        "npy": ["--input", f"input_fp32=@{tmp_path / 'in.npy'}"],
    }[form]
    text = json.dumps({"input_fp32": [[1, 2]]})
    (tmp_path / "in.json").write_text(text)
    np.savez(tmp_path / "in.npz", input_fp32=array)
    np.save(tmp_path / "in.npy", array)
    ended = samphire(stack.broker_url, "submit", "identity", *arguments, "--wait", "--json", stdin=text)
    assert ended.returncode == 0, ended.stderr
    assert lines(ended)[0]["outputs"][0]["data"] == [1, 2]
    assert "is queued" in ended.stderr


def test_text_and_what_json_cannot_hold(stack: Up) -> None:
    """Strings in and out; NaN comes as bytes."""
    ended = samphire(stack.broker_url, "submit", "normalize_text", "--input", 'text=[["  É "]]', "--wait", "--json")
    assert lines(ended)[0]["outputs"][0]["data"] == ["é"]
    ended = samphire(stack.broker_url, "submit", "normalize_text", "--input", 'text=[["  É "], ["\\u001b"]]', "--wait")
    assert "  normalized BYTES[2, 1]: 'é', '" in ended.stdout, "text, and no bytes"
    assert "\u001b" not in ended.stdout
    with Client(stack.broker_url) as client:
        task = client.submit("identity", {"input_fp32": np.array([[np.nan]], np.float32)})
        task.result(20)
    ended = samphire(stack.broker_url, "result", task.id, "--json", "--delete")
    assert lines(ended)[0]["outputs"][0]["hex"] == "0000c07f"
    eventually(lambda: samphire(stack.broker_url, "result", task.id).returncode == 1, 20, "the deletion")


def test_cancel(stack: Up) -> None:
    """Of a scheduled task."""
    task_id = samphire(stack.broker_url, "submit", "slow", "--input", "seconds=[[1]]", "--delay-s", "60").stdout.strip()
    ended = samphire(stack.broker_url, "cancel", task_id, "--json")
    assert ended.returncode == 0
    assert lines(ended) == [{"id": task_id, "cancelled": True, "status": "cancelled"}]
    watched = samphire(stack.broker_url, "watch", task_id)
    assert watched.returncode == 1
    assert "TaskCancelledError" in watched.stderr


@contextlib.contextmanager
def watching(broker_url: str, task_id: str) -> Iterator[IO[str]]:
    """What `samphire watch` says while it waits; it is ended as by Ctrl-C."""
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": broker_url}
    # What runs in the background of a shell ignores SIGINT, and so would its children.
    command = bound(["env", "--default-signal=INT", SAMPHIRE, "watch", task_id], "TERM")
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as watch:
        assert watch.stderr is not None
        try:
            yield watch.stderr
        finally:
            watch.send_signal(signal.SIGINT)
            assert watch.wait(ENDS_S) == 130 and "the task goes on; `samphire watch" in watch.stderr.read()


def test_watch_says_why_a_task_waits(stack: Up, valkey: Valkey) -> None:
    """At once, and whenever that changes."""
    inputs = {"x": np.ones((1, 1), np.float32)}
    with Client(valkey.url) as client:  # where no worker is
        task = client.submit("one", inputs)
        with watching(valkey.url, task.id) as said:
            assert said.readline() == "(no worker runs; 0 of the 1 tasks in queue inference.one are before it)\n"
            client.submit("one", inputs, priority="high")
            assert "1 of the 2 tasks" in said.readline()
    with Client(stack.broker_url) as client:
        later = client.submit("slow", {"seconds": np.zeros((1, 1), np.float32)}, delay_s=3600)
        with watching(stack.broker_url, later.id) as said:
            assert said.readline().startswith("(scheduled for 20")
        later.cancel()


def test_a_result_is_deleted_once_it_is_printed(stack: Up, tmp_path: Path) -> None:
    """Not where it could not be saved, or printed."""
    with Client(stack.broker_url) as client:
        task = client.submit("identity", {"input_fp32": np.ones((1, 1), np.float32)})
        task.result(20)
    ended = samphire(stack.broker_url, "result", task.id, "--delete", "--save", str(tmp_path / "none" / "x.npz"))
    assert ended.returncode == 1 and "No such file" in ended.stderr
    environment = clean_environment() | {"SAMPHIRE_BROKER_URL": stack.broker_url}
    with Path("/dev/full").open("w") as full:
        command = [SAMPHIRE, "result", task.id, "--delete"]
        unprinted = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=ENDS_S, check=False
        )
    assert unprinted.returncode == 1 and "Traceback" not in unprinted.stderr
    assert samphire(stack.broker_url, "result", task.id, "--delete", "--save", str(tmp_path / "x.npz")).returncode == 0
    assert np.load(tmp_path / "x.npz")["output_fp32"] == 1
    eventually(lambda: samphire(stack.broker_url, "result", task.id).returncode == 1, 20, "the deletion")


def test_watch_ends_with_what_is_wrong(stack: Up) -> None:
    """Nobody knows the task, or it has failed."""
    unknown = samphire(stack.broker_url, "watch", "no-such-task")
    assert unknown.returncode == 1 and unknown.stdout == ""
    assert "UnknownTaskError: task no-such-task: nobody knows it" in unknown.stderr
    failed = samphire(stack.broker_url, "submit", "picky", "--input", "x=[[-1]]", "--max-attempts", "1").stdout.strip()
    watched = samphire(stack.broker_url, "watch", failed)
    assert watched.returncode == 1 and "ModelFaultError: " in watched.stderr
    told = lines(samphire(stack.broker_url, "watch", failed, "--json"))[-1]
    assert told["kind"] == "error" and told["error"].startswith("ModelFaultError: ")


def test_queues(valkey: Valkey, stack: Up) -> None:
    """What waits where; who works."""
    with Client(valkey.url) as client, Client(valkey.url, tenant="acme") as acme:
        for _ in range(3):
            client.submit("m", {"x": np.zeros(1)}, priority="low")
        acme.submit("m", {"x": np.zeros(1)}, priority="high")
    valkey.client.lpush(keys.INTAKE, "anything")
    ended = samphire(valkey.url, "queues")
    assert ended.returncode == 0
    rows = {line.split()[0]: line.split()[1:] for line in ended.stdout.splitlines()[1:4]}
    expected = {"inference": [1, 0, 0, 0], "inference.m": [0, 0, 3, 0], "inference.m@acme": [1, 0, 0, 0]}
    assert {name: list(map(int, row[:4])) for name, row in rows.items()} == expected
    assert all(row[4:] == ["no", "worker", "runs"] for row in rows.values())
    assert "no worker serves these queues" in ended.stderr
    seen = lines(samphire(stack.broker_url, "queues", "--json"))[0]
    assert [worker["alive"] for worker in seen["workers"]] == [True]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["submit", "nope", "--input", "x=[1]"], 1, "UnknownModelError: no model 'nope'"),
        (["submit", "digits", "--input", "image=[[1]]"], 1, "expected shape"),
        (["submit", "digits", "--input", "image=[[1],[1,2]]"], 1, "lists of equal lengths"),
        (["submit", "digits", "--input", "image=[[true]]"], 1, "expected FP32 values"),
        (["submit", "digits"], 2, "--input NAME=VALUE or --inputs FILE"),
        (["submit", "digits", "--input", "image"], 2, "expected NAME=VALUE"),
        (["submit", "digits", "--input", "image=[1"], 2, "expected image=JSON"),
        (["submit", "digits", "--inputs", "-"], 2, "expected a JSON object"),
        (["submit", "identity", "--input", "input_fp32=[[1]]", "--priority", "urgent"], 2, "high"),
        (["submit", "identity", "--input", "input_fp32=[[1]]", "--delay-s", "-1"], 1, "delay_s"),
        (["submit", "identity", "--inputs", "/nowhere"], 2, "No such file"),
        (["submit", "slow", "--input", "seconds=[[2]]", "--wait", "--timeout-s", "0.2"], 4, "no result after 0.2 s"),
        (["result", "no-such-task"], 1, "nobody knows it"),
        (["result", "no-such-task", "--timeout-s", "2"], 1, "nobody knows it"),
        (["result", "x" * 300], 1, "expected a task id"),
        (["cancel"], 2, "Missing argument"),
        (["watch", "a", "--unknown"], 2, "No such option"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_wrong_use(stack: Up, arguments: list[str], code: int, text: str) -> None:
    """A message that says what was expected, and an exit code of its own kind."""
    ended = samphire(stack.broker_url, *arguments)
    assert ended.returncode == code, ended.stderr
    assert text in ended.stderr


@pytest.mark.parametrize("command", [["queues"], ["submit", "m", "--input", "x=[1]"], ["result", "a"], ["cancel", "a"]])
def test_a_broker_that_is_away(command: list[str]) -> None:
    """Has an exit code of its own; so does a URL that is none."""
    ended = samphire("redis://127.0.0.1:1/0", *command)
    assert ended.returncode == 3
    assert "the broker is away" in ended.stderr
    assert samphire("http://127.0.0.1", *command).returncode in (1, 2)
