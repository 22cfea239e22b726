"""The short form of the fault matrix: one trial of each, on one stand. `make faults` is the long one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import report
from tests.faults.plain import PlainResult
from tests.faults.rounds import Round, run_round
from tests.faults.stand import Stand
from tests.stacks import need_servers

LEASE_S = 3

FAULTS = (
    "worker-kill",
    "deliverer-kill",
    "worker-stop",
    "worker-restart",
    "triton-kill",
    "triton-stop",
    "worker-and-triton-kill",
    "valkey-kill-always",
    "valkey-kill-everysec",
    "valkey-stop",
    "client-kill",
    "client-stop",
)
"""How long a recovery takes is measured by `make faults`; here one that does not come is a failure of its trial."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all trials: the processes of the stand belong to it."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def stand(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Real servers, three workers with a short lease."""
    need_servers()
    settings = {"SAMPHIRE_LEASE_S": str(LEASE_S)}
    stand = Stand(tmp_path_factory.mktemp("faults"), workers=3, outstanding=60, settings=settings)
    try:
        runner.run(stand.start())
        yield stand
    finally:
        runner.run(stand.stop())


def test_rounds_are_saved_whole(tmp_path: Path) -> None:
    """A long run goes on from them."""
    rounds = [Round("worker-kill", 3, refused=Counter({"BrokerUnavailableError": 2}), times={"running_s": [1.5]})]
    plain = PlainResult(trials=1, recovery_s=[10.5])
    report.save(rounds, plain, tmp_path / "rounds.json")
    assert report.load(tmp_path / "rounds.json") == (rounds, plain)
    assert report.report(rounds, plain)["refused"] == {"BrokerUnavailableError": 2}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_and_nothing_published_twice(runner: asyncio.Runner, stand: Stand, fault: str) -> None:
    """The fault happens under load, is proved to have happened, work goes on, and every task is accounted for."""
    result: Round = runner.run(run_round(stand, fault, 1))
    found = str(result)  # whole, where an object would be shown shortened
    assert not result.broken, found
    assert result.trials == 1 and result.held[0] > 0, found
    assert result.streams and result.webhooks, found
    assert not result.dead_lettered, found
