"""What a new user runs first: the demo, the training script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from kombu.entity import Queue

from samphire_broker.queues import inference_queue, intake
from samphire_workers.app import app
from tests.stacks import ENDS_S, SAMPHIRE, clean_environment

ROOT = Path(__file__).parents[1]


def run(*command: str, threads: int = 0) -> subprocess.CompletedProcess[str]:
    env = clean_environment() | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S, check=False, cwd=ROOT, env=env)


def test_the_demo_shows_the_main_job() -> None:
    """Accuracy on held-out images, drawings, plain Celery and an error; then nothing is left running."""
    ended = run(SAMPHIRE, "demo")
    assert ended.returncode == 0, ended.stderr
    accuracy = re.search(r"^accuracy: (0\.\d+)$", ended.stdout, re.MULTILINE)
    assert accuracy and float(accuracy[1]) >= 0.97
    for expected in (
        r"^requests/s: [\d,]+",
        r"^p50: [\d.]+ ms",
        "says . .*is .",
        "plain Celery: ",
        r"^a chain, digits 1 \+ digits 2 -> identity: version 1 says \d .*, is \d$",
        "^a bad request is not even queued: InvalidInputError",
        "^a failure of the model: ",
        r"^its dead letter: reason \w+, [1-9]\d+ bytes as sent; it can be redriven$",
        r"^a model of one's own, dropped into .*/demo_models/ink, answers \d+\.\d s later: \d+\.\d$",
        r"^Flower shows the tasks: http://127\.0\.0\.1:\d+ ",
    ):
        assert re.search(expected, ended.stdout, re.MULTILINE), expected
    assert "ready" in ended.stderr


def test_the_digits_model_is_trained_by_its_script(tmp_path: Path) -> None:
    """Both versions reach 97 % on held-out images, or the script fails."""
    # One thread: several that wait for each other take three times the work on cores that others use too.
    ended = run(sys.executable, "-m", "samphire_workers.training.digits", str(tmp_path), threads=1)
    assert ended.returncode == 0, ended.stderr
    accuracies = re.findall(r"accuracy (0\.\d+)", ended.stdout)
    assert len(accuracies) == 2 and min(map(float, accuracies)) >= 0.97
    for version in ("1", "2"):
        trained = tmp_path / "digits" / version / "model.onnx"
        shipped = ROOT / "model_repository" / "digits" / version / "model.onnx"
        assert trained.stat().st_size == pytest.approx(shipped.stat().st_size, rel=0.05)


def test_queues_are_declared_for_celery_applications() -> None:
    """Each with an exchange of its own name; the stock consumer has none of them."""
    for queue in (intake(), inference_queue("digits"), inference_queue("digits", "acme")):
        assert isinstance(queue, Queue)
        assert queue.name == queue.exchange.name == queue.routing_key
    assert [queue.name for queue in app.conf.task_queues] == ["samphire.control"]
    assert app.conf.task_default_queue == "celery"
    assert app.conf.accept_content == ["json"]


@pytest.mark.parametrize("command", ["up", "demo"])
def test_help_is_there(command: str) -> None:
    """With the flags of the ports."""
    ended = run(SAMPHIRE, command, "--help")
    assert ended.returncode == 0
    assert "--triton-grpc-port" in ended.stdout
