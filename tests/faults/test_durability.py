"""What survives when the machine loses power: kill -9 of Valkey, and its append-only file cut back to the last fsync.

A kill alone shows nothing, because the kernel still writes what the process has written. So every write to the file and
every fdatasync of it is recorded (strace): what was written before the last fdatasync that returned had begun is on the
disk, the rest of the file is cut off, and a new server loads what is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import redis

from samphire import AsyncClient, SamphireError
from samphire.wire import keys
from samphire_broker.embedded.ports import choose_port
from samphire_broker.embedded.valkey import server_binary
from tests.stacks import ENDS_S, bound, eventually, running_valkey

LONG = os.environ.get("SAMPHIRE_FAULTS") == "long"
TRIALS = 100 if LONG else 3
BOUND_S = 2.0
"""What `everysec` may cost: the submits of so long before the failure."""

_CALL = re.compile(
    r"^\s*(\d+) +([\d.]+) "  # thread and time
    r"(?:(\w+)\((\d+)<([^>]*)>.*?(?:= (-?\d+)|<unfinished \.\.\.>)"  # a call and its file, ended or not
    r"|<\.\.\. (\w+) resumed>.*= (-?\d+))"
)


def strace() -> str:
    """The command; without it a person's test is skipped."""
    found = shutil.which("strace")
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail("strace is missing: `make test` as root installs it")
    pytest.skip("strace is missing: apt-get install strace")


@dataclass
class Disk:
    """What a trace says of one file: bytes written, and bytes that are on the disk for certain."""

    written: int = 0
    synced: int = 0
    syncs: list[float] = field(default_factory=list)
    """When each fdatasync returned, in s since 1970."""
    longest_s: float = 0.0
    """How long the slowest fdatasync took."""


def on_disk(trace: str, name: str) -> Disk:
    """Read a trace; only what was written before an fdatasync began is synced by it."""
    disk, begun, unfinished = Disk(), dict[str, tuple[int, float]](), dict[str, tuple[str, str]]()
    for line in trace.splitlines():
        if not (call := _CALL.match(line)):
            continue
        thread, at, verb, _, path, result, resumed, late = call.groups()
        if resumed:
            verb, path, result = *unfinished.pop(thread, (resumed, "")), late
        elif result is None:
            unfinished[thread] = verb, path
        if not path.endswith(name):
            continue
        if verb == "write" and result is not None:
            disk.written += int(result)
        elif verb in ("fdatasync", "fsync"):
            if not resumed:
                begun[thread] = disk.written, float(at)
            if result == "0":
                written, since = begun[thread]
                disk.synced = max(disk.synced, written)
                disk.syncs.append(float(at))
                disk.longest_s = max(disk.longest_s, float(at) - since)
    return disk


@dataclass
class Trial:
    """One power failure."""

    accepted: int
    lost: list[float]
    """For each accepted task that is not there any more, how long before the kill its submit returned."""
    cut_bytes: int
    syncs: int
    slowest_sync_s: float


async def submit_until_killed(url: str, least: int, pid: int) -> tuple[list[tuple[str, float]], float]:
    """Submits from many at once; ids with the time when each returned, and the time of the kill.

    That is at least two seconds, and so many submits, after the start.
    """
    accepted: list[tuple[str, float]] = []
    killed = asyncio.Event()

    async def submit(client: AsyncClient) -> None:
        while not killed.is_set():
            task = await client.submit("m", {"x": np.zeros((1, 16), np.float32)})
            accepted.append((task.id, time.time()))

    clients = [AsyncClient(url, validate=False) for _ in range(3)]
    load = [asyncio.create_task(submit(client)) for client in clients for _ in range(16)]
    await asyncio.sleep(2.0 + random.uniform(0, 1.2))
    while len(accepted) < least:
        await asyncio.sleep(0.01)
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    killed.set()
    for client in clients:
        await client.close()
    ends = await asyncio.gather(*load, return_exceptions=True)
    assert all(end is None or isinstance(end, SamphireError) for end in ends), ends
    return accepted, at


