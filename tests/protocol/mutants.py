"""Whether the checker can see anything: each mutant breaks a script in one place, and a run has to find it."""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.protocol.checker import HERE, ROOT, Report, explore

SCRIPTS = ("broker/samphire_broker/store/lua", "clients/python/samphire")
STATES_MAX = 1_500_000


@dataclass(frozen=True)
class Mutant:
    """One change of a script, and the scene in which it should show."""

    name: str
    script: str
    old: str
    new: str
    settings: str
    blind: str = ""
    """Why it is not seen, where that is known."""


def mutants() -> list[Mutant]:
    """All of them."""
    return [Mutant(**table) for table in tomllib.loads((HERE / "mutants.toml").read_text())["mutant"]]


def with_mutant(mutant: Mutant, folder: Path) -> Path:
    """A folder with the scripts of this checkout, of which one is broken.

    Raises:
        ValueError: the script does not contain what the mutant changes.
    """
    for part in SCRIPTS:
        for script in (ROOT / part).rglob("*.lua"):
            copy = folder / script.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(script, copy)
    path = next(folder.rglob(f"{mutant.script}.lua"))
    text = path.read_text()
    if mutant.old not in text:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.script}.lua does not contain {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    return folder


def seen(mutant: Mutant, folder: Path) -> tuple[str, ...]:
    """What the checker finds in a mutant."""
    root = with_mutant(mutant, folder)
    try:
        report: Report = explore("mutant", mutant.settings, root=root, folder=folder, states=STATES_MAX)
    except RuntimeError as error:  # a script that fails is seen too
        return (str(error),)
    return report.found
