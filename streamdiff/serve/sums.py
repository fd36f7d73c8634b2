"""The counters of several processes as one: what ``/metrics`` answers where workers share a port."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_GAUGE = "gauge"


class Sums:
    """Adds texts of Prometheus up. What a lost process had counted stays counted: counters never fall."""

    def __init__(self) -> None:
        self._last: dict[int, list[Metric]] = {}
        self._lost: list[list[Metric]] = []

    def heard(self, slot: int, text: str) -> None:
        """What this process counts now."""
        self._last[slot] = list(text_string_to_metric_families(text))

    def lost(self, slot: int) -> None:
        """This process has ended; the next one of its slot counts from 0."""
        before = self._last.pop(slot, [])
        self._lost = [_added([*self._lost, [metric for metric in before if metric.type != _GAUGE]])]

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Fixed(_added([*self._lost, *self._last.values()])))
        return generate_latest(registry)


class _Fixed:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _added(parts: list[list[Metric]]) -> list[Metric]:
    """One metric per name, one sample per name and labels; when they were made is when the first was."""
    found: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for metric in (metric for part in parts for metric in part):
        found.setdefault(metric.name, metric)
        sums = values.setdefault(metric.name, {})
        for sample in metric.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            first = sample.name.endswith("_created")
            sums[key] = min(sums.get(key, sample.value), sample.value) if first else sums.get(key, 0.0) + sample.value
    whole: list[Metric] = []
    for name, metric in found.items():
        added = Metric(name, metric.documentation, metric.type)
        added.samples = [Sample(key, dict(labels), value) for (key, labels), value in values[name].items()]
        whole.append(added)
    return whole
