"""Two versions by turns: `make bench BASE=<commit>`.

The version of that commit and this one are run one after the other, many times, in alternating order, by this version's
benchmark. Their figures are divided pair by pair, since what the machine's other tenants do changes slowly. This
version is run twice a turn, so that its two runs show what pairs that do not differ look like.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from benchmarks.spread import CONFIDENCE, ENOUGH, Spread, Verdict, ratios, spread, verdict
from benchmarks.stack import Figures

ROOT = Path(__file__).parents[1]
PAIRS = 9
SCALE = 0.2
"""Of the work of `make bench`."""
PARTS = ("drain", "claims")
COMPARED = {
    "drain": ("drain_per_s", False),
    "end to end": ("end_to_end_per_s", False),
    "publish": ("publish_per_s", False),
    "claim cost": ("claim_us_1k", True),
}
"""Figures by their names in the table, and whether less is better."""
Measure = Callable[[Path], Figures]


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of a commit, in a folder of their own.

    Raises:
        SystemExit: there is no such commit.
    """
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"{commit}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="samphire-base-") as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def environment(version: Path) -> dict[str, str]:
    """An environment in which the packages of this version come before those that are installed."""
    packages = [str(version / name) for name in ("clients/python", "broker", "workers")]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*packages, str(ROOT)])}


def measure(version: Path, parts: Sequence[str] = PARTS, scale: float = SCALE) -> Figures:
    """The figures of a version, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.drive", str(scale), *parts]
    done = subprocess.run(command, cwd=ROOT, env=environment(version), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the benchmark failed on {version}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


@dataclass(frozen=True)
class Turn:
    """One turn: the version before, and this one twice."""

    base: Figures
    this: Figures
    again: Figures


def take_turns(base: Path, this: Path, count: int, measure: Measure, tell: Callable[[str], None]) -> list[Turn]:
    """Measure both versions so many times; every other turn goes the other way round."""
    turns = []
    for number in range(count):
        order = [("base", base), ("this", this), ("again", this)]
        if number % 2:
            order.reverse()
        found = {name: measure(version) for name, version in order}
        turns.append(Turn(**found))
        told = ", ".join(
            f"{title} {found['base'][key]:,.0f} -> {found['this'][key]:,.0f}"
            for title, (key, _) in COMPARED.items()
            if all(key in figures for figures in found.values())
        )
        tell(f"turn {number + 1} of {count}: {told}")
    return turns


@dataclass(frozen=True)
class Comparison:
    """This version's figure divided by the other's; over 1 is better."""

    against_base: Spread
    against_itself: Spread
    verdict: Verdict


def compare(turns: Sequence[Turn]) -> dict[str, Comparison]:
    """What the turns say of each figure that both versions have."""
    found = {}
    for title, (key, less_is_better) in COMPARED.items():
        if not all(key in figures for turn in turns for figures in (turn.base, turn.this, turn.again)):
            continue
        base, this, again = (
            [figures[key] for figures in of]
            for of in zip(*((turn.base, turn.this, turn.again) for turn in turns), strict=True)
        )
        against_base = spread(ratios(base, this, less_is_better=less_is_better))
        against_itself = spread(ratios(this, again, less_is_better=less_is_better))
        found[title] = Comparison(against_base, against_itself, verdict(against_base))
    return found


def table(found: Mapping[str, Comparison], base: str, count: int) -> str:
    """The comparisons as a table for people."""

    def interval(one: Spread) -> str:
        if one.low is None or one.high is None:
            return "too few pairs"
        return f"{one.low:.3f} to {one.high:.3f}"

    lines = [
        f"this version divided by {base}, medians of {count} pairs; over 1 is better",
        f"{'':<12}{'median':>8}{'95 % interval':>18}{'against itself':>18}  at least {ENOUGH:g}",
    ]
    lines += [
        f"{title:<12}{one.against_base.median:>8.3f}{interval(one.against_base):>18}"
        f"{interval(one.against_itself):>18}  {one.verdict}"
        for title, one in found.items()
    ]
    missing = [title for title in COMPARED if title not in found]
    if missing:
        lines.append(f"not measured, since one of the versions has another interface: {', '.join(missing)}")
    return "\n".join(lines)


def report(found: Mapping[str, Comparison], turns: Sequence[Turn], base: str) -> dict[str, object]:
    """The comparisons as JSON."""
    return {
        "base": base,
        "confidence": CONFIDENCE,
        "ratios": {f"{COMPARED[title][0]}_vs_base": round(one.against_base.median, 4) for title, one in found.items()},
        "comparisons": {
            title: {
                "against_base": vars(one.against_base),
                "against_itself": vars(one.against_itself),
                "verdict": one.verdict,
            }
            for title, one in found.items()
        },
        "turns": [vars(turn) for turn in turns],
    }
