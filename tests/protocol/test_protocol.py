"""The short form of `make model`: some runs of the checker, its broker beside a real one, and some broken scripts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.protocol.calls import built_by_us, comparable, forms_of
from tests.protocol.checker import CheckerMissingError, Report, build, explore, known, runs
from tests.protocol.conformance import SHOWN_MAX, compare
from tests.protocol.mutants import Mutant, mutants, seen, with_mutant
from tests.stacks import Valkey

DUMP_ONE_IN = 60
QUICK_MUTANTS = ("settle: no fence", "start: ignores ends", "cancel: writes over an end", "reap: drops the message")


@pytest.fixture(scope="session", autouse=True)
def checker() -> None:
    """Built once; without a compiler there is nothing to do for a person, and it is a failure in CI."""
    try:
        build()
    except CheckerMissingError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def reports(checker: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Report], list[Path]]]:
    """The short runs, and the script runs that they have written down."""
    folder = tmp_path_factory.mktemp("protocol")
    found = {name: explore(name, settings, folder=folder, dump=DUMP_ONE_IN) for name, settings in runs("short").items()}
    yield found, sorted(folder.glob("*.jsonl"))


@pytest.mark.parametrize("name", runs("short"))
def test_no_order_of_events_breaks_a_promise(reports: tuple[dict[str, Report], list[Path]], name: str) -> None:
    """Every state that the scene and its faults allow was visited."""
    report = reports[0][name]
    assert report.complete
    assert set(report.found) <= known(name), report.text


def test_the_checkers_broker_does_what_a_real_one_does(
    reports: tuple[dict[str, Report], list[Path]], valkey: Valkey
) -> None:
    """State and reply of script runs are the same on Valkey."""
    done, different = compare(reports[1], valkey)
    assert len(done) >= 12 and done.total() > 300
    assert not different, "\n".join(different[:SHOWN_MAX])


def test_the_checker_calls_scripts_as_the_real_classes_do(reports: tuple[dict[str, Report], list[Path]]) -> None:
    """KEYS and ARGV of each form of calls."""
    forms = forms_of(reports[1])
    assert {verb for verb, _, _ in forms} >= {"claim", "start", "settle", "release", "reap", "cancel", "submit"}
    for form in forms:
        assert comparable(form) == comparable(asyncio.run(built_by_us(form)))


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_each_mutant_breaks_its_script(mutant: Mutant, tmp_path: Path) -> None:
    """A script that is written anew may leave it nothing to break."""
    assert with_mutant(mutant, tmp_path) == tmp_path
    assert mutant.new != mutant.old


@pytest.mark.parametrize("mutant", [m for m in mutants() if m.name in QUICK_MUTANTS], ids=lambda mutant: mutant.name)
def test_a_broken_script_is_seen(mutant: Mutant, tmp_path: Path) -> None:
    """The properties are not empty."""
    assert seen(mutant, tmp_path / "mutant")
