"""The service as an operator runs it: a process of its own, spoken to over a loopback port."""

import base64
import contextlib
import io
import itertools
import json
import signal
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.server import Service, running, start

HUNDRED_MB = 100_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.fixture
def client(server: Service) -> httpx.Client:
    return server.client


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def enormous_png(side: int = 30_000) -> bytes:
    """A picture of one colour, small as a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


BROKEN: dict[str, tuple[Any, int, str]] = {
    "truncated PNG": ({"inputs": [{"photo": b64(png(0)[:200])}]}, 400, "bad_image"),
    "PNG of 30000 x 30000": ({"inputs": [{"photo": b64(enormous_png())}]}, 413, "too_large"),
    "unknown modality": ({"inputs": [{"sound": "x"}]}, 422, "unknown_modality"),
    "empty subset": ({"inputs": [{}]}, 422, "empty_subset"),
    "NaN": (b'{"inputs": [{"word": "one"}], "seed": NaN}', 400, "invalid_json"),
    "100 MB": (b" " * HUNDRED_MB, 413, "too_large"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_input_gets_its_status_within_a_second_and_the_next_request_works(client: httpx.Client, name: str) -> None:
    broken, status, code = BROKEN[name]
    content = broken if isinstance(broken, bytes) else json.dumps(broken).encode()
    started = time.perf_counter()
    response = client.post("/embed", content=content, headers={"content-type": "application/json"})
    assert time.perf_counter() - started < 1
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200


def test_100_mb_in_chunks_are_refused_too(client: httpx.Client) -> None:
    started = time.perf_counter()
    chunks = (b" " * 1_000_000 for _ in range(HUNDRED_MB // 1_000_000))
    response = client.post("/embed", content=chunks, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert time.perf_counter() - started < 2, "a third of it has to be read before it is too much"
    assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200


def test_a_client_that_goes_on_sending_still_gets_the_answer(client: httpx.Client) -> None:
    head = f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {HUNDRED_MB}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        started = time.perf_counter()
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 413"
        assert time.perf_counter() - started < 0.5, "the answer comes before the body"
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b" " * 1_000_000)
    assert client.post("/embed", json={"inputs": [{"word": "one"}]}).status_code == 200


def test_mixed_requests_from_16_connections_each_get_the_answer_they_get_alone(
    server: Service,
) -> None:
    client = server.client
    values = {"digit": b64(png(1)), "photo": b64(png(2)), "word": "seven"}
    subsets = [s for size in (1, 2, 3) for s in itertools.combinations(values, size)]
    requests = [
        {
            "inputs": [{name: values[name] for name in subset}],
            "seed": seed,
            "representation": "sample",
            "refine": {"steps": steps},
        }
        for subset in subsets
        for seed, steps in ((1, 0), (2, 0), (3, 3))
    ]

    def ask(request: dict[str, Any], over: httpx.Client) -> list[float]:
        response = over.post("/embed", json=request)
        assert response.status_code == 200, response.text
        return list(response.json()["data"][0]["embedding"])

    alone = [ask(request, client) for request in requests]

    def connection(number: int) -> None:
        order = np.random.default_rng(number).permutation(np.arange(13) + number) % len(requests)
        with httpx.Client(base_url=client.base_url, timeout=20, trust_env=False) as own:
            for index in order:
                np.testing.assert_allclose(ask(requests[index], own), alone[index], atol=1e-5)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(connection, range(16)))
    assert server.resident() < 400 << 20


def test_the_log_tells_failures_and_nothing_of_what_was_sent() -> None:
    with running(CONCORD_LOG_LEVEL="debug") as service:
        client = service.client
        client.post("/embed", json={"inputs": [{"word": "swordfi"}]}, headers={"X-Request-Id": "good-1"})
        client.post("/embed", json={"inputs": [{"swordfish": 1, "id": "swordfish"}]}, headers={"X-Request-Id": "bad-1"})
        client.get("/v1/models/swordfish")
        assert service.stop(signal.SIGTERM) == 0
        lines = {line.get("request_id"): line for line in service.lines()}
        assert service.process.stderr is not None
        told = str(lines) + service.process.stderr.read()
    assert (lines["good-1"]["level"], lines["good-1"]["status"]) == ("debug", 200)
    assert (lines["bad-1"]["level"], lines["bad-1"]["status"], lines["bad-1"]["code"]) == ("info", 422, "unknown_modality")
    assert "swordfi" not in told
    assert "Traceback" not in told


def test_it_starts_within_seconds() -> None:
    started = time.perf_counter()
    with running():
        assert time.perf_counter() - started < 6, "two seconds on an idle machine"


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "told"),
    [
        ((), {"CONCORD_PORT": "eighty"}, 2, "CONCORD_PORT=eighty"),
        (("--port", "99999"), {}, 2, "CONCORD_PORT=99999"),
        ((), {"CONCORD_MAX_ITEMS": "0"}, 2, "CONCORD_MAX_ITEMS=0"),
        (("--bundle", "letters"), {}, 1, "letters"),
        (("--bundle", "/nowhere/at/all"), {}, 1, "/nowhere/at/all"),
        (("--port", "0", "--host", "256.0.0.1"), {}, 1, "256.0.0.1"),
    ],
)
def test_a_bad_setting_ends_in_a_message(
    arguments: tuple[str, ...], environment: dict[str, str], status: int, told: str
) -> None:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert told in err
    assert "Traceback" not in out + err


def test_a_port_in_use_ends_in_a_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in err
    assert "--port" in err
    assert "Traceback" not in err


def test_help_teaches() -> None:
    out, _ = start("--help").communicate(timeout=30)
    assert all(word in out for word in ("--port", "--bundle", "CONCORD_MAX_ITEMS", "openapi", "curl"))
