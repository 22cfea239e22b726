"""Flower beside a running stack: who gets in, and what it shows of whose tasks."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from celery import Celery

from samphire import Backoff, Client, InvalidInputError
from samphire_broker.digits import load_split
from samphire_broker.embedded.flower import kept_password
from samphire_broker.settings import Settings
from samphire_broker.webhooks.endpoint import Endpoint
from samphire_broker.webhooks.registry import open_registry
from samphire_workers.monitoring.celery_events import EVENTS_A_TASK
from tests.browser import open_page
from tests.stacks import SAMPHIRE, Up, clean_environment, eventually, running_stack, running_valkey
from tests.support.names import KEYS
from tests.support.plain import plain_celery

TIMEOUT_S = 30
SECRET = 987654.125
"""A number that stands nowhere but in a task's input."""
BURST = 1_000
MANY = 20_000
SHOWN_PER_S = Settings().events_per_s / EVENTS_A_TASK
SCREENSHOTS = "SAMPHIRE_SCREENSHOTS"
"""Names the folder where the pictures of Flower's pages are kept, for the documentation."""


@dataclass
class Flower:
    """The HTTP interface of a stack's Flower."""

    address: str
    user: str
    password: str

    def get(self, path: str, credentials: str | None = None, method: str = "GET") -> tuple[int, str]:
        """Status and body; with the right credentials unless others are given, none at all if they are empty."""
        given = f"{self.user}:{self.password}" if credentials is None else credentials
        headers = {"Authorization": "Basic " + b64encode(given.encode()).decode()} if given else {}
        connection = HTTPConnection(self.address, timeout=TIMEOUT_S)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def page(self, path: str) -> str:
        """The body of something that is there."""
        status, body = self.get(path)
        assert status == 200, f"{path}: {status} {body}"
        return body

    def failures(self) -> set[str]:
        """The ids of all failed tasks that are shown."""
        return set(json.loads(self.page("/api/tasks?state=FAILURE")))

    def ended(self, task_id: str) -> dict[str, Any]:
        """What is known of a task, once it has ended."""

        def look() -> dict[str, Any] | None:
            status, body = self.get(f"/api/task/info/{task_id}")
            info: dict[str, Any] = json.loads(body) if status == 200 else {}
            return info if info.get("state") in ("SUCCESS", "FAILURE", "REVOKED") else None

        found: dict[str, Any] = eventually(look, TIMEOUT_S, f"the end of {task_id} in Flower")
        return found


def connect(up: Up, password: str | None = None) -> Flower:
    """Flower of a stack, once it has heard of the worker."""
    ready = up.ready
    password = password or Path(ready["flower_password_file"]).read_text().strip()
    flower = Flower(urlsplit(ready["flower_url"]).netloc, ready["flower_user"], password)
    eventually(lambda: "worker1@" in flower.page("/api/workers?status=1"), TIMEOUT_S, "the worker's heartbeat")
    return flower


@pytest.fixture(scope="module")
def flower(stack: Up) -> Flower:
    """Flower of the session's stack."""
    return connect(stack)


@pytest.fixture
def plain(stack: Up) -> Iterator[Celery]:
    """A Celery application that knows nothing of Samphire."""
    with plain_celery(stack.broker_url) as app:
        yield app


# -- who gets in ------------------------------------------------------------------------------------


@pytest.mark.parametrize("credentials", ["", "samphire:", "samphire:wrong", "admin:{password}", "samphire:{password} "])
def test_nobody_gets_in_without_the_password(flower: Flower, credentials: str) -> None:
    """Neither to a page nor to the API, not to read and not to act."""
    credentials = credentials.format(password=flower.password)
    for path in (
        "/",
        "/tasks",
        "/workers",
        "/broker",
        "/task/some",
        "/api/tasks",
        "/api/workers",
        "/api/task/info/some",
    ):
        assert flower.get(path, credentials)[0] == 401, path
    for path in ("/tasks/datatable", "/api/task/revoke/some", "/api/task/send-task/samphire.infer"):
        assert flower.get(path, credentials, method="POST")[0] == 401, path
    assert flower.get("/api/tasks")[0] == 200


def test_what_stays_open_tells_counts_alone(flower: Flower, client: Client) -> None:
    """Flower itself answers /metrics and /healthcheck to anyone: neither has ids or arguments."""
    task = client.submit("identity", {"input_fp32": np.array([[SECRET]], np.float32)})
    kwargs = flower.ended(task.id)["kwargs"]
    assert flower.get("/healthcheck", "") == (200, "OK")
    status, metrics = flower.get("/metrics", "")
    assert status == 200 and 'flower_events_total{task="samphire.infer"' in metrics
    for told in (task.id, kwargs, str(SECRET)):
        assert told not in metrics


