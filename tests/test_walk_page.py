"""The page that tells a task's way, and the tree that it tells of."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/walk.md"
STEP = re.compile(r"^\| (\d+) \| `([^`]+)`(?:: `(\w+)`)? \|", re.MULTILINE)


def test_each_step_is_in_its_file() -> None:
    """At most twenty, in order; each names a file, and what stands in it."""
    steps = STEP.findall(PAGE.read_text())
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    assert 10 <= len(steps) <= 20
    for _, path, name in steps:
        text = (ROOT / path).read_text()
        assert not name or re.search(rf"\b(?:class|def) {name}\b", text), f"{path} has no {name}"


def test_other_files_that_pages_name_are_there() -> None:
    """In every page of docs/, and in CONTRIBUTING.md: by their path in the repository, or in one of the packages."""
    folders = [ROOT, ROOT / "workers/samphire_workers", ROOT / "broker/samphire_broker", ROOT / "clients/python"]
    folders += [ROOT / "tests", ROOT / "clients/python/samphire", ROOT / "workers", ROOT / "broker", ROOT / "docs"]
    folders += [ROOT / "broker/samphire_broker/store", ROOT / "broker/samphire_broker/store/lua"]
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|lua|md|toml|hpp))`", page.read_text()):
            assert any((folder / path).exists() for folder in folders), f"{page.name} names {path}"


def test_links_to_files_lead_somewhere() -> None:
    """Of every page, and of the README files."""
    readmes = [*ROOT.glob("*/README.md"), ROOT / "clients/python/README.md"]
    pages = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *readmes]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} leads to {target}"