def power_failure(folder: Path, fsync: str) -> Trial:
    """Run a server under a trace and load, kill it, cut its file back, and look what a new one has."""
    folder.mkdir()
    port, trace = choose_port(0, ""), folder / "trace"
    command = [strace(), "-f", "-y", "-ttt", "-s", "0", "--seccomp-bpf", "-e", "trace=write,fdatasync,fsync"]
    command += ["-o", str(trace), server_binary(), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--appendfsync", fsync, "--save", "", "--auto-aof-rewrite-percentage", "0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(bound(command, "KILL"), stdout=log, stderr=log, start_new_session=True)
    try:
        with redis.Redis(port=port, socket_timeout=10) as client:
            eventually(lambda: answers(client), 20, "the broker's answer")
            pid = int(client.info("server")["process_id"])
        accepted, killed_at = asyncio.run(submit_until_killed(f"redis://127.0.0.1:{port}/0", 1000, pid))
        process.wait(20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    (file,) = (folder / "appendonlydir").glob("*.incr.aof")
    disk = on_disk(trace.read_text(), file.name)
    size = file.stat().st_size
    # The kill may come before the trace tells of the last write: that one is in the file, and not synced.
    assert size >= disk.written, "the trace tells of more than there is"
    assert disk.syncs, "nothing was ever synced"
    os.truncate(file, disk.synced)
    with running_valkey(folder) as after:
        messages = after.client.lrange(keys.queue_list("inference.m", keys.PRIORITIES["normal"]), 0, -1)
    there = [json.loads(message)["headers"]["id"] for message in messages]
    assert len(there) == len(set(there)), "a task is there twice"
    kept = set(there)
    lost = [killed_at - at for task_id, at in accepted if task_id not in kept]
    return Trial(len(accepted), lost, size - disk.synced, len(disk.syncs), disk.longest_s)


def answers(client: redis.Redis) -> bool:
    """Whether the server does."""
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.mark.timeout(0 if LONG else ENDS_S)
def test_always_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    """However many submits one fsync carries, none returns before it."""
    trials = [power_failure(tmp_path / str(number), "always") for number in range(TRIALS)]
    for trial in trials:
        assert trial.accepted and trial.syncs > 1
        assert trial.lost == []


@pytest.mark.timeout(0 if LONG else ENDS_S)
def test_everysec_loses_no_more_than_it_says(tmp_path: Path) -> None:
    """Only what was accepted within the bound before the failure; and something is cut off, or nothing was shown."""
    trials: list[Trial] = []
    while len(trials) < TRIALS or not any(trial.lost for trial in trials):  # one that is killed right after an fsync
        trials.append(power_failure(tmp_path / str(len(trials)), "everysec"))
    for trial in trials:
        assert max(trial.lost, default=0.0) <= BOUND_S + trial.slowest_sync_s, "the disk is given the time it takes"
    assert sum(trial.cut_bytes for trial in trials) > 0


def test_what_a_trace_says() -> None:
    """A write that comes while an fdatasync is under way is not on the disk when it returns."""
    trace = """\
7 1.0 write(9</d/a.aof>, ""..., 100) = 100
7 1.1 write(8<TCP:[1]>, ""..., 5) = 5
8 1.2 fdatasync(9</d/a.aof> <unfinished ...>
7 1.3 write(9</d/a.aof>, ""..., 50) = 50
8 1.4 <... fdatasync resumed>) = 0
7 1.5 write(9</d/a.aof>, ""..., 7) = 7
8 1.6 fdatasync(9</d/a.aof>) = -1 EIO (Input/output error)
7 1.7 write(9</d/a.aof>, ""..., 11 <unfinished ...>
"""
    assert on_disk(trace, "a.aof") == Disk(written=157, synced=100, syncs=[1.4], longest_s=pytest.approx(0.2))
