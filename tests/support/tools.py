"""Commands of the system that tests need."""

from __future__ import annotations

import os
import shutil

import pytest


def tool(package: str, *names: str) -> str:
    """The first of these commands that is installed; without one the test is skipped, in CI it fails."""
    for name in names:
        if found := shutil.which(name):
            return found
    message = f"{names[0]} is not installed: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
