"""Sizes, content types and encodings of request bodies."""

import tempfile
from collections.abc import Iterator

import httpx
import pytest

from tests.support.raw_http import head, send_raw
from tests.support.server import Serve

FORM = "multipart/form-data; boundary=b"
JSON = {"content-type": "application/json"}


def part(name: str, value: str) -> str:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'


@pytest.fixture(scope="module")
def small(serve: Serve) -> Iterator[httpx.Client]:
    """A server that accepts bodies of 4096 bytes."""
    with serve(max_body_bytes=4096) as client:
        yield client


def test_body_limit_is_inclusive(small: httpx.Client) -> None:
    content = b'{"inputs": [{"word": "one"}]}'
    assert small.post("/embed", content=content.ljust(4096), headers=JSON).status_code == 200
    response = small.post("/embed", content=content.ljust(4097), headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert "4096" in response.json()["detail"]


def test_chunked_body_over_the_limit_gets_413(small: httpx.Client) -> None:
    chunks = iter([b'{"inputs": [{"word": "one"}]}', *[b" " * 1000] * 5])
    response = small.post("/embed", content=chunks, headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_form_over_the_limit_gets_413(small: httpx.Client) -> None:
    chunks = iter([part("photo", "x" * 1000).encode()] * 5)
    response = small.post("/embed", content=chunks, headers={"content-type": FORM})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


def test_content_length_over_the_limit_gets_413_before_the_body(small: httpx.Client) -> None:
    """No byte of the body is sent, and the server still responds and closes the connection."""
    received = send_raw(small, head("/embed", 99_999_999_999))
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in received
    assert b"connection: close" in received


def test_client_that_reads_after_sending_everything_gets_the_413(small: httpx.Client) -> None:
    size = 8 << 20
    assert send_raw(small, head("/embed", size) + bytes(size)).startswith(b"HTTP/1.1 413 ")


def test_client_that_expects_continue_gets_the_413_without_sending_its_body(small: httpx.Client) -> None:
    assert send_raw(small, head("/embed", 9999, "expect: 100-continue")).startswith(b"HTTP/1.1 413 ")


def test_form_is_never_written_to_disk(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_unsupported_content_type_or_encoding_gets_415(
    client: httpx.Client, content_type: str, encoding: str, status: int
) -> None:
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
def test_form_gets_its_status_and_code(
    client: httpx.Client, content_type: str, content: str, status: int, code: str | None
) -> None:
    response = client.post("/embed", content=content.encode(), headers={"content-type": content_type})
    assert (response.status_code, response.json().get("code")) == (status, code)
