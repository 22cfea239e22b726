"""The short form of the fault matrix: one trial of each, on one stand. `make faults` is the long one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import need_servers
from tests.faults import report
from tests.faults.plain import PlainResult
from tests.faults.rounds import Round, run_round
from tests.faults.stand import Stand

LEASE_S = 3

MOST_S = {
    "worker-kill": 20,
    "worker-stop": LEASE_S + 20,
    "worker-restart": 10,
    "triton-kill": 30,
    "triton-stop": 40,
    "worker-and-triton-kill": 30,
    "valkey-kill-always": 15,
    "valkey-kill-everysec": 15,
    "valkey-stop": 15,
    "client-kill": 15,
    "client-stop": 15,
}
"""Recovery, at most, on a machine that may have other work to do; what is aimed at is measured by `make faults`."""

RETURNED_S = {"worker-kill": 5, "worker-stop": LEASE_S + 5}
"""Until a lost worker's tasks are back in their queue, at most."""


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


@pytest.mark.parametrize("fault", list(MOST_S))
def test_nothing_is_lost_and_nothing_published_twice(runner: asyncio.Runner, stand: Stand, fault: str) -> None:
    """The fault happens under load, is proved to have happened, and every task is accounted for."""
    result: Round = runner.run(run_round(stand, fault, 1))
    found = str(result)  # whole, where an object would be shown shortened
    assert not result.broken, found
    assert result.trials == 1 and result.held[0] > 0, found
    assert result.tasks > result.held[0], f"load before and after: {found}"
    assert not result.dead_lettered, found
    assert max(result.recovery_s) <= MOST_S[fault], found
    if fault in RETURNED_S:
        assert max(result.times["returned_s"]) <= RETURNED_S[fault], found
