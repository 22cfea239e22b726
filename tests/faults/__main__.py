"""`make faults`: the matrix at length, or with --soak half an hour of it all; a JSON report and the table in docs/.

Without any number of trials it is the whole of `PLAN`; with some, only those. An interrupt ends it after the
trial under way, and what is reported then is true of what was done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults import report
from tests.faults.matrix import FAULTS
from tests.faults.plain import PlainResult, run_plain
from tests.faults.rounds import Round, run_round
from tests.faults.soak import REST_S, SETTINGS, Kinds, Samples, growth, soak
from tests.faults.stand import ROOT, Stand

PLAN = {
    "worker-kill": 1000,
    "deliverer-kill": 100,
    "valkey-kill-always": 100,
    "valkey-kill-everysec": 100,
    "client-kill": 20,
    "client-stop": 10,
    "worker-stop": 10,
    "worker-restart": 20,
    "triton-kill": 20,
    "triton-stop": 10,
    "triton-restart": 10,
    "worker-and-triton-kill": 10,
    "valkey-stop": 10,
    "valkey-restart": 10,
}
PLAIN = "celery-kill"
PLAIN_TRIALS = 100
TRIALS_A_ROUND = 50
WORKERS = 4
SOAK_MINUTES = 30
TIME_LIMIT_S = 110 * 60
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "reliability.md"
SOAK_BEGIN, SOAK_END = "<!-- soak: written by make faults ARGS=--soak -->", "<!-- soak: end -->"


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def planned(counts: dict[str, int], done: list[Round]) -> Iterator[tuple[str, int]]:
    """Rounds that are left, those of different faults by turns: a run that is cut short has tried them all."""
    rounds = []
    for fault, trials in counts.items():
        left = trials - sum(one.trials for one in done if one.fault == fault)
        parts = -(-left // TRIALS_A_ROUND)
        for part in range(parts):
            size = min(TRIALS_A_ROUND, left - part * TRIALS_A_ROUND)
            rounds.append(((part + 1) / parts, fault, size))
    rounds.sort(key=lambda one: one[0])
    for _, fault, size in rounds:
        yield fault, size


async def run_matrix(options: argparse.Namespace, counts: dict[str, int], may_go_on: Callable[[], bool]) -> bool:
    """The matrix; whether every promise was kept."""
    path: Path = options.results / "latest.json"
    state: Path = options.results / "rounds.json"
    rounds: list[Round] = []
    plain: PlainResult | None = None
    if options.resume and state.exists():
        rounds, plain = report.load(state)
    began_at = datetime.now(UTC).isoformat(timespec="seconds")

    def keep(*, complete: bool) -> None:
        report.save(rounds, plain, state)
        report.write(report.report(rounds, plain, began_at=began_at, complete=complete), path)

    faults = {fault: trials for fault, trials in counts.items() if fault in FAULTS and trials}
    if faults:
        with tempfile.TemporaryDirectory(prefix="samphire-faults-") as folder:
            stand = Stand(Path(folder), workers=WORKERS)
            try:
                await stand.start()
                for fault, trials in planned(faults, rounds):
                    if not may_go_on():
                        break
                    result = await run_round(stand, fault, trials, may_go_on=may_go_on)
                    rounds.append(result)
                    tell(result)
                    keep(complete=False)
            finally:
                await stand.stop()
    if counts.get(PLAIN) and plain is None and may_go_on():
        with tempfile.TemporaryDirectory(prefix="samphire-faults-") as folder:
            stand = Stand(Path(folder), workers=0)
            try:
                await stand.start()
                plain = await run_plain(stand, counts[PLAIN], may_go_on)
            finally:
                await stand.stop()
        say(
            f"plain Celery: {plain.trials} kills, {plain.tasks:,} tasks, {plain.lost} lost, {plain.stuck} stuck, "
            f"{plain.took_nothing} times a worker took nothing"
        )
    left = list(planned(faults, rounds))
    complete = not left and (not counts.get(PLAIN) or (plain is not None and plain.trials >= counts[PLAIN]))
    keep(complete=complete)
    found = json.loads(path.read_text())
    text = report.table(found)
    say(text)
    if options.page:
        report.publish(text, options.page)
    return not any(one.broken for one in rounds)


def tell(result: Round) -> None:
    """Progress: a round."""
    spread = report.summary([result])
    say(
        f"{result.fault}: {result.trials} trials, {result.tasks:,} tasks, {result.lost} lost, "
        f"{result.published_twice} published twice, {result.re_executed} re-executed, recovery p50 "
        f"{spread['recovery_p50_s']} s, max {spread['recovery_max_s']} s, after {result.seconds:.0f} s"
        + (" BROKEN" if result.broken else "")
    )
    for failure in result.failures:
        say(f"  {failure}")


async def run_soak(options: argparse.Namespace, may_go_on: Callable[[], bool]) -> bool:
    """The soak; whether every promise was kept."""
    path: Path = options.results / "soak.json"
    began_at = datetime.now(UTC).isoformat(timespec="seconds")
    seconds = options.soak * 60

    def keep(rounds: list[Round], samples: Samples, kinds: list[Kinds], *, complete: bool = False) -> None:
        memory: dict[str, Any] = {"memory": growth(samples), "valkey_bytes_by_kind": kinds}
        report.write(report.report(rounds, None, began_at=began_at, complete=complete, **memory), path)

    def done(rounds: list[Round], samples: Samples, kinds: list[Kinds]) -> None:
        tell(rounds[-1])
        keep(rounds, samples, kinds)

    with tempfile.TemporaryDirectory(prefix="samphire-faults-") as folder:
        stand = Stand(Path(folder), workers=WORKERS, rest_s=REST_S, settings=SETTINGS)
        try:
            await stand.start()
            rounds, samples, kinds = await soak(stand, seconds, options.seed, may_go_on, done)
        finally:
            await stand.stop()
    keep(rounds, samples, kinds, complete=sum(one.seconds for one in rounds) >= seconds)
    found = json.loads(path.read_text())
    text = f"{report.table(found)}\n\n{report.memory_table(found)}"
    say(text)
    if options.page:
        report.publish(text, options.page, SOAK_BEGIN, SOAK_END)
    return not any(one.broken for one in rounds)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    for name, trials in {**PLAN, PLAIN: PLAIN_TRIALS}.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", dest=name, help=f"trials ({trials} by default)")
    parser.add_argument(
        "--soak", type=float, nargs="?", const=SOAK_MINUTES, metavar="MINUTES", help="mixed faults, memory followed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults in a soak")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run has ended")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help="no new trials after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the reports")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose table is written")
    parser.add_argument("--no-page", dest="page", action="store_const", const=None, help="write no page")
    options = parser.parse_args()
    given = {name: vars(options)[name] for name in (*PLAN, PLAIN) if vars(options)[name] is not None}
    counts = given or {**PLAN, PLAIN: PLAIN_TRIALS}
    until = time.monotonic() + options.time_limit_s
    interrupted = False

    def may_go_on() -> bool:
        return not interrupted and time.monotonic() < until

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        say("ends after the trial under way")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    job = run_matrix(options, counts, may_go_on) if options.soak is None else run_soak(options, may_go_on)
    if not asyncio.run(job):
        raise SystemExit("a promise was broken: see the report")


if __name__ == "__main__":
    main()
