"""Values of Prometheus metrics."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


def value(text: str, name: str, /, **labels: str) -> float:
    """Return the sum of the samples of this name that have at least these labels; 0 if there are none."""
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def scrape(client: httpx.Client, name: str, /, **labels: str) -> float:
    """Return the same from the service's /metrics."""
    return value(client.get("/metrics").text, name, **labels)