def test_the_password_is_for_its_owner_only(stack: Up, flower: Flower) -> None:
    """In a file that nobody else can read, in no command line and in no log."""
    file = Path(stack.ready["flower_password_file"])
    assert file.parent == stack.data_dir
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(flower.password) >= 32
    assert not any(flower.password in command for command in stack.commands().values())
    for log in (stack.output, *(stack.data_dir / "logs").iterdir()):
        assert flower.password not in log.read_text(), log


def test_a_data_directory_keeps_its_password(tmp_path: Path) -> None:
    """And no other has the same."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    passwords = [kept_password(tmp_path / folder / "flower-password") for folder in ("a", "a", "b")]
    assert passwords[0] == passwords[1] != passwords[2]


def test_the_environments_password_is_taken(tmp_path: Path, stack: Up) -> None:
    """Then none is made, and the ready file names none."""
    env = {"SAMPHIRE_TRITON_URLS": stack.triton_grpc, "SAMPHIRE_FLOWER_PASSWORD": "a: b"}
    with (
        running_valkey(tmp_path / "valkey") as valkey,
        running_stack(tmp_path, env={**env, "SAMPHIRE_BROKER_URL": valkey.url}) as up,
    ):
        assert up.ready["flower_password_file"] is None
        assert not (up.data_dir / "flower-password").exists()
        assert connect(up, "a: b").get("/api/tasks", "samphire:a")[0] == 401


@pytest.mark.parametrize("password", ["with,comma", "schlüssel", "line\nbreak"])
def test_a_password_that_flower_cannot_take_is_refused(tmp_path: Path, password: str) -> None:
    """At start, by name and without showing it."""
    command = [SAMPHIRE, "up", "--data-dir", str(tmp_path), "--flower-port", "0"]
    env = {**clean_environment(), "SAMPHIRE_FLOWER_PASSWORD": password, "SAMPHIRE_BROKER_URL": "redis://127.0.0.1:1"}
    env["SAMPHIRE_TRITON_URLS"] = "127.0.0.1:1"
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=env)
    assert ended.returncode == 1
    assert "SAMPHIRE_FLOWER_PASSWORD" in ended.stderr
    assert password not in ended.stderr and "Traceback" not in ended.stderr


# -- what it shows ----------------------------------------------------------------------------------


def assert_numbers_are_hidden(text: str) -> None:
    """Neither as text nor as a tensor's bytes."""
    assert str(SECRET) not in text
    assert b64encode(np.array([SECRET], np.float32).tobytes()).decode().rstrip("=")[:5] not in text


@pytest.mark.parametrize("by", ["sdk", "plain"])
def test_a_succeeded_task_is_shown_without_its_numbers(flower: Flower, client: Client, plain: Celery, by: str) -> None:
    """Name, state, runtime, worker, and of the arguments model, names, datatypes and shapes."""
    if by == "sdk":
        task = client.submit("identity", {"input_fp32": np.array([[SECRET, SECRET]], np.float32)})
        task.result(TIMEOUT_S)
        task_id = task.id
    else:
        tensor = {"name": "input_fp32", "datatype": "FP32", "shape": [1, 2], "data": [SECRET, SECRET]}
        kwargs = {"model_name": "identity", "inputs": [tensor]}
        sent = plain.send_task("samphire.infer", kwargs=kwargs, queue="inference")
        sent.get(TIMEOUT_S)
        task_id = sent.id
    info = flower.ended(task_id)
    assert (info["name"], info["state"]) == ("samphire.infer", "SUCCESS")
    assert (info["args"], info["kwargs"]) == ("()", "identity: input_fp32 FP32[1, 2]")
    assert 0 < info["runtime"] < TIMEOUT_S
    assert info["received"] <= info["started"] <= info["succeeded"] <= time.time()
    assert info["worker"].startswith("worker1@")
    listed = json.loads(flower.page("/api/tasks?sort_by=-received&limit=50"))
    assert listed[task_id]["state"] == "SUCCESS"
    assert_numbers_are_hidden(json.dumps([info, listed]) + flower.page(f"/task/{task_id}"))


