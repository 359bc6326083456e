"""Who gets in: keys, quotas and the Host header, over a live server."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service import keys
from service.probes import OPEN

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
ADA = "the-key-of-a-lovelace"
GRACE = "the-key-of-g-hopper"
MARY = "the-key-of-m-somerville"
WORD = {"inputs": [{"word": "one"}]}
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
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{ADA} ada\n{GRACE} grace 0.01\n{MARY} mary 0.01\n")
    return path


@pytest.fixture(scope="module")
def locked(serve: Serve, file: Path) -> Iterator[httpx.Client]:
    with serve(api_keys_file=file, max_items=4) as client:
        yield client


@pytest.mark.parametrize("path", sorted(OPEN))
def test_probes_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize("path", GUARDED)
def test_all_else_does(locked: httpx.Client, path: str) -> None:
    url = locked.base_url.copy_with(raw_path=path.encode())
    refused = locked.get(url)
    told = refused.json().get("error", refused.json())
    assert (refused.status_code, told["code"], refused.headers["www-authenticate"]) == (401, "missing_key", "Bearer")
    assert locked.get(url, headers=bearer(ADA)).status_code in {200, 404}


@pytest.mark.parametrize("path", ["/embed", "/cross-generate", "/v1/embeddings"])
def test_calls_do_and_their_bodies_are_not_read_without(locked: httpx.Client, path: str) -> None:
    assert locked.post(path, content=b"{").status_code == 401
    assert locked.post(path, content=b"{", headers=bearer(ADA)).status_code == 415


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
def test_the_header(locked: httpx.Client, header: str, status: int, code: str | None) -> None:
    response = locked.post("/embed", json=WORD, headers={"Authorization": header.encode("latin-1")})
    assert (response.status_code, response.json().get("code")) == (status, code)
    assert ("www-authenticate" in response.headers) is (status != 200)
    assert ADA not in response.text


def test_a_quota_is_429_and_apart_from_others(locked: httpx.Client) -> None:
    four = {"inputs": WORD["inputs"] * 4}
    assert locked.post("/embed", json=four, headers=bearer(GRACE)).status_code == 200
    spent = locked.post("/embed", json=four, headers=bearer(GRACE))
    assert (spent.status_code, spent.json()["code"]) == (429, "quota_exceeded")
    assert 50_000 < spent.json()["retry_after_ms"] <= 100_000, "one item in a hundred seconds"
    assert spent.headers["retry-after-ms"] == str(spent.json()["retry_after_ms"])
    assert 0 <= 1000 * int(spent.headers["retry-after"]) - spent.json()["retry_after_ms"] < 1000
    assert locked.post("/embed", json=four, headers=bearer(ADA)).status_code == 200
    assert locked.post("/embed", content=b"{", headers=bearer(GRACE)).status_code == 429, "before its body is read"
    assert locked.get("/v1/models", headers=bearer(GRACE)).status_code == 200
    counted = locked.get("/metrics", headers=bearer(ADA)).text
    assert 'concord_request_duration_seconds_count{route="/embed",status="429"} 2.0' in counted
    assert 'concord_rejections_total{reason="quota_exceeded"} 2.0' in counted
    assert locked.get("/livez").status_code == 200


def test_the_wait_that_is_told_is_enough(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{ADA} ada 2\n")
    with serve(api_keys_file=tmp_path / "keys", max_items=2) as client:
        two = {"inputs": WORD["inputs"] * 2}
        while (refused := client.post("/embed", json=two, headers=bearer(ADA))).status_code == 200:
            pass
        one_item = refused.json()["retry_after_ms"] / 1000
        time.sleep(one_item)
        assert client.post("/embed", json=WORD, headers=bearer(ADA)).status_code == 200


def test_items_over_the_quota_are_not_decoded(locked: httpx.Client) -> None:
    """And bad ones cost what good ones do: to be wrong is not free."""
    bad = {"inputs": [{"photo": "AAAA"}] * 3}
    assert locked.post("/embed", json=bad, headers=bearer(MARY)).status_code == 400
    assert locked.post("/embed", json=bad, headers=bearer(MARY)).status_code == 429


def test_a_rotation_takes_no_restart(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.02)
    file = tmp_path / "keys"
    file.write_text(f"{ADA}\n")
    with serve(api_keys_file=file) as client:
        for content, expected in ((f"{ADA}\n{GRACE}\n", (200, 200)), (f"{GRACE}\n", (403, 200)), ("broken\n", (403, 200))):
            file.write_text(content)
            deadline = time.monotonic() + 20
            while tuple(client.get("/v1/models", headers=bearer(key)).status_code for key in (ADA, GRACE)) != expected:
                assert time.monotonic() < deadline, content


def test_the_document_asks_for_the_key(locked: httpx.Client, client: httpx.Client) -> None:
    told = locked.get("/openapi.json", headers=bearer(ADA)).json()["paths"]["/embed"]["post"]["security"]
    assert told == [{"key": []}]
    assert client.get("/openapi.json").json()["paths"]["/embed"]["post"]["security"] == [{}, {"key": []}]


def test_metrics_and_docs_can_be_closed(serve: Serve) -> None:
    with serve(metrics=False, docs=False) as client:
        assert client.get("/metrics").status_code == 404
        assert client.get("/openapi.json").status_code == 404
        assert client.post("/embed", json=WORD).status_code == 200


def test_no_page_of_another_origin_is_let_in(client: httpx.Client) -> None:
    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/embed", headers=asked)
    assert preflight.status_code == 405
    answers = [preflight, client.post("/embed", json=WORD, headers=asked), client.get("/livez", headers=asked)]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("host", "status"),
    [("api.example.com", 200), ("API.example.com:8000", 200), ("[::1]:80", 200), ("elsewhere.example", 400), ("", 400)],
)
def test_the_host_header_where_hosts_are_named(serve: Serve, host: str, status: int) -> None:
    with serve(allowed_hosts="api.example.com, [::1]") as client:
        assert client.get("/v1/models", headers={"Host": host}).status_code == status
        assert client.get("/readyz", headers={"Host": host}).status_code == 200, "a probe asks for an address"


@pytest.mark.parametrize("hosts", [b"", b"host: a\r\nhost: b\r\n"])
def test_a_request_has_one_host(client: httpx.Client, hosts: bytes) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\n%sconnection: close\r\n\r\n" % hosts)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 400 ")
