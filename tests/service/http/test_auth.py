"""API keys, quotas and the Host header, over a live server."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from concord.service.api.health import HEALTH_PATHS
from concord.service.http import api_keys
from tests.support.metrics import scrape
from tests.support.raw_http import send_raw
from tests.support.server import Serve
from tests.support.waiting import wait_for

ADA = "the-key-of-a-lovelace"
GRACE = "the-key-of-g-hopper"
MARY = "the-key-of-m-somerville"
REQUEST = {"inputs": [{"word": "one"}]}
GUARDED = [
    "/v1/models",
    "/v1/models/digits",
    "/metrics",
    "/openapi.json",
    "/nowhere",
    "/livez/",
    "//livez",
    "/livez/../metrics",
]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{ADA} ada\n{GRACE} grace 0.01\n{MARY} mary 0.01\n")
    return path


@pytest.fixture(scope="module")
def guarded(serve: Serve, key_file: Path) -> Iterator[httpx.Client]:
    """A server that requires a key; the client sends none unless a test says so."""
    with serve(api_keys_file=key_file, max_items=4) as client:
        yield client


@pytest.mark.parametrize("path", sorted(HEALTH_PATHS))
def test_health_checks_need_no_key(guarded: httpx.Client, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize("path", GUARDED)
def test_other_routes_need_a_key(guarded: httpx.Client, path: str) -> None:
    url = guarded.base_url.copy_with(raw_path=path.encode())
    rejected = guarded.get(url)
    error = rejected.json().get("error", rejected.json())
    assert (rejected.status_code, error["code"], rejected.headers["www-authenticate"]) == (401, "missing_key", "Bearer")
    assert guarded.get(url, headers=bearer(ADA)).status_code in {200, 404}


@pytest.mark.parametrize("path", ["/embed", "/cross-generate", "/v1/embeddings"])
def test_inference_without_a_key_is_rejected_before_the_body_is_parsed(guarded: httpx.Client, path: str) -> None:
    assert guarded.post(path, content=b"{").status_code == 401
    assert guarded.post(path, content=b"{", headers=bearer(ADA)).status_code == 415


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        ("", 401, "missing_key"),
        ("Bearer", 401, "missing_key"),
        (f"Basic {ADA}", 401, "missing_key"),
        (ADA, 401, "missing_key"),
        ("Bearer x", 403, "wrong_key"),
        (f"Bearer {ADA[:-1]}", 403, "wrong_key"),
        (f"Bearer {ADA}x", 403, "wrong_key"),
        (f"Bearer {ADA} {ADA}", 403, "wrong_key"),
        (f"Bearer {'x' * 20_000}", 403, "wrong_key"),
        ("Bearer é", 403, "wrong_key"),
        (f"bearer   {ADA}", 200, None),
        (f"BEARER {ADA}", 200, None),
    ],
)
def test_authorization_header_gets_its_status(guarded: httpx.Client, header: str, status: int, code: str | None) -> None:
    response = guarded.post("/embed", json=REQUEST, headers={"Authorization": header.encode("latin-1")})
    assert (response.status_code, response.json().get("code")) == (status, code)
    assert ("www-authenticate" in response.headers) is (status != 200)
    assert ADA not in response.text


def test_spent_quota_gets_429_and_leaves_other_keys(guarded: httpx.Client) -> None:
    four_items = {"inputs": REQUEST["inputs"] * 4}
    assert guarded.post("/embed", json=four_items, headers=bearer(GRACE)).status_code == 200
    spent = guarded.post("/embed", json=four_items, headers=bearer(GRACE))
    assert (spent.status_code, spent.json()["code"]) == (429, "quota_exceeded")
    assert 50_000 < spent.json()["retry_after_ms"] <= 100_000, "one item in a hundred seconds"
    assert spent.headers["retry-after-ms"] == str(spent.json()["retry_after_ms"])
    assert 0 <= 1000 * int(spent.headers["retry-after"]) - spent.json()["retry_after_ms"] < 1000
    assert guarded.post("/embed", json=four_items, headers=bearer(ADA)).status_code == 200
    assert guarded.post("/embed", content=b"{", headers=bearer(GRACE)).status_code == 429, "the body was read"
    assert guarded.get("/v1/models", headers=bearer(GRACE)).status_code == 200
    guarded.headers.update(bearer(ADA))
    try:
        assert scrape(guarded, "concord_request_duration_seconds_count", route="/embed", status="429") == 2
        assert scrape(guarded, "concord_rejections_total", reason="quota_exceeded") == 2
    finally:
        del guarded.headers["Authorization"]
    assert guarded.get("/livez").status_code == 200


def test_retry_after_of_a_spent_quota_is_long_enough(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{ADA} ada 2\n")
    with serve(api_keys_file=tmp_path / "keys", max_items=2) as client:
        two_items = {"inputs": REQUEST["inputs"] * 2}

        def spend() -> httpx.Response | None:
            response = client.post("/embed", json=two_items, headers=bearer(ADA))
            return response if response.status_code == 429 else None

        rejected = wait_for(spend, interval=0)
        assert rejected is not None
        time.sleep(rejected.json()["retry_after_ms"] / 1000)
        assert client.post("/embed", json=REQUEST, headers=bearer(ADA)).status_code == 200


def test_items_over_the_quota_are_not_parsed(guarded: httpx.Client) -> None:
    """Invalid items cost as much as valid ones."""
    invalid = {"inputs": [{"photo": "AAAA"}] * 3}
    assert guarded.post("/embed", json=invalid, headers=bearer(MARY)).status_code == 400
    assert guarded.post("/embed", json=invalid, headers=bearer(MARY)).status_code == 429


def test_changed_key_file_takes_effect_without_a_restart(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "POLL_SECONDS", 0.02)
    file = tmp_path / "keys"
    file.write_text(f"{ADA}\n")

    def statuses() -> tuple[int, ...]:
        return tuple(client.get("/v1/models", headers=bearer(key)).status_code for key in (ADA, GRACE))

    with serve(api_keys_file=file) as client:
        for content, expected in ((f"{ADA}\n{GRACE}\n", (200, 200)), (f"{GRACE}\n", (403, 200)), ("broken\n", (403, 200))):
            file.write_text(content)
            wait_for(lambda expected=expected: statuses() == expected, message=content)  # type: ignore[misc]


def test_openapi_document_requires_the_key_of_a_guarded_server(guarded: httpx.Client, client: httpx.Client) -> None:
    operation = guarded.get("/openapi.json", headers=bearer(ADA)).json()["paths"]["/embed"]["post"]
    assert operation["security"] == [{"key": []}]
    assert client.get("/openapi.json").json()["paths"]["/embed"]["post"]["security"] == [{}, {"key": []}]


def test_metrics_and_docs_settings_close_their_routes(serve: Serve) -> None:
    with serve(metrics=False, docs=False) as client:
        assert client.get("/metrics").status_code == 404
        assert client.get("/openapi.json").status_code == 404
        assert client.post("/embed", json=REQUEST).status_code == 200


def test_other_origins_get_no_cors_headers(client: httpx.Client) -> None:
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/embed", headers=headers)
    assert preflight.status_code == 405
    responses = [preflight, client.post("/embed", json=REQUEST, headers=headers), client.get("/livez", headers=headers)]
    assert not [name for response in responses for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("api.example.com", 200),
        ("API.example.com:8000", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("[::2]", 400),
        ("elsewhere.example", 400),
        ("", 400),
    ],
)
@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_host_header_must_be_an_allowed_host(serve: Serve, address: str, host: str, status: int) -> None:
    with serve(allowed_hosts=f"api.example.com, {address}") as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == status
        assert client.get("/readyz", headers={"Host": host}).status_code == 200, "health checks use an address"


@pytest.mark.parametrize("hosts", [b"", b"host: a\r\nhost: b\r\n"])
def test_request_without_exactly_one_host_gets_400(client: httpx.Client, hosts: bytes) -> None:
    received = send_raw(client, b"GET /v1/models HTTP/1.1\r\n%sconnection: close\r\n\r\n" % hosts)
    assert received.startswith(b"HTTP/1.1 400 ")
