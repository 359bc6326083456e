"""HTTP/1 in the forms that old clients, proxies and monitoring send, over a socket."""

import json
import math
import ssl
from pathlib import Path
from typing import BinaryIO

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.raw_http import connect, head, read_response, send_raw
from tests.support.server import Serve

BODY = json.dumps({"inputs": [{"word": "seven"}]}).encode()
# As Prometheus 3 scrapes.
SCRAPE = {
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "Accept-Encoding": "gzip",
    "User-Agent": "Prometheus/3.5.0",
    "X-Prometheus-Scrape-Timeout-Seconds": "10",
}


def embedding(client: httpx.Client) -> list[float]:
    """The embedding of ``BODY`` in an ordinary request."""
    response = client.post("/embed", content=BODY, headers={"content-type": "application/json"})
    numbers: list[float] = response.json()["data"][0]["embedding"]
    return numbers


def read_embedding(file: BinaryIO) -> list[float]:
    """The embedding in the next response."""
    status, headers, body = read_response(file)
    assert status == 200, body
    assert headers["x-request-id"] != "other"
    numbers: list[float] = json.loads(body)["data"][0]["embedding"]
    return numbers


def test_http_1_0_request_is_answered_and_its_connection_is_closed(client: httpx.Client) -> None:
    request = head("/embed", len(BODY)).replace(b"HTTP/1.1", b"HTTP/1.0") + BODY
    response_head, _, body = send_raw(client, request).partition(b"\r\n\r\n")
    assert response_head.startswith((b"HTTP/1.1 200 ", b"HTTP/1.0 200 "))
    assert b"transfer-encoding" not in response_head.lower()
    assert json.loads(body)["data"][0]["embedding"] == embedding(client)


def test_expect_100_continue_gets_100_before_the_body_is_sent(client: httpx.Client) -> None:
    with connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(head("/embed", len(BODY), "expect: 100-continue"))
        assert (file.readline(), file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        connection.sendall(BODY)
        assert read_embedding(file) == embedding(client)


def chunked(content: bytes, *trailers: str) -> bytes:
    """Return a request whose body has two chunks, and trailers."""
    lines = ["POST /embed HTTP/1.1", "host: x", "content-type: application/json", "transfer-encoding: chunked"]
    lines += [f"trailer: {', '.join(trailer.partition(':')[0] for trailer in trailers)}"] if trailers else []
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (content[:5], content[5:]))
    return "\r\n".join([*lines, "", ""]).encode() + chunks + "\r\n".join(["0", *trailers, "", ""]).encode()


@pytest.mark.parametrize("trailers", [(), ("x-checksum: 1",), ("host: elsewhere", "x-request-id: other", "expect: 1")])
def test_trailers_of_a_chunked_body_are_ignored(client: httpx.Client, trailers: tuple[str, ...]) -> None:
    with connect(client) as connection, connection.makefile("rb") as file:
        for _ in range(2):
            connection.sendall(chunked(BODY, *trailers))
            assert read_embedding(file) == embedding(client)


def test_key_in_a_trailer_does_not_grant_access(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-key-of-a-lovelace\n")
    with serve(api_keys_file=tmp_path / "keys") as client, connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(chunked(BODY, "authorization: Bearer the-key-of-a-lovelace"))
        assert read_response(file)[0] == 401


@pytest.mark.parametrize("target", ["http://x/embed", "http://other.example:8000/embed?normalize=false", "HTTP://x/embed"])
def test_absolute_target_is_its_path(client: httpx.Client, target: str) -> None:
    """As clients of a proxy send it."""
    with connect(client) as connection, connection.makefile("rb") as file:
        for _ in range(2):
            connection.sendall(head(target, len(BODY)) + BODY)
            assert read_embedding(file) == embedding(client)


def test_pipelined_requests_of_every_form_are_answered_in_order(client: httpx.Client) -> None:
    plain = head("/embed", len(BODY)) + BODY
    with connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(plain + chunked(BODY, "x: 1") + b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" + plain)
        assert read_embedding(file) == read_embedding(file) == embedding(client)
        assert json.loads(read_response(file)[2])["status"] == "ok"
        assert read_embedding(file) == embedding(client)


def test_tls_on_the_plain_port_gets_400_and_does_not_affect_others(client: httpx.Client) -> None:
    context = ssl.create_default_context()
    with connect(client) as connection, pytest.raises(ssl.SSLError):
        context.wrap_socket(connection, server_hostname="localhost")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    handshake = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    assert send_raw(client, outgoing.read()).startswith(b"HTTP/1.1 400 ")
    assert client.get("/livez").status_code == 200


def test_scrape_of_prometheus_3_gets_metrics_that_it_reads(client: httpx.Client) -> None:
    embedding(client)
    raw = httpx.get(client.base_url.join("/metrics"), headers=SCRAPE)
    media_type = raw.headers["content-type"]
    assert media_type.startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(raw.text)}
    (ready,) = families["concord_ready"].samples
    assert ready.value == 1
    assert all(math.isfinite(sample.value) for family in families.values() for sample in family.samples)
    assert raw.headers.get("content-encoding", "identity") in ("gzip", "identity")
