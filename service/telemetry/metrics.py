"""Prometheus metrics of one app."""

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_NATS = (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)

MAX_EXPECTED_MODALITIES = 6
"""63 subsets. With more modalities a subset has a series from its first item on."""


class Series:
    """Counts of one histogram with certain labels.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def collect(self) -> tuple[list[tuple[str, float]], float]:
        """The cumulative counts by upper bound, as Prometheus writes it, and the sum of the values."""
        with self._lock:
            counts, total = list(itertools.accumulate(self._counts)), self._sum
        return list(zip([*map(floatToGoString, self._bounds), "+Inf"], counts, strict=True)), total


class Histogram(Collector):
    """A histogram of Prometheus. One observation takes 0.4 µs; it takes 2 µs with that of prometheus_client, and a request has
    seven.

    Args:
        labels: names.
        buckets: upper bounds, ascending.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._described = name, documentation
        self._names = labels
        self._buckets = buckets
        self._series: dict[tuple[str, ...], Series] = {}
        if not labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: object) -> Series:
        """The series with these labels, made at the first call."""
        key = tuple(map(str, values))
        return self._series.setdefault(key, Series(self._buckets))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(*self._described, labels=self._names)
        for values, series in list(self._series.items()):
            family.add_metric(values, *series.collect())
        yield family


class Metrics:
    """Metrics in a separate registry. It observes the engine; labels take values from bounded sets only.

    Args:
        build: labels of ``concord_build_info``: versions.
    """

    def __init__(self, build: dict[str, str]) -> None:
        self.registry = registry = CollectorRegistry()
        self._durations: dict[tuple[str, int], Series] = {}  # found faster than by ``labels``
        self._stages: dict[str, Series] = {}
        self._items: dict[str, Counter] = {}
        ProcessCollector(registry=registry)
        self.duration = Histogram(
            "concord_request_duration_seconds",
            "From the first byte of a request to the first byte of its response.",
            ("route", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = 0
        """Requests without a response yet. A number of the event loop: counting in a gauge takes 4 µs for each request."""
        in_flight = Gauge("concord_requests_in_flight", "Requests without a response yet.", registry=registry)
        in_flight.set_function(lambda: self.in_flight)
        self.rejections = Counter(
            "concord_rejections",
            "Requests and items without a result, by the code of the error.",
            ("reason",),
            registry=registry,
        )
        self.items = Counter(
            "concord_items", "Items with a result, by the modalities they have.", ("subset",), registry=registry
        )
        self.stages = Histogram(
            "concord_stage_seconds",
            "Time of a stage: decode and serialize of a request, features, encode, refine and generate of a batch.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )

        def histogram(name: str, documentation: str, buckets: Sequence[float]) -> Series:
            return Histogram(name, documentation, buckets=buckets, registry=registry).labels()

        self.waits = histogram("concord_queue_wait_seconds", "Time of an item in the queue.", _SECONDS)
        self.batches = histogram("concord_batch_size", "Items in one run of a graph.", _COUNTS)
        self.steps = histogram("concord_refine_steps", "Refinement steps of an item.", _COUNTS)
        self.gain = histogram("concord_refine_gain_nats", "Objective of an item after refinement minus before.", _NATS)
        self.stops = Counter(
            "concord_refine_stops", "Finished refinements, by the reason for the last step.", ("reason",), registry=registry
        )
        self.device_errors = Counter(
            "concord_device_errors",
            "Runs of a graph that raised an error, by its kind: memory, lost (the process ends) or other.",
            ("kind",),
            registry=registry,
        )
        self.depth = Gauge("concord_queue_depth", "Items in the queue.", registry=registry)
        self.ready = Gauge("concord_ready", "1 if every readiness check passes, else 0.", registry=registry)
        self.workers = Gauge("concord_workers", "Worker processes that are ready.", registry=registry)
        Counter("concord_worker_restarts", "Worker processes that ended and were started again.", registry=registry)
        Info("concord_build", "Versions of this process.", registry=registry).info(build)

    def expect(self, routes: Iterable[str], rejections: Iterable[str], stops: Iterable[str], errors: Iterable[str]) -> None:
        """Create the series of these labels at 0: ``rate()`` does not see the first event of a series that starts with it."""
        for route in routes:
            self.duration.labels(route, 200)
        for reason in rejections:
            self.rejections.labels(reason)
        for reason in stops:
            self.stops.labels(reason)
        for kind in errors:
            self.device_errors.labels(kind)

    def expect_items(self, modalities: Sequence[str]) -> None:
        """Create the series of the subsets of these modalities at 0."""
        if len(modalities) <= MAX_EXPECTED_MODALITIES:
            for size in range(1, len(modalities) + 1):
                for subset in itertools.combinations(modalities, size):
                    self.items.labels("+".join(subset))

    def item(self, subset: str) -> None:
        """An item has a result. ``subset``: names of its modalities, joined by +."""
        if (series := self._items.get(subset)) is None:
            series = self._items[subset] = self.items.labels(subset)
        series.inc()

    def batch(self, size: int) -> None:
        self.batches.observe(size)

    def responded(self, route: str, status: int, code: str | None, seconds: float) -> None:
        """A response begins; ``code`` says why there is no result."""
        key = route, status
        if (series := self._durations.get(key)) is None:
            series = self._durations[key] = self.duration.labels(*key)
        series.observe(seconds)
        if code:
            self.rejections.labels(code).inc()

    def stage(self, name: str, seconds: float) -> None:
        if (series := self._stages.get(name)) is None:
            series = self._stages[name] = self.stages.labels(name)
        series.observe(seconds)

    def waited(self, seconds: float) -> None:
        self.waits.observe(seconds)

    def refined(self, steps: int, gain: float, stopped: str) -> None:
        self.steps.observe(steps)
        self.gain.observe(gain)
        self.stops.labels(stopped).inc()

    def failed(self, kind: str) -> None:
        self.device_errors.labels(kind).inc()

    def watch(self, queue_depth: Callable[[], int], ready: Callable[[], bool]) -> None:
        """Call these at each scrape."""
        self.depth.set_function(queue_depth)
        self.ready.set_function(ready)
        self.workers.set_function(ready)

    def expose(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)
