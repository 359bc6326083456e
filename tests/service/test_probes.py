import httpx
import pytest


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/v2/health/live"])
def test_alive(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, {"status": "ok", "checks": {"inference": "ok"}})


@pytest.mark.parametrize("path", ["/readyz", "/v2/health/ready"])
def test_ready_names_each_check(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    checks = dict.fromkeys(("bundle", "warmed", "golden", "inference"), "ok")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "checks": checks})


def test_metrics_are_prometheus_text(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "concord_ready 1.0" in response.text
