"""What a worker takes that has nothing to do."""

from __future__ import annotations

import time

import psutil

from benchmarks.stack import BenchStack, Figures

TENANTS = 30_000
NAMES = "samphire:sub:queues"
FORGOTTEN_S = 60.0
"""After so long a queue that is empty and unused is forgotten, and a moment later all are."""
WATCHED_S = 15.0


def idle(stack: BenchStack, scale: float) -> Figures:
    """Shares of a core that an idle worker takes after many tenants were seen once, before and after it forgets."""
    if scale < 1:
        return {}  # a queue is forgotten after a minute, however many there are
    with stack.redis() as server:
        tenants = [f"inference.identity@t{number}" for number in range(TENANTS)]
        for first in range(0, len(tenants), 1000):
            server.sadd(NAMES, *tenants[first : first + 1000])
        time.sleep(5)
        before = share(stack.worker_pid, WATCHED_S)
        until = time.monotonic() + 3 * FORGOTTEN_S
        while left := server.smismember(NAMES, [tenants[0], tenants[-1]]):
            if not any(left):
                break
            assert time.monotonic() < until, "the tenants' queues were not forgotten"
            time.sleep(0.5)
        time.sleep(5)
        assert server.scard(NAMES) < len(tenants) / 100, "most tenants' queues were not forgotten"
        return {"idle_share_before": before, "idle_share": share(stack.worker_pid, WATCHED_S)}


def share(pid: int, seconds: float) -> float:
    """The share of a core that a process takes."""
    process = psutil.Process(pid)

    def spent() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    began, before = time.monotonic(), spent()
    time.sleep(seconds)
    return (spent() - before) / (time.monotonic() - began)
