"""Measures the version that is on the path: `python -m benchmarks.drive SCALE PART...`; JSON on the last line.

A figure that a version cannot give, because what it is measured by was not there yet, is left out.
"""

from __future__ import annotations

import json
import sys

from benchmarks.parts import run

WITHOUT = (AttributeError, ImportError, TypeError)
"""What a version raises that has another interface."""


def has_none(part: str, error: Exception) -> bool:
    """Whether the version lacks what the part needs."""
    if isinstance(error, WITHOUT):
        print(f"{part} cannot be measured here: {error!r}", file=sys.stderr)
    return isinstance(error, WITHOUT)


def main(scale: float, parts: list[str]) -> None:
    """Measure, print."""
    print(json.dumps(run(parts, scale, lambda _name, _value: None, {}, has_none)))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