def test_a_failed_task_is_shown_with_its_exception(stack: Up, flower: Flower) -> None:
    """The same that the client gets, and no numbers."""
    with Client(stack.broker_url, validate=False) as careless:  # else it would not even be queued
        task = careless.submit("identity", {"input_fp32": np.array([[SECRET]], np.float64)})
        with pytest.raises(InvalidInputError) as raised:
            task.result(TIMEOUT_S)
    info = flower.ended(task.id)
    assert (info["name"], info["state"]) == ("samphire.infer", "FAILURE")
    assert info["kwargs"] == "identity: input_fp32 FP64[1, 1]"
    assert info["exception"].startswith("InvalidInputError(")
    assert "expected FP32, given FP64" in info["exception"] and "expected FP32, given FP64" in str(raised.value)
    assert info["worker"].startswith("worker1@")
    page = flower.page(f"/task/{task.id}")
    assert "FAILURE" in page and "InvalidInputError" in page
    assert_numbers_are_hidden(json.dumps(info) + page)


def test_a_retried_task_is_shown(flower: Flower, client: Client) -> None:
    """As RETRY with the error while it waits, as SUCCESS in the end."""
    inputs = {"task": np.array([[time.time_ns()]]), "failures": np.array([[1]])}
    task = client.submit("flaky", inputs, backoff=Backoff(base_s=4, jitter=0))

    def info() -> dict[str, Any]:
        status, text = flower.get(f"/api/task/info/{task.id}")
        return json.loads(text) if status == 200 else {}

    waiting = eventually(lambda: info() if info().get("state") == "RETRY" else None, TIMEOUT_S, "the retry")
    assert "not yet" in waiting["exception"] and waiting["name"] == "samphire.infer"
    task.result(TIMEOUT_S)
    assert flower.ended(task.id)["state"] == "SUCCESS"


def test_a_webhook_that_does_not_arrive_is_shown(stack: Up, flower: Flower, client: Client) -> None:
    """As a task of its own that has failed, with the reason and without its URL."""
    settings = Settings(broker_url=stack.broker_url, data_dir=stack.data_dir)
    with open_registry(settings) as registry:
        registry.add(Endpoint("flower", "https://receiver.invalid/secret-token", schedule_s=(0.0,)), "v1")
        try:
            client.submit("identity", {"input_fp32": np.ones((1, 2), np.float32)}, webhook="flower").result(TIMEOUT_S)
            ended = KEYS.ended_deliveries("flower")
            eventually(lambda: registry.client.zcard(ended), TIMEOUT_S, "the end of the delivery")
            (delivery,) = registry.client.zrange(ended, 0, -1)
        finally:
            registry.remove("flower")
    info = flower.ended(delivery.decode())
    assert (info["name"], info["state"]) == ("samphire.deliver", "FAILURE")
    assert info["exception"] and "secret-token" not in json.dumps(info)


@pytest.mark.parametrize("by", ["plain", "flower"])
def test_a_revoked_task_is_shown(flower: Flower, client: Client, plain: Celery, by: str) -> None:
    """One that waits behind slow ones, revoked by Celery's control command or by Flower's own button."""
    seconds, alone = {"seconds": np.array([[55]], np.float32)}, {"micro_batch": False}
    slow = [client.submit("slow", seconds, parameters=alone).id for _ in range(8)]  # no more than four are at Triton
    try:
        last = slow.pop()
        assert client.task(last).status() == "queued"
        if by == "plain":
            plain.control.revoke(last)
        else:
            assert flower.get(f"/api/task/revoke/{last}", method="POST")[0] == 200
        assert client.task(last).status() == "queued"  # it ends when its message is reached
    finally:
        plain.control.revoke(slow)
    info = flower.ended(last)
    assert info["state"] == "REVOKED" and info["revoked"]
    assert client.task(last).status() == "cancelled"
    # What it was is shown once its message is reached.
    eventually(lambda: "slow: seconds FP32[1, 1]" in flower.page(f"/task/{last}"), TIMEOUT_S, "its arguments")
    assert "REVOKED" in flower.page(f"/task/{last}")


def test_the_worker_is_shown(stack: Up, flower: Flower) -> None:
    """In the API with what it serves, and on a page of its own."""
    found = eventually(lambda: json.loads(flower.page("/api/workers?refresh=1")), TIMEOUT_S, "the worker's answer")
    ((name, info),) = found.items()
    assert name.startswith("worker1@")
    assert info["registered"] == ["samphire.infer"]
    assert info["stats"]["pid"] == stack.ready["pids"]["worker"][0]
    assert name in flower.page("/workers")
    assert "samphire.control" in flower.page(f"/worker/{name}")
    assert "samphire.control" in flower.page("/broker")


