"""The metrics of all workers as those of one service."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]
"""Name, type, documentation, and samples (name, labels, value)."""
Key = tuple[str, tuple[tuple[str, str], ...]]

SUMMED_GAUGES = {
    "concord_requests_in_flight",
    "concord_queue_depth",
    "concord_workers",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
}
OWN_GAUGES = {"concord_ready", "process_start_time_seconds"}
"""The supervisor's value counts. Of every other gauge the largest value counts."""


class Registry(Protocol):
    def collect(self) -> Iterable[Metric]: ...


def families(registry: Registry) -> list[Family]:
    """The metrics of this process, as JSON can carry them."""
    return [
        (metric.name, metric.type, metric.documentation, [(one.name, dict(one.labels), one.value) for one in metric.samples])
        for metric in registry.collect()
    ]


class MergedMetrics:
    """Merges the metrics of processes that come and go. Counters and histograms are sums that never go backwards: what an
    ended process had counted, as far as it was collected, still counts."""

    def __init__(self) -> None:
        self._retired: dict[Key, float] = {}

    def retire(self, ended: Sequence[Family]) -> None:
        """Keep the counts of a process that has ended."""
        for _, kind, _, samples in ended:
            for name, labels, value in samples:
                if _is_count(kind, name):
                    key = _key(name, labels)
                    self._retired[key] = self._retired.get(key, 0.0) + value

    def expose(self, own: Sequence[Family], workers: Sequence[Sequence[Family]]) -> bytes:
        """Prometheus text.

        Args:
            own: metrics of the supervisor.
            workers: metrics of each worker, as collected last.
        """
        registry = CollectorRegistry()
        registry.register(_Merged(self._merge([own, *workers])))
        return generate_latest(registry)

    def _merge(self, sources: Sequence[Sequence[Family]]) -> list[Metric]:
        metrics: dict[str, Metric] = {}
        values: dict[str, dict[Key, float]] = {}
        for source in sources:
            for name, kind, documentation, samples in source:
                metrics.setdefault(name, Metric(name, documentation, kind))
                merged = values.setdefault(name, {})
                for sample, labels, value in samples:
                    key = _key(sample, labels)
                    if key not in merged:
                        merged[key] = value + (self._retired.get(key, 0.0) if _is_count(kind, sample) else 0.0)
                    elif _is_count(kind, sample) or name in SUMMED_GAUGES:
                        merged[key] += value
                    elif sample.endswith("_created"):
                        merged[key] = min(merged[key], value)
                    elif name not in OWN_GAUGES:
                        merged[key] = max(merged[key], value)
        for name, metric in metrics.items():
            for (sample, pairs), value in {**values[name], **self._retired_only(metric, values[name])}.items():
                metric.add_sample(sample, dict(pairs), value)
        return list(metrics.values())

    def _retired_only(self, metric: Metric, live: dict[Key, float]) -> dict[Key, float]:
        """Counts whose labels no living process has."""
        names = {metric.name + suffix for suffix in ("_total", "_bucket", "_sum", "_count")}
        return {key: value for key, value in self._retired.items() if key[0] in names and key not in live}


class _Merged(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def _is_count(kind: str, sample: str) -> bool:
    return kind in ("counter", "histogram") and not sample.endswith("_created")


def _key(name: str, labels: dict[str, Any]) -> Key:
    return name, tuple(labels.items())
