"""A broker that drops everybody, stands still, is full, or refuses writes for a while, under load on a real stack.

Workers and SDK recover by themselves. A submit returned an id, and then the task ends, once; or it raised, and then the
task may have been queued all the same, but not twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis

from samphire import Client, SamphireError, TransientError
from tests.faults.ends import Ends, nothing_is_left
from tests.stacks import Up, eventually, only, running_stack, standing_still
from tests.support.names import KEYS

TIMEOUT_S = 60
FAULT_S = 3.0


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A stack that may be troubled; no test here ends a process."""
    folder = tmp_path_factory.mktemp("stack")
    with running_stack(folder, *only(folder, "identity")) as up:
        yield up


class Load:
    """Submits from one thread until it is stopped; what was accepted, and what was raised."""

    def __init__(self, url: str) -> None:
        self.client = Client(url)
        self.accepted: list[Any] = []
        self.raised: list[SamphireError] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._submit)

    def _submit(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            value = np.array([[number]], np.float32)
            try:
                self.accepted.append((number, self.client.submit("identity", {"input_fp32": value})))
            except SamphireError as error:
                self.raised.append(error)
                time.sleep(0.02)

    def __enter__(self) -> Load:
        self._thread.start()
        eventually(lambda: len(self.accepted) > 100, 30, "some tasks")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.client.close()

    def goes_on(self) -> None:
        """Submits are accepted again."""
        count = len(self.accepted)
        eventually(lambda: len(self.accepted) > count + 100, 30, "more tasks")

    def all_are_answered(self) -> None:
        """Each accepted task has its own answer; what was raised says that it may be tried again."""
        self._stop.set()
        self._thread.join(TIMEOUT_S)
        for number, task in self.accepted:
            assert task.result(TIMEOUT_S).outputs["output_fp32"].tolist() == [[number]]
        wrong = [error for error in self.raised if not isinstance(error, TransientError)]
        assert not wrong, wrong[:3]
        assert all(error.retryable for error in self.raised)


def dropped(up: Up, server: redis.Redis, mine: set[int]) -> None:
    """Every connection is closed, again and again: the clients', the workers', Flower's."""
    until, killed = time.monotonic() + FAULT_S, 0
    while time.monotonic() < until or killed <= 20:
        for other in server.client_list():
            if int(other["id"]) not in mine:
                killed += int(server.client_kill_filter(_id=other["id"], skipme=False))
        time.sleep(0.3)


def paused(up: Up, server: redis.Redis, mine: set[int]) -> None:
    """Commands wait, all of them."""
    began = time.monotonic()
    server.client_pause(int(FAULT_S * 1000), all=True)
    server.ping()
    assert time.monotonic() - began > FAULT_S * 0.9


def stopped(up: Up, server: redis.Redis, mine: set[int]) -> None:
    """The process stands still."""
    with standing_still(up.ready["pids"]["broker"]):
        time.sleep(FAULT_S)


def full(up: Up, server: redis.Redis, mine: set[int]) -> None:
    """No memory is left, not even for what the lanes write."""
    before = server.config_get("maxmemory")["maxmemory"]
    server.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            server.set("more", "x" * 100)
        time.sleep(FAULT_S)
    finally:
        server.config_set("maxmemory", before)


def replica(up: Up, server: redis.Redis, mine: set[int]) -> None:
    """It is made the replica of a server that is not there: it reads, and refuses writes."""
    server.replicaof("127.0.0.1", 1)
    try:
        with pytest.raises(redis.exceptions.ReadOnlyError):
            server.set("more", "x")
        time.sleep(FAULT_S)
    finally:
        server.replicaof("NO", "ONE")


def too_few_replicas(up: Up, server: redis.Redis, mine: set[int]) -> None:
    """It waits for replicas that it does not have."""
    server.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(redis.exceptions.ResponseError, match="NOREPLICAS"):
            server.set("more", "x")
        time.sleep(FAULT_S)
    finally:
        server.config_set("min-replicas-to-write", 0)


FAULTS: tuple[Callable[[Up, redis.Redis, set[int]], None], ...] = (
    *(dropped, paused, stopped, full, replica, too_few_replicas),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_under_load(own_stack: Up, fault: Callable[[Up, redis.Redis, set[int]], None]) -> None:
    """Every accepted task is answered, no end is published twice, and nothing is left; no process was restarted."""
    before = own_stack.ready["pids"]
    with own_stack.redis() as server:
        ends = Ends(own_stack.broker_url)
        try:
            with Load(own_stack.broker_url) as load:
                fault(own_stack, server, {int(server.client_id()), *ends.client_ids()})
                load.goes_on()
                load.all_are_answered()
            eventually(lambda: nothing_is_left(server), 20, "the end of all tasks")
            counted = ends.read()
        finally:
            ends.close()
        accepted = {task.id for _, task in load.accepted}
        assert {counted[task_id] for task_id in accepted} == {1}
        others = {task_id: count for task_id, count in counted.items() if task_id not in accepted}
        assert set(others.values()) <= {1} and len(others) <= len(load.raised), "queued more often than submitted"
        assert not server.zcard(KEYS.dead), "something failed"
        assert not list(server.scan_iter(f"{KEYS.task_prefix}*")), "an attempt was burned"
    assert own_stack.ready["pids"] == before
