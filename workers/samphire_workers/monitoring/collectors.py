"""Figures for prometheus-client that cost a lane next to nothing: it adds to plain numbers, and who reads them formats.

The library's own counters take a lock for each addition. Here one thread adds, and another reads what it finds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

Labels = tuple[str, ...]


class Count(Collector):
    """A counter, by the values of its labels; one thread adds to it."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, *labels: str) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._values: dict[Labels, float] = {} if labels else {(): 0.0}
        registry.register(self)

    def add(self, *labels: str, count: float = 1.0) -> None:
        """It happened so often."""
        self._values[labels] = self._values.get(labels, 0.0) + count

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What Prometheus gets."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        yield family


class Spread(Collector):
    """A histogram, by the values of its labels; one thread adds to it.

    Args:
        registry: where it is asked for.
        name, text: of the metric.
        bounds: upper bounds of its buckets, but for the last one, which has none.
        labels: their names.
    """

    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, bounds: Sequence[float], *labels: str
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = [float(bound) for bound in bounds]
        self._names = [*(str(bound) for bound in self._bounds), "+Inf"]
        self._labels = labels
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        registry.register(self)

    def add(self, value: float, *labels: str) -> None:
        """One more value."""
        counts = self._counts.get(labels)
        if counts is None:
            self._sums[labels] = 0.0
            counts = self._counts[labels] = [0] * len(self._names)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What Prometheus gets."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, counts in list(self._counts.items()):
            buckets = [(name, float(count)) for name, count in zip(self._names, accumulate(list(counts)), strict=True)]
            family.add_metric(labels, buckets=buckets, sum_value=self._sums[labels])
        yield family


class Changing(Collector):
    """A gauge whose labels come and go; who reads it sees all of one moment, or all of another."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str, *labels: str) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._values: Mapping[Labels, float] = {}
        registry.register(self)

    def set(self, values: Mapping[Labels, float]) -> None:
        """The values now, by their labels."""
        self._values = values

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What Prometheus gets."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family
