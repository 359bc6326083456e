"""The operators' port, separate from the public one."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.metrics import scrape
from tests.support.server import Serve

KEY = "the-key-of-a-lovelace"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture(scope="module")
def public(serve: Serve, key_file: Path) -> Iterator[httpx.Client]:
    """A client of the public port, of a server that requires a key."""
    with serve(admin_port=0, api_keys_file=key_file) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


@pytest.fixture
def operators(public: httpx.Client) -> Iterator[httpx.Client]:
    """A client of the operators' port, without a key."""
    port = public.admin_port  # type: ignore[attr-defined]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client


def test_metrics_and_document_are_on_the_operators_port_only(public: httpx.Client, operators: httpx.Client) -> None:
    public.post("/embed", json={"inputs": [{"word": "one"}]}).raise_for_status()
    for path in ("/metrics", "/openapi.json"):
        assert public.get(path).status_code == 404
        assert operators.get(path).status_code == 200
    assert scrape(operators, "concord_items_total", subset="word") == 1
    assert "/embed" in operators.get("/openapi.json").json()["paths"]


def test_health_checks_are_on_both_ports(public: httpx.Client, operators: httpx.Client) -> None:
    for path in ("/livez", "/readyz"):
        assert public.get(path).json() == operators.get(path).json()


def test_inference_routes_are_not_on_the_operators_port(operators: httpx.Client) -> None:
    response = operators.post("/embed", json={"inputs": [{"word": "one"}]})
    assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert len(response.headers["x-request-id"]) == 32


def test_closed_routes_are_closed_on_the_operators_port(serve: Serve) -> None:
    with serve(admin_port=0, metrics=False, docs=False) as client:
        port = client.admin_port  # type: ignore[attr-defined]
        for path, status in (("/metrics", 404), ("/openapi.json", 404), ("/readyz", 200)):
            assert httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code == status


def test_operators_port_closes_with_the_app(serve: Serve) -> None:
    with serve(admin_port=0) as client:
        port = client.admin_port  # type: ignore[attr-defined]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False)
