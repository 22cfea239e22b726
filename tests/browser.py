"""A real browser for tests: headless Chromium, once a page."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.stacks import ENDS_S

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1440,900",
    "--virtual-time-budget=10000",
)
"""The budget lets the page's scripts and requests finish before anything is taken from it."""


def open_page(url: str, folder: Path, screenshot: Path) -> str:
    """Return the page's document as it is once its scripts have run, and take a picture of it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        message = "chromium is missing: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    command = [chromium, *OPTIONS, f"--user-data-dir={folder}", f"--screenshot={screenshot}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S, check=True).stdout
