"""The operator's port, beside the callers' own."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("the-key-of-a-lovelace\n")
    return path


@pytest.fixture(scope="module")
def callers(serve: Serve, file: Path) -> Iterator[httpx.Client]:
    with serve(admin_port=0, api_keys_file=file) as client:
        client.headers["Authorization"] = "Bearer the-key-of-a-lovelace"
        yield client


@pytest.fixture
def operators(callers: httpx.Client) -> Iterator[httpx.Client]:
    port = callers.operators  # type: ignore[attr-defined]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client


def test_metrics_and_the_document_move(callers: httpx.Client, operators: httpx.Client) -> None:
    callers.post("/embed", json={"inputs": [{"word": "one"}]}).raise_for_status()
    for path in ("/metrics", "/openapi.json"):
        assert callers.get(path).status_code == 404
        assert operators.get(path).status_code == 200
    assert 'concord_items_total{subset="word"} 1.0' in operators.get("/metrics").text
    assert "/embed" in operators.get("/openapi.json").json()["paths"]


def test_probes_are_at_both(callers: httpx.Client, operators: httpx.Client) -> None:
    for path in ("/livez", "/readyz"):
        assert callers.get(path).json() == operators.get(path).json()


def test_operators_cannot_call(operators: httpx.Client) -> None:
    refused = operators.post("/embed", json={"inputs": [{"word": "one"}]})
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert len(refused.headers["x-request-id"]) == 32


def test_what_is_closed_is_closed_there_too(serve: Serve) -> None:
    with serve(admin_port=0, metrics=False, docs=False) as client:
        port = client.operators  # type: ignore[attr-defined]
        for path, status in (("/metrics", 404), ("/openapi.json", 404), ("/readyz", 200)):
            assert httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code == status


def test_it_ends_with_the_app(serve: Serve) -> None:
    with serve(admin_port=0) as client:
        port = client.operators  # type: ignore[attr-defined]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False)
