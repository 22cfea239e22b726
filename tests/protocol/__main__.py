"""`make model`: explore everything, or what is named; `mutants`, `conformance` and `short` are other things to do.

make model                          every run of runs.toml, about 40 minutes; then conformance and mutants
make model ARGS="chain1 roll4"      these runs; a whole report with traces lies in results/<name>.txt
make model ARGS=mutants             break the scripts in one place each: the checker has to see it
make model ARGS=conformance         the checker's broker against a real Valkey, its calls against the real classes
make model ARGS=short               what `make test` explores
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.protocol.calls import built_by_us, comparable, forms_of
from tests.protocol.checker import RESULTS, CheckerMissingError, explore, explore_all, known, runs
from tests.protocol.conformance import SHOWN_MAX, compare
from tests.protocol.mutants import mutants, seen
from tests.stacks import running_valkey

DUMP_ONE_IN = 200
DUMPED_STATES_MAX = 300_000


def tell(line: str) -> None:
    """Print, and keep for the summary."""
    print(line, flush=True)
    with (RESULTS / "summary.txt").open("a") as summary:
        summary.write(line + "\n")


def run_mutants() -> bool:
    """Whether every mutant is seen that should be."""
    missed = 0
    for mutant in mutants():
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            found = seen(mutant, Path(folder))
        verdict = "seen" if found else f"not seen: {mutant.blind}" if mutant.blind else "MISSED"
        missed += not found and not mutant.blind
        tell(f"mutant {mutant.name}: {verdict} {'; '.join(found)[:150]}")
    tell(f"{len(mutants())} mutants, {missed} missed")
    return missed == 0


def run_conformance(part: str = "full", one_in: int = DUMP_ONE_IN) -> bool:
    """Whether the checker's broker and its calls are like the real ones."""
    folder = RESULTS / "dumps"
    shutil.rmtree(folder, ignore_errors=True)
    for name, settings in runs(part).items():
        explore(name, settings, folder=folder, states=DUMPED_STATES_MAX, dump=one_in)
    dumps = sorted(folder.glob("*.jsonl"))
    with (
        tempfile.TemporaryDirectory(prefix="conformance-") as data,
        running_valkey(Path(data), "--appendonly", "no") as valkey,
    ):
        done, different = compare(dumps, valkey)
    tell(f"{done.total():,} script runs compared with a real Valkey: {dict(done)}; differing: {len(different)}")
    for difference in different[:SHOWN_MAX]:
        tell(difference)
    forms = forms_of(dumps)
    strange = [form for form in forms if comparable(form) != comparable(asyncio.run(built_by_us(form)))]
    tell(f"{len(forms)} forms of calls compared with Store and Publisher; differing: {len(strange)}")
    for form in strange:
        tell(f"checker {comparable(form)}\n   ours {comparable(asyncio.run(built_by_us(form)))}")
    return not different and not strange


def run_all(part: str, names: Sequence[str] = ()) -> bool:
    """Whether the runs show nothing that is not known."""
    reports = explore_all(part, names, tell)
    new = [(report.name, found) for report in reports for found in report.found if found not in known(report.name)]
    tell(f"{len(reports)} runs, {sum(report.states for report in reports):,} states, {len(new)} violations")
    return not new


def main(words: list[str]) -> bool:
    """Do what is asked for; whether all is well."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "summary.txt").write_text("")
    if words == ["mutants"]:
        return run_mutants()
    if words == ["conformance"]:
        return run_conformance()
    if words == ["short"]:
        return run_all("short")
    if words:
        return run_all("full", words)
    return all([run_all("full"), run_conformance(), run_mutants()])


if __name__ == "__main__":
    try:
        sys.exit(not main(sys.argv[1:]))
    except CheckerMissingError as error:
        sys.exit(str(error))
