"""Medians and how sure they are. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import quantile_test

CONFIDENCE = 0.95
ENOUGH = 0.95
"""A version that reaches this share of the version before it is as good."""

Verdict = Literal["reached", "not told apart", "missed"]


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and its 95 % interval: None where there are too few (five or less)."""

    median: float
    low: float | None
    high: float | None
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, interval and range.

    The interval is made of order statistics and assumes no distribution: of nine values the second and the eighth
    enclose the true median with 96.1 %, whatever the values' distribution is. W. J. Conover, Practical Nonparametric
    Statistics, 3rd ed., section 3.2 ("confidence interval for a quantile"), as scipy.stats.quantile_test has it.
    """
    interval = quantile_test(values, p=0.5).confidence_interval(CONFIDENCE)
    low, high = float(interval.low), float(interval.high)
    known = low == low and high == high  # NaN where the values are too few
    return Spread(statistics.median(values), low if known else None, high if known else None, min(values), max(values))


def ratios(before: Sequence[float], after: Sequence[float], *, less_is_better: bool = False) -> list[float]:
    """Pair by pair, how many times as good the second is; over 1 is better."""
    pairs = zip(before, after, strict=True)
    return [old / new if less_is_better else new / old for old, new in pairs]


def verdict(found: Spread) -> Verdict:
    """What a spread of ratios says: missed only when its whole interval is below `ENOUGH`."""
    if found.high is not None and found.high < ENOUGH:
        return "missed"
    return "reached" if found.median >= ENOUGH else "not told apart"
