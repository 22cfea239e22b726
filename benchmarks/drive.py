"""Measures the version that is on the path: `python -m benchmarks.drive SCALE PART...`; JSON on the last line.

A figure that a version cannot give, because what it is measured by was not there yet, is left out.
"""

from __future__ import annotations

import json
import sys

from benchmarks.parts import run
from benchmarks.stack import Figures

WITHOUT = (AttributeError, ImportError, TypeError)
"""What a version raises that has another interface."""


def main(scale: float, parts: list[str]) -> None:
    """Run each part on a stack of its own, print."""
    figures = Figures()
    for part in parts:
        try:
            figures |= run([part], scale, lambda _name, _value: None, {})
        except WITHOUT as error:
            print(f"{part} cannot be measured here: {error!r}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