def test_a_busy_lane_leaves_flower_at_ease_and_hides_no_failure(stack: Up, flower: Flower) -> None:
    """Of 20,000 tasks a sample is shown, of those that fail every one, and Flower answers all the while."""
    good, bad = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float64)
    earlier = flower.failures()
    waits_s: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            began = time.monotonic()
            flower.page("/tasks")  # one that does not answer is an error after `TIMEOUT_S`
            flower.page("/api/tasks?limit=15&sort_by=-received")
            waits_s.append(time.monotonic() - began)

    start = time.time()
    with ThreadPoolExecutor(1) as thread:
        looking = thread.submit(look)
        try:
            batches = ({"input_fp32": good if i % 100 else bad} for i in range(MANY))
            with Client(stack.broker_url, validate=False) as client:  # else what fails would not be queued
                results = list(client.map("identity", batches, window=MANY, return_exceptions=True))
        finally:
            done.set()
        looking.result()
    elapsed_s = time.time() - start
    assert sum(isinstance(result, InvalidInputError) for result in results) == MANY / 100
    eventually(lambda: len(flower.failures() - earlier) == MANY / 100, TIMEOUT_S, "every failure")
    shown = json.loads(flower.page("/api/tasks?state=SUCCESS")).values()
    sample = sum((task["received"] or 0) >= start for task in shown)
    print(f"{sample} of {MANY} shown in {elapsed_s:.1f} s; {len(waits_s)} looks took {sum(waits_s):.2f} s")
    assert 0 < sample <= SHOWN_PER_S * (elapsed_s + 2)


def test_what_was_seen_to_begin_is_seen_to_end(stack: Up, flower: Flower, plain: Celery) -> None:
    """A burst of a producer that tells of each task that it sends, far beyond what a lane shows of itself."""
    plain.conf.task_send_sent_event = True
    inputs = [{"name": "input_fp32", "datatype": "FP32", "shape": [1, 1], "data": [1]}]
    body = {"model_name": "identity", "inputs": inputs}
    with plain.pool.acquire(block=True) as connection, plain.amqp.Producer(connection) as producer:
        sent = [
            plain.send_task("samphire.infer", kwargs=body, queue="inference", producer=producer).id
            for _ in range(BURST)
        ]
    with stack.redis() as server:
        metas = [(KEYS.meta_prefix + task_id) for task_id in sent]
        eventually(lambda: all(b"SUCCESS" in (meta or b"") for meta in server.mget(metas)), TIMEOUT_S, "every end")

    def states() -> dict[str, str]:
        shown = json.loads(flower.page(f"/api/tasks?limit={20 * BURST}"))
        return {task_id: shown[task_id]["state"] for task_id in sent if task_id in shown}

    eventually(lambda: len(states()) == BURST, TIMEOUT_S, "every task in Flower")
    eventually(lambda: set(states().values()) == {"SUCCESS"}, TIMEOUT_S, "the end of each in Flower")


def test_pages_in_a_real_browser(stack: Up, flower: Flower, client: Client, tmp_path: Path) -> None:
    """The list of tasks and a page of each kind in Chromium: real digits, and one image that is none."""
    images = load_split().held_out_images
    tasks = [client.submit("digits", {"image": images[i : i + 1]}) for i in range(7)]
    for task in tasks:
        assert flower.ended(task.id)["state"] == "SUCCESS"
    with Client(stack.broker_url, validate=False) as careless:  # else it would not even be queued
        failed = careless.submit("digits", {"image": images[0]})
    assert flower.ended(failed.id)["state"] == "FAILURE"
    pictures = Path(os.environ.get(SCREENSHOTS, tmp_path))
    address = f"http://{flower.user}:{flower.password}@{flower.address}"
    listed = open_page(f"{address}/tasks", tmp_path / "profile", pictures / "flower-tasks.png")
    for task in (*tasks, failed):
        assert task.id in listed
    for shown in ("samphire.infer", "digits: image FP32[1, 8, 8]", "SUCCESS", "FAILURE", "worker1@"):
        assert shown in listed, shown
    page = open_page(f"{address}/task/{failed.id}", tmp_path / "profile", pictures / "flower-task.png")
    for shown in ("samphire.infer", "digits: image FP32[8, 8]", "FAILURE", "InvalidInputError", "worker1@"):
        assert shown in page, shown
    # One number alone may be there by chance, as a runtime; two neighbours in an image may not.
    neighbours = np.stack([images[:7, :, :-1], images[:7, :, 1:]], axis=-1).reshape(-1, 2)
    pixels = {f"{a}{between}{b}" for a, b in neighbours if a % 0.125 and b % 0.125 for between in (", ", ",", " ")}
    assert pixels and not [pixel for pixel in pixels if pixel in listed or pixel in page]
    assert all((pictures / name).stat().st_size > 0 for name in ("flower-tasks.png", "flower-task.png"))
