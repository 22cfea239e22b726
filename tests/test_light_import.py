"""The base install is light."""

import subprocess
import sys


def test_importing_samphire_loads_no_heavy_package() -> None:
    """`import samphire` loads neither celery, torch, tritonclient, fastapi nor the other two packages."""
    heavy = ["celery", "kombu", "torch", "tritonclient", "grpc", "fastapi", "pydantic", "click", "sklearn"]
    heavy += ["samphire_broker", "samphire_workers"]
    code = f"import sys, samphire; print([name for name in {heavy!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
