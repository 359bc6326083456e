"""A service process on a loopback port: broken requests, concurrent requests, the log, and the command line."""

import contextlib
import itertools
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.hostile_files import black_png
from tests.support.images import noise_image, to_base64
from tests.support.raw_http import connect, head
from tests.support.server import Service, running, start

HUNDRED_MB = 100_000_000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.fixture
def client(server: Service) -> httpx.Client:
    return server.client


@pytest.fixture(scope="module")
def body_seconds(server: Service) -> float:
    """Processor seconds of a harmless request with a body of almost the largest size."""
    return server.body_cpu_seconds()


BROKEN: dict[str, tuple[Any, int, str]] = {
    "truncated PNG": ({"inputs": [{"photo": to_base64(noise_image(0)[:200])}]}, 400, "bad_image"),
    "PNG of 30000 x 30000": (
        {"inputs": [{"photo": to_base64(black_png(width=30_000, height=30_000, depth=1))}]},
        413,
        "too_large",
    ),
    "unknown modality": ({"inputs": [{"sound": "x"}]}, 422, "unknown_modality"),
    "empty subset": ({"inputs": [{}]}, 422, "empty_subset"),
    "NaN": (b'{"inputs": [{"word": "one"}], "seed": NaN}', 400, "invalid_json"),
    "100 MB": (b" " * HUNDRED_MB, 413, "too_large"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_request_gets_its_status_cheaply_and_the_next_succeeds(server: Service, body_seconds: float, name: str) -> None:
    broken, status, code = BROKEN[name]
    content = broken if isinstance(broken, bytes) else json.dumps(broken).encode()
    before = server.cpu_seconds()
    response = server.client.post("/embed", content=content, headers=JSON)
    assert server.cpu_seconds() - before < 10 * body_seconds
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert server.embed().status_code == 200


def test_chunked_body_of_100_mb_gets_413_cheaply(server: Service, body_seconds: float) -> None:
    """Without a Content-Length, the server has to read until the limit is crossed."""
    chunks = (b" " * 1_000_000 for _ in range(HUNDRED_MB // 1_000_000))
    before = server.cpu_seconds()
    response = server.client.post("/embed", content=chunks, headers=JSON)
    assert server.cpu_seconds() - before < 10 * body_seconds
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    assert server.embed().status_code == 200


def test_client_that_goes_on_sending_gets_413_before_its_body(server: Service) -> None:
    with connect(server.client) as connection:
        connection.sendall(head("/embed", HUNDRED_MB))
        assert connection.recv(12) == b"HTTP/1.1 413"
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b" " * 1_000_000)
    assert server.embed().status_code == 200


def test_concurrent_requests_get_the_results_of_sequential_ones(server: Service) -> None:
    values = {"digit": to_base64(noise_image(1)), "photo": to_base64(noise_image(2)), "word": "seven"}
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

    def embed(request: dict[str, Any], client: httpx.Client) -> list[float]:
        response = client.post("/embed", json=request)
        assert response.status_code == 200, response.text
        return list(response.json()["data"][0]["embedding"])

    expected = [embed(request, server.client) for request in requests]

    def send_over_own_connection(number: int) -> None:
        order = np.random.default_rng(number).permutation(np.arange(13) + number) % len(requests)
        with httpx.Client(base_url=server.client.base_url, timeout=60, trust_env=False) as client:
            for index in order:
                np.testing.assert_allclose(embed(requests[index], client), expected[index], atol=1e-5)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(send_over_own_connection, range(16)))
    assert server.resident_bytes() < 400 << 20


def test_log_reports_failures_without_request_contents() -> None:
    with running(CONCORD_LOG_LEVEL="debug") as service:
        client = service.client
        client.post("/embed", json={"inputs": [{"word": "swordfi"}]}, headers={"X-Request-Id": "good-1"})
        client.post("/embed", json={"inputs": [{"swordfish": 1, "id": "swordfish"}]}, headers={"X-Request-Id": "bad-1"})
        client.get("/v1/models/swordfish")
        assert service.stop(signal.SIGTERM) == 0
        lines = {line.get("request_id"): line for line in service.log_lines()}
        assert service.process.stderr is not None
        text = str(lines) + service.process.stderr.read()
    assert (lines["good-1"]["level"], lines["good-1"]["status"]) == ("debug", 200)
    assert (lines["bad-1"]["level"], lines["bad-1"]["status"], lines["bad-1"]["code"]) == ("info", 422, "unknown_modality")
    assert "swordfi" not in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_start_takes_at_most_five_times_as_long_as_its_imports() -> None:
    """Starting includes loading the bundle, warming up and replaying the golden examples: seconds on an idle machine."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import concord.service.cli"], check=True, timeout=60)
    import_seconds = time.perf_counter() - began
    began = time.perf_counter()
    with running():
        assert time.perf_counter() - began < 5 * import_seconds


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        ((), {"CONCORD_PORT": "eighty"}, 2, "CONCORD_PORT=eighty"),
        (("--port", "99999"), {}, 2, "CONCORD_PORT=99999"),
        ((), {"CONCORD_MAX_ITEMS": "0"}, 2, "CONCORD_MAX_ITEMS=0"),
        (("--bundle", "letters"), {}, 1, "letters"),
        (("--bundle", "/nowhere/at/all"), {}, 1, "/nowhere/at/all"),
        (("--port", "0", "--host", "256.0.0.1"), {}, 1, "256.0.0.1"),
    ],
)
def test_invalid_setting_ends_with_a_message(
    arguments: tuple[str, ...], environment: dict[str, str], status: int, message: str
) -> None:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert message in err
    assert "Traceback" not in out + err


def test_port_in_use_ends_with_a_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = start("--port", str(port))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in err
    assert "--port" in err
    assert "Traceback" not in err


def test_help_names_options_settings_and_an_example() -> None:
    out, _ = start("--help").communicate(timeout=60)
    assert all(word in out for word in ("--port", "--bundle", "CONCORD_MAX_ITEMS", "openapi", "curl"))
