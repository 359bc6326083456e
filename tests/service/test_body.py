import contextlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]

FORM = "multipart/form-data; boundary=b"


def part(name: str, value: str) -> str:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'


def exchange(client: httpx.Client, sent: bytes) -> bytes:
    """What comes back for these bytes until the server closes."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


@pytest.fixture(scope="module")
def small(serve: Serve) -> Iterator[httpx.Client]:
    with serve(max_body_bytes=4096) as client:
        yield client


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not(small: httpx.Client) -> None:
    content = b'{"inputs": [{"word": "one"}]}'
    headers = {"content-type": "application/json"}
    assert small.post("/embed", content=content.ljust(4096), headers=headers).status_code == 200
    response = small.post("/embed", content=content.ljust(4097), headers=headers)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert "4096" in response.json()["detail"]


def test_a_chunked_body_is_counted(small: httpx.Client) -> None:
    chunks = iter([b'{"inputs": [{"word": "one"}]}', *[b" " * 1000] * 5])
    response = small.post("/embed", content=chunks, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_a_form_is_counted_too(small: httpx.Client) -> None:
    chunks = iter([part("photo", "x" * 1000).encode()] * 5)
    response = small.post("/embed", content=chunks, headers={"content-type": FORM})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_a_declared_length_is_refused_before_the_body_comes(small: httpx.Client) -> None:
    started = time.perf_counter()
    received = exchange(
        small, b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
    )
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in received
    assert b"connection: close" in received
    assert time.perf_counter() - started < 3


def test_a_client_that_listens_only_when_all_is_sent_is_not_cut_off(small: httpx.Client) -> None:
    size = 8 << 20
    head = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % size
    assert exchange(small, head + bytes(size)).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_waits_for_continue_never_sends_its_body(small: httpx.Client) -> None:
    received = exchange(small, b"POST /embed HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 413 ")


def test_nothing_of_a_form_is_written_to_a_disk(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    response = client.post("/embed", files={"photo": ("p.png", bytes(3 << 20))})
    assert (response.status_code, response.json()["code"]) == (400, "bad_image")


@pytest.mark.parametrize(
    ("content_type", "encoding", "status"),
    [
        ("application/json; charset=utf-8", "identity", 200),
        ("APPLICATION/JSON", "Identity", 200),
        ("application/vnd.acme+json", "identity", 200),
        ("application/json", "gzip", 415),
        ("application/x-www-form-urlencoded", "identity", 415),
        ("text/plain", "identity", 415),
        ("", "identity", 415),
    ],
)
def test_content_types_and_encodings(client: httpx.Client, content_type: str, encoding: str, status: int) -> None:
    headers = {"content-type": content_type, "content-encoding": encoding}
    response = client.post("/embed", content=b'{"inputs": [{"word": "one"}]}', headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize(
    ("content_type", "content", "status", "code"),
    [
        (FORM, part("word", "one") + "--b--\r\n", 200, None),
        ("multipart/form-data", part("word", "one") + "--b--\r\n", 400, "bad_multipart"),
        (FORM, "no part", 400, "bad_multipart"),
        (FORM, part("word", "one") + part("word", "two") + "--b--\r\n", 400, "bad_multipart"),
        (FORM, "--b\r\nContent-Disposition: form-data\r\n\r\none\r\n--b--\r\n", 400, "bad_multipart"),
        (FORM, "".join(part(f"p{n}", "x") for n in range(1000)) + "--b--\r\n", 400, "bad_multipart"),
        (FORM, part("sound", "x") + "--b--\r\n", 422, "unknown_modality"),
        (FORM, "--b--\r\n", 422, "empty_subset"),
        (FORM, part("options", "{") + part("word", "one") + "--b--\r\n", 400, "invalid_json"),
        (FORM, part("options", "[]") + part("word", "one") + "--b--\r\n", 422, "invalid_value"),
        (FORM, part("options", '{"inputs": []}') + part("word", "one") + "--b--\r\n", 422, "invalid_value"),
        (FORM, part("options", '{"seed": "x"}') + part("word", "one") + "--b--\r\n", 422, "invalid_value"),
    ],
)
def test_forms(client: httpx.Client, content_type: str, content: str, status: int, code: str | None) -> None:
    response = client.post("/embed", content=content.encode(), headers={"content-type": content_type})
    assert (response.status_code, response.json().get("code")) == (status, code)
