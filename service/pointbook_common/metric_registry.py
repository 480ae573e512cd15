"""The metrics of one process, for Prometheus and for the documentation."""

import asyncio
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from time import monotonic

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    Summary,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily

# They would double the number of series, for times that `up` and `process_start_time_seconds` show.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library does not type it

PREFIX = "pointbook_"
SECONDS_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
LAG_INTERVAL_SECONDS = 0.25
"""How often the lag of an event loop is measured."""


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """A metric as Prometheus shows it; the name has its prefix and suffix."""

    name: str
    kind: str
    labels: tuple[str, ...]
    documentation: str


class GaugeTable:
    """A gauge whose values are all replaced at once.

    A scrape in another thread finds all or none of them.
    """

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._values: Mapping[tuple[str, ...], float] = {}

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Replace all values, which are given by the values of their labels."""
        self._values = values

    def collect(self) -> Iterable[Metric]:
        """Return the family of this gauge. The registry calls this."""
        family = GaugeMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return [family]


class MetricRegistry:
    """Creates metrics with the prefix `pointbook_`, and remembers their definitions.

    No label may contain an id of a customer or anything that strangers choose: each value costs memory for as long as
    the process runs.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.definitions: list[MetricDefinition] = []

    def add_process(self, service: str) -> None:
        """Add the versions of this process, and what it uses of the machine."""
        ProcessCollector(registry=self.registry)
        build_info = self.gauge("build_info", "1, with the versions as labels.", "component", "version", "python")
        build_info.labels(service, version("pointbook"), platform.python_version()).set(1)

    def counter(self, name: str, documentation: str, *labels: str) -> Counter:
        """Return a new counter."""
        name = self._define(name, "counter", labels, documentation)
        return Counter(name, documentation, labels, registry=self.registry)

    def gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        """Return a new gauge.

        One without labels is NaN until it is first set, because 0 would be a value.
        """
        gauge = Gauge(self._define(name, "gauge", labels, documentation), documentation, labels, registry=self.registry)
        if not labels:
            gauge.set(math.nan)
        return gauge

    def gauge_table(self, name: str, documentation: str, *labels: str) -> GaugeTable:
        """Return a new gauge whose values are read from the database."""
        table = GaugeTable(self._define(name, "gauge", labels, documentation), documentation, labels)
        self.registry.register(table)
        return table

    def histogram(
        self, name: str, documentation: str, *labels: str, buckets: Sequence[float] = SECONDS_BUCKETS
    ) -> Histogram:
        """Return a new histogram."""
        name = self._define(name, "histogram", labels, documentation)
        return Histogram(name, documentation, labels, buckets=buckets, registry=self.registry)

    def summary(self, name: str, documentation: str, *labels: str) -> Summary:
        """Return a new summary: a count and a sum."""
        name = self._define(name, "summary", labels, documentation)
        return Summary(name, documentation, labels, registry=self.registry)

    def _define(self, name: str, kind: str, labels: Sequence[str], documentation: str) -> str:
        """Remember a definition, and return the name that the library expects."""
        shown = f"{PREFIX}{name}_total" if kind == "counter" else f"{PREFIX}{name}"
        self.definitions.append(MetricDefinition(shown, kind, tuple(labels), documentation))
        return f"{PREFIX}{name}"


async def observe_loop_lag(observe: Callable[[float], None]) -> None:
    """Measure how late the running event loop is, forever."""
    while True:
        due = monotonic() + LAG_INTERVAL_SECONDS
        await asyncio.sleep(LAG_INTERVAL_SECONDS)
        observe(max(0.0, monotonic() - due))
