"""Counters and histograms that a step can afford to write; Prometheus gets its kind when it asks.

``prometheus_client``'s own instruments take a lock and two microseconds for every observation, and
a step observes one gap between tokens for every request in it. These keep plain numbers, take an
observation that was made n times as one, and become ``prometheus_client``'s families at a scrape.

One thread writes an instrument and any thread may read it, without a lock: what is read at once is
a copy of a dictionary or of a list, which the interpreter makes in one piece, or a number. A
scrape may therefore miss what the step in flight has yet to write, and no more; within a histogram,
the count is the sum of its buckets always.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

__all__ = ["PREFIX", "Counter", "Histogram", "Instrument", "Labels", "Reading"]

#: Of all names.
PREFIX: Final = "headway:"

#: The values of an instrument's labels, in the order of their names.
Labels = tuple[str, ...]


class Instrument:
    """What all instruments have.

    Args:
        name: as scraped, without the prefix.
        documentation: one line.
        label_names: whose values tell its series apart.
    """

    def __init__(self, name: str, documentation: str, label_names: Labels = ()) -> None:
        self.name: Final = PREFIX + name
        self.documentation: Final = documentation
        self.label_names: Final = label_names

    def family(self, constant: Mapping[str, str]) -> Metric:
        """The instrument as it stands, for a scrape.

        Args:
            constant: labels that all its series have, and their values.
        """
        raise NotImplementedError


class Counter(Instrument):
    """Sums that only grow. One without labels is there from the start, at 0."""

    def __init__(self, name: str, documentation: str, label_names: Labels = ()) -> None:
        super().__init__(name, documentation, label_names)
        self._sums: dict[Labels, float] = {} if label_names else {(): 0}

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Add to the sum of ``labels``; adding 0 makes it known."""
        self._sums[labels] = self._sums.get(labels, 0) + amount

    def family(self, constant: Mapping[str, str]) -> Metric:
        names = [*constant, *self.label_names]
        family = CounterMetricFamily(self.name, self.documentation, labels=names)
        for labels, value in self._sums.copy().items():
            family.add_metric([*constant.values(), *labels], value)
        return family


class Reading(Instrument):
    """Values that somebody else keeps: a counter if the name ends so (``_total``), else a gauge.

    Args:
        name, documentation, label_names: see ``Instrument``.
        read: the values as they are now; called in the thread that scrapes.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        read: Callable[[], Mapping[Labels, float]],
        label_names: Labels = (),
    ) -> None:
        super().__init__(name, documentation, label_names)
        self._read = read

    def family(self, constant: Mapping[str, str]) -> Metric:
        cls = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        family = cls(self.name, self.documentation, labels=[*constant, *self.label_names])
        for labels, value in self._read().items():
            family.add_metric([*constant.values(), *labels], value)
        return family


class _Series:
    __slots__ = ("counts", "sum")

    def __init__(self, num_buckets: int) -> None:
        self.counts = [0] * num_buckets
        self.sum = 0.0


class Histogram(Instrument):
    """How often a value fell between which bounds.

    Args:
        name, documentation, label_names: see ``Instrument``.
        bounds: of the buckets, ascending, each inclusive; a last bucket has none.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        bounds: Sequence[float],
        label_names: Labels = (),
    ) -> None:
        super().__init__(name, documentation, label_names)
        self._bounds = tuple(bounds)
        self._names = (*map(repr, map(float, bounds)), "+Inf")
        self._series: dict[Labels, _Series] = {}

    def observe(self, labels: Labels, value: float, count: int = 1) -> None:
        """Note ``value``, ``count`` times. O(log buckets)."""
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = _Series(len(self._names))
        series.counts[bisect_left(self._bounds, value)] += count
        series.sum += value * count

    def family(self, constant: Mapping[str, str]) -> Metric:
        names = [*constant, *self.label_names]
        family = HistogramMetricFamily(self.name, self.documentation, labels=names)
        for labels, series in self._series.copy().items():
            total = series.sum
            buckets = list(zip(self._names, accumulate(series.counts.copy()), strict=True))
            family.add_metric([*constant.values(), *labels], buckets, total)
        return family
