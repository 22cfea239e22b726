"""The broker's clock counts: a worker or a client whose own clock is wrong changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import redis

from samphire import Client, EndpointTimeoutError, TaskExpiredError
from samphire.transport.address import Address
from samphire.transport.clock import ROUND_TRIP_MAX_S, BrokerClock
from samphire.transport.direct import DirectConnection
from samphire_broker.inspection.checks import check_work
from samphire_broker.inspection.overview import look
from tests.stacks import ENDS_S, Up, Valkey, clean_environment, eventually
from tests.support.names import KEYS
from tests.workers import running_worker

TIMEOUT_S = 30
ERROR_S = ROUND_TRIP_MAX_S
"""What client and worker together may be wrong about the broker's clock, each by half of a round trip."""
SKEWS = ["-60s", "+60s"]
DELAY_S = 3.0
GIVEN_UP = (EndpointTimeoutError, TaskExpiredError)
"""What a deadline that has passed leads to: a busy machine may not have started the task by then."""

CLIENT = """
import json, sys, time
import numpy as np
from samphire import Client, TaskExpiredError
one = {"input_fp32": np.ones((1, 1), np.float32)}
with Client(sys.argv[1]) as client:
    told = {"clock": time.time()}
    began = time.monotonic()
    client.submit("identity", one, delay_s=float(sys.argv[2])).result(30)
    told["delayed_s"] = time.monotonic() - began
    client.submit("identity", one, deadline_s=20).result(30)
    list(client.map("identity", [one] * 3, deadline_s=20))
    slow = {"seconds": np.array([[20.0]], np.float32)}
    began = time.monotonic()
    try:
        client.submit("slow", slow, deadline_s=2).result(30)
    except Exception as error:
        told["error"] = type(error).__name__
    told["gave_up_s"] = time.monotonic() - began
print(json.dumps(told))
"""


@pytest.fixture
def faketime() -> Sequence[str]:
    """A command that runs another under a clock that is wrong, and whose monotonic clock goes on as ever."""
    found = shutil.which("faketime")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("faketime is not installed")
        pytest.skip("faketime is not installed")
    return ["env", "FAKETIME_DONT_FAKE_MONOTONIC=1", found, "-f"]


def broker_s(client: redis.Redis) -> float:
    seconds, microseconds = client.time()
    return float(seconds + microseconds / 1e6)


@pytest.mark.parametrize("skew", SKEWS)
def test_a_worker_whose_clock_is_wrong(
    stack: Up, valkey: Valkey, tmp_path: Path, faketime: Sequence[str], skew: str
) -> None:
    """Delays are kept, deadlines do not pass early or late, and the log says that its clock is wrong."""
    one = {"input_fp32": np.ones((1, 1), np.float32)}
    with (
        running_worker(tmp_path / "skewed", valkey.url, stack.triton_grpc, before=[*faketime, skew]) as worker,
        Client(valkey.url) as client,
    ):
        began = broker_s(valkey.client)
        delayed = client.submit("identity", one, delay_s=DELAY_S)
        assert client.submit("identity", one, deadline_s=20).result(TIMEOUT_S).outputs
        eventually(lambda: valkey.client.zscore(KEYS.scheduled, delayed.id), TIMEOUT_S, "the schedule")
        assert delayed.result(TIMEOUT_S).outputs
        assert DELAY_S - ERROR_S <= broker_s(valkey.client) - began < DELAY_S + 20
        began = broker_s(valkey.client)
        blocker = client.submit("slow", {"seconds": np.array([[20.0]], np.float32)}, deadline_s=2)
        with pytest.raises(GIVEN_UP):
            blocker.result(TIMEOUT_S)
        assert broker_s(valkey.client) - began >= 2 - ERROR_S
        said = rf"this machine's clock is \{skew[0]}(59|60|61)\.\d s from the broker's"
        eventually(lambda: re.search(said, worker.log()), TIMEOUT_S, "the log")
        warned = [f.found for f in check_work(valkey.client, KEYS, look(valkey.client, KEYS)) if f.name == "clock"]
        assert re.fullmatch(rf"worker \S+: its clock is \{skew[0]}(59|60|61)\.\d s from the broker's", warned[0])


@pytest.mark.parametrize("skew", SKEWS)
def test_a_client_whose_clock_is_wrong(stack: Up, faketime: Sequence[str], skew: str) -> None:
    """Its delays and deadlines are what they are by the broker's clock."""
    command = [*faketime, skew, sys.executable, "-c", CLIENT, stack.broker_url, str(DELAY_S)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S, env=clean_environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert abs(told["clock"] - time.time()) > 30, "its clock was wrong"
    assert told["delayed_s"] >= DELAY_S - ERROR_S
    assert told["error"] in [error.__name__ for error in GIVEN_UP] and told["gave_up_s"] >= 2 - ERROR_S


def test_the_brokers_time_is_kept(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looks the monotonic clock goes on: a step of this machine's clock changes nothing."""
    import asyncio

    async def test() -> None:
        connection = DirectConnection(Address.parse(valkey.url))
        clock = BrokerClock(connection)
        assert not clock.is_known and abs(clock.now() - time.time()) < 1
        await clock.look()
        right = time.time()
        monkeypatch.setattr("samphire.transport.clock.time.time", lambda: right + 3600)
        assert abs(clock.now() - right) < 5 and abs(clock.skew_s - 3600) < 5
        assert abs(await clock.fresh_now() - right) < 5
        slow = BrokerClock(connection)
        async with connection._lock:  # as behind a long publication
            looking = asyncio.create_task(slow.look())
            await asyncio.sleep(ROUND_TRIP_MAX_S + 0.1)
        await looking
        assert not slow._looked_at
        assert slow.is_known and abs(await slow.fresh_now() - right) < 5
        assert slow._looked_at, "the first look was too slow to be relied on: it has looked again"
        await connection.close()
        lost = BrokerClock(DirectConnection(Address.parse("redis://127.0.0.1:1/0")))
        assert abs(await lost.fresh_now() - (right + 3600)) < 5, "no broker: this machine's clock"
        monkeypatch.undo()

    asyncio.run(test())
