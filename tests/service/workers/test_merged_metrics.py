"""Metrics of several processes as those of one."""

from prometheus_client import CollectorRegistry, Counter

from concord.service.telemetry.metrics import Metrics
from concord.service.workers.merged_metrics import OWN_GAUGES, SUMMED_GAUGES, Family, MergedMetrics, families
from tests.support.metrics import value


def metrics_of(requests: int, queued: int) -> list[Family]:
    metrics = Metrics({"version": "1"})
    metrics.watch(lambda: queued, lambda: True)
    for _ in range(requests):
        metrics.responded("/embed", 200, None, 0.002)
        metrics.items.labels("word").inc()
    return families(metrics.registry)


def own() -> list[Family]:
    registry = CollectorRegistry()
    Counter("concord_worker_restarts", "", registry=registry).inc(3)
    return families(registry)


def test_counters_and_histograms_are_sums_and_gauges_have_their_rule() -> None:
    text = MergedMetrics().expose(own(), [metrics_of(3, 2), metrics_of(5, 1)]).decode()
    assert value(text, "concord_items_total", subset="word") == 8
    assert value(text, "concord_request_duration_seconds_count", route="/embed", status="200") == 8
    assert value(text, "concord_request_duration_seconds_bucket", route="/embed", le="0.0025") == 8
    assert value(text, "concord_queue_depth") == 3
    assert value(text, "concord_workers") == 2
    assert value(text, "concord_ready") == 1
    assert value(text, "concord_build_info") == 1
    assert value(text, "concord_worker_restarts_total") == 3
    assert text.count("# TYPE concord_items_total counter") == 1


def test_counters_do_not_go_backwards_when_a_process_ends() -> None:
    merged = MergedMetrics()
    ended, living = metrics_of(3, 2), metrics_of(5, 0)
    before = merged.expose([], [ended, living]).decode()
    merged.retire(ended)
    for workers in ([living], [living, metrics_of(0, 0)], []):
        after = merged.expose([], workers).decode()
        if workers:
            assert value(after, "concord_items_total") == value(before, "concord_items_total") == 8
            assert value(after, "concord_queue_depth") == 0
    restarted = merged.expose([], [living, metrics_of(2, 0)]).decode()
    assert value(restarted, "concord_request_duration_seconds_sum") > value(before, "concord_request_duration_seconds_sum")
    assert value(restarted, "concord_items_total") == 10


def test_every_gauge_has_a_rule_that_fits() -> None:
    """A new gauge is merged by its largest value unless it is listed."""
    gauges = {name for name, kind, *_ in metrics_of(1, 1) if kind == "gauge" and not name.endswith("_created")}
    assert gauges - SUMMED_GAUGES - OWN_GAUGES == {"process_max_fds"}
