"""The `samphire` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; says what to install where only the SDK is."""
    try:
        from samphire_broker.commands import samphire
    except ModuleNotFoundError as error:
        sys.exit(f"samphire: {error.name} is missing: pip install 'samphire[server]'")
    samphire()
