import httpx
import pytest

from concord.model.runtime import Runtime


@pytest.fixture
def label(runtime: Runtime) -> str:
    manifest = runtime.bundle.manifest
    return f"{manifest.name}@{manifest.version}"


@pytest.mark.parametrize("path", ["/livez", "/healthz", "/v2/health/live"])
def test_liveness_reports_the_inference_thread(client: httpx.Client, label: str, path: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, {"status": "ok", "checks": {f"{label}/inference": "ok"}})


@pytest.mark.parametrize("path", ["/readyz", "/v2/health/ready"])
def test_readiness_reports_each_check(client: httpx.Client, label: str, path: str) -> None:
    response = client.get(path)
    names = ["accepting", *(f"{label}/{name}" for name in ("bundle", "warmed", "golden", "inference", "circuit"))]
    checks = dict.fromkeys(names, "ok")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "checks": checks})


def test_metrics_route_returns_prometheus_text(client: httpx.Client) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "concord_ready 1.0" in response.text
