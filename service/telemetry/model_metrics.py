"""Metrics of the served models, collected at each scrape."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from concord.service.inference.reload import Reloader


class ModelCollector(Collector):
    """Which models are served, and their state."""

    def __init__(self, reloader: Reloader) -> None:
        self._reloader = reloader

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        info = GaugeMetricFamily(
            "concord_bundle_info", "1 for each bundle that is served.", labels=("name", "version", "sha256", "device")
        )
        state = GaugeMetricFamily(
            "concord_bundle_state",
            "1 for the state of each bundle: ready, failing or failed.",
            labels=("name", "version", "state"),
        )
        labels = ("name", "version", "graph")
        runs = CounterMetricFamily(
            "concord_graph_runs", "Runs of a graph at fixed batch sizes, by size. On a GPU only.", labels=(*labels, "size")
        )
        padding = CounterMetricFamily(
            "concord_graph_padding_rows", "Rows that only fill up a fixed batch size. On a GPU only.", labels=labels
        )
        for model in self._reloader.registry.all():
            manifest, runtime = model.manifest, model.runtime
            info.add_metric((manifest.name, manifest.version, runtime.bundle.sha256, str(runtime.device)), 1)
            state.add_metric((manifest.name, manifest.version, self._reloader.state(model)), 1)
            for file, graph in runtime.fixed_graphs.items():
                values = (manifest.name, manifest.version, file.removesuffix(".onnx"))
                padding.add_metric(values, graph.padding)
                for size in runtime.batch_sizes:
                    runs.add_metric((*values, str(size)), graph.runs[size])
        for folder in self._reloader.unserved_failures():
            state.add_metric((folder.name, "", "failed"), 1)
        yield from (info, state, runs, padding)
