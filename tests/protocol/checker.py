"""The checker as a program: built once for each content of its sources, run with settings, its report read."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = HERE / "checker"
RESULTS = HERE / "results"
STATES_MAX = 7_000_000
NICE = ("nice", "-n", "10")

_VIOLATION = re.compile(r"  VIOLATION (.*) \(\d+ transitions\)")
_FOUND = re.compile(r"  (DEAD END, not the goal|STUCK).*|  (weakly fair cycles) without the goal: [1-9].*")
_STATES = re.compile(r"(\d+) states \((complete|cut)")


class CheckerMissingError(Exception):
    """What the checker is built with is not installed."""


@dataclass(frozen=True)
class Report:
    """What one run has found."""

    name: str
    settings: str
    text: str
    states: int
    complete: bool
    found: tuple[str, ...]
    """Violated properties, and the forms of liveness that do not hold."""
    took_s: float


def runs(part: str) -> dict[str, str]:
    """Settings by name of the run: "full" is everything, "short" a part of `make test`."""
    table: dict[str, dict[str, str]] = tomllib.loads((HERE / "runs.toml").read_text())
    return table[part]


def known(name: str) -> set[str]:
    """What is known to be violated in a run."""
    return set(tomllib.loads((HERE / "runs.toml").read_text())["known"].get(name, ()))


def _lua_flags() -> list[str]:
    """Where Lua 5.1 lies: what pkg-config says, or where Debian puts it."""
    if shutil.which("pkg-config"):
        asked = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "lua5.1"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            return asked.stdout.split()
    for folder in (
        Path("/usr/include/lua5.1"),
        Path("/usr/local/include/lua5.1"),
        Path("/opt/homebrew/include/lua5.1"),
    ):
        if (folder / "lua.h").exists():
            return [f"-I{folder}", "-llua5.1"]
    raise CheckerMissingError("the headers of Lua 5.1 are not installed: apt-get install liblua5.1-0-dev")


def build(held: int = 2) -> Path:
    """The checker for workers that hold so many claims at once.

    Raises:
        CheckerMissingError: there is no compiler, or no Lua 5.1.
        subprocess.CalledProcessError: it does not compile.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise CheckerMissingError("no C++ compiler is installed: apt-get install g++")
    flags = ["-O2", "-std=c++17", f"-DHELD={held}"]
    content = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir())) + " ".join(flags).encode()
    program = RESULTS / f"checker-{hashlib.sha256(content).hexdigest()[:16]}"
    if not program.exists():
        RESULTS.mkdir(exist_ok=True)
        unfinished = program.with_suffix(f".{os.getpid()}")
        command = [*NICE, compiler, *flags, str(SOURCES / "main.cpp"), "-o", str(unfinished), *_lua_flags()]
        subprocess.run(command, check=True)
        unfinished.rename(program)  # two that build at the same time do not disturb each other
    return program


def explore(
    name: str, settings: str, *, root: Path = ROOT, folder: Path = RESULTS, states: int = STATES_MAX, dump: int = 0
) -> Report:
    """Run the checker once, with the scripts of a checkout; its whole report is kept in the folder.

    Raises:
        RuntimeError: the checker, or a script in it, has failed.
    """
    words = settings.split()
    held = next((int(word.removeprefix("held=")) for word in words if word.startswith("held=")), 2)
    words = [word for word in words if not word.startswith("held=")]
    if not any(word.startswith("states=") for word in words):
        words.append(f"states={states}")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    command = [*NICE, str(build(held)), f"root={root.resolve()}", f"name={name}", f"dump={dump}", "live=1", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    (folder / f"{name}.txt").write_text(ended.stdout)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"run {name} of the checker failed with {ended.returncode}: {last[:500]}")
    states_found = _STATES.search(ended.stdout)
    assert states_found is not None, ended.stdout
    found = [match[1] for match in _VIOLATION.finditer(ended.stdout)]
    found += [match[1] or match[2] for match in _FOUND.finditer(ended.stdout)]
    return Report(
        name,
        settings,
        ended.stdout,
        int(states_found[1]),
        states_found[2] == "complete",
        tuple(found),
        time.monotonic() - began,
    )


def explore_all(part: str, names: Sequence[str], tell: Callable[[str], None]) -> list[Report]:
    """Explore runs of a part, all or those that are named, one after the other, and tell of each."""
    settings = runs(part)
    reports = []
    for name in names or settings:
        report = explore(name, settings[name])
        extent = "all" if report.complete else "the first"
        tell(f"{name}: {extent} {report.states:,} states in {report.took_s:.0f} s [{report.settings}]")
        for found in report.found:
            tell(f"    {'known' if found in known(name) else 'VIOLATED'}: {found}")
        reports.append(report)
    return reports
