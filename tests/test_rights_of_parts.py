"""The users of docs/deployment.md, each with the real part: a worker process, Flower, the SDK, plain Celery."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from base64 import b64encode
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from celery import Celery, chain, chord

from samphire import Client
from samphire.transport.address import broker_of
from samphire_broker.embedded.flower import FLOWER_USER, flower_spec
from samphire_broker.embedded.ports import LOOPBACK, choose_port
from samphire_broker.embedded.process import Part
from tests.stacks import Up, Valkey, eventually
from tests.support.plain import plain_celery
from tests.test_rights import PASSWORD, rules, user_of
from tests.workers import running_worker

TIMEOUT_S = 60


def url_for(valkey: Valkey, name: str) -> str:
    return user_of(valkey, name, "on", f">{PASSWORD}", *rules()[name].split(" "))


class Flower:
    """Flower on a broker, asked by its API."""

    def __init__(self, folder: Path, url: str) -> None:
        self.port = choose_port(0, "")
        self.part = Part(flower_spec(folder, self.port, broker_of(url), PASSWORD))

    def get(self, path: str) -> Any:
        """What it answers, as JSON."""
        connection = HTTPConnection(LOOPBACK, self.port, timeout=20)
        token = b64encode(f"{FLOWER_USER}:{PASSWORD}".encode()).decode()
        try:
            connection.request("GET", path, headers={"Authorization": f"Basic {token}"})
            answer = connection.getresponse()
            return json.loads(answer.read()) if answer.status == 200 else None
        finally:
            connection.close()


@contextlib.contextmanager
def running_flower(folder: Path, url: str) -> Iterator[Flower]:
    """Flower in a process of its own."""
    with asyncio.Runner() as runner:
        flower = Flower(folder, url)
        runner.run(flower.part.start())
        try:
            yield flower
        finally:
            runner.run(flower.part.stop())


def infer(app: Celery, value: float) -> Any:
    tensor = {"name": "input_fp32", "datatype": "FP32", "shape": [1, 1], "data": [value]}
    return app.signature(
        "samphire.infer", kwargs={"model_name": "identity", "inputs": [tensor]}, queue="inference", immutable=True
    )


def test_the_documented_users_are_enough_for_real_parts(valkey: Valkey, stack: Up, tmp_path: Path) -> None:
    """Tasks, a chain and a chord come to their end, Flower sees the worker and the tasks, and may ask the worker."""
    worker_url = url_for(valkey, "worker")
    with (
        running_worker(tmp_path / "worker1", worker_url, stack.triton_grpc) as worker,
        running_flower(tmp_path / "flower", url_for(valkey, "flower")) as flower,
        Client(url_for(valkey, "producer")) as client,
        plain_celery(url_for(valkey, "celery")) as app,
    ):
        task = client.submit("identity", {"input_fp32": np.ones((1, 9000), np.float32)})
        assert task.result(TIMEOUT_S).outputs["output_fp32"].sum() == 9000
        later = client.submit("identity", {"input_fp32": np.ones((1, 1), np.float32)}, delay_s=600)
        eventually(lambda: later.status() == "scheduled", 20, "its schedule")
        assert later.cancel()
        assert infer(app, 1).apply_async().get(timeout=TIMEOUT_S)
        assert chain(infer(app, 1), infer(app, 2), app=app).apply_async().get(timeout=TIMEOUT_S)
        assert chord([infer(app, 1), infer(app, 2)], app=app)(infer(app, 3)).get(timeout=TIMEOUT_S)
        eventually(lambda: flower.get("/api/workers?refresh=1&workername="), 40, "the worker in Flower")
        (name,) = flower.get("/api/workers")
        assert name.startswith("worker1@")

        def seen() -> Any:
            found = flower.get("/api/tasks")
            return found and any(one["state"] == "SUCCESS" for one in found.values())

        give_up = time.monotonic() + TIMEOUT_S
        while not seen():  # events are a sample: something has to happen
            assert time.monotonic() < give_up, "a task in Flower"
            client.submit("identity", {"input_fp32": np.ones((1, 1), np.float32)}).result(TIMEOUT_S)
        assert flower.get("/api/queues/length") is not None
        assert "NOPERM" not in worker.log() and "may not run" not in worker.log()
        assert "No permissions" not in (tmp_path / "flower" / "logs" / "flower.log").read_text()
        for user in ("flower", "celery"):
            with plain_celery(url_for(valkey, user)) as operator:
                answers = operator.control.inspect(timeout=20, destination=[name]).ping()
            assert answers == {name: {"ok": "pong"}}, user
