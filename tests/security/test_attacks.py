"""Attacks over the network on a service process.

The service must reject them, keep its memory, reveal nothing of its inside, and process the next request.
"""

import asyncio
import contextlib
import gzip
import json
import re
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.hostile_files import black_png, decompression_bombs, unusual_files
from tests.support.images import to_base64
from tests.support.server import EMBED, ROOT, Service, running
from tests.support.traffic import Connections, TimedResponse, post
from tests.support.waiting import wait_for

FORM = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
LEAK = re.compile(
    rf"Traceback|site-packages|\.py\b|{re.escape(str(ROOT))}|/etc/|File \"|0x[0-9a-f]{{8}}|array\(|tensor", re.IGNORECASE
)
BOMBS = decompression_bombs()
FILES = unusual_files()
VALID_PNG = FILES["valid PNG"][0]
MB = 1 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(CONCORD_LOG_LEVEL="debug") as service:
        service.embed().raise_for_status()
        yield service


@pytest.fixture(scope="module")
def image_seconds(service: Service) -> float:
    """Processor seconds of a request with the largest image that is allowed."""
    photo = to_base64(black_png(width=4000, height=4000))
    return max(cpu_seconds(service, "/embed", json={"inputs": [{"photo": photo}]})[1] for _ in range(3))


@pytest.fixture(scope="module")
def body_seconds(service: Service) -> float:
    """Processor seconds of a harmless request with a body of almost the largest size."""
    return service.body_cpu_seconds()


def cpu_seconds(service: Service, path: str, **arguments: Any) -> tuple[httpx.Response, float]:
    """Send a request. Return the response and the processor seconds of the service."""
    before = service.cpu_seconds()
    response = assert_safe(service.client.post(path, **arguments))
    return response, service.cpu_seconds() - before


def embed(service: Service, **item: Any) -> httpx.Response:
    return assert_safe(service.client.post("/embed", json={"inputs": [item]}))


def assert_safe(response: httpx.Response) -> httpx.Response:
    """Fail if the server failed, or if an error reveals something of its inside or is long. Return the response."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert not LEAK.search(response.text), response.text
        assert len(response.content) < 5000
    return response


def send_raw(service: Service, content: bytes, seconds: float = 10) -> bytes:
    """Send bytes. Return what arrives until the server closes or resets the connection, or is silent for ``seconds``."""
    received = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=seconds) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(content)
        with contextlib.suppress(OSError):
            while chunk := connection.recv(65536):
                received += chunk
    return received


def part(name: str, value: str = "x", more: str = "") -> str:
    """Return a part of a form. ``more`` is appended to its header."""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


class TestImages:
    @pytest.mark.parametrize("name", BOMBS)
    @pytest.mark.parametrize("body", ["json", "form", "openai"])
    def test_decompression_bomb_is_rejected_before_it_is_decoded(
        self, service: Service, image_seconds: float, name: str, body: str
    ) -> None:
        content = BOMBS[name]
        before = service.resident_bytes()
        if body == "json":
            response, seconds = cpu_seconds(service, "/embed", json={"inputs": [{"photo": to_base64(content)}]})
        elif body == "form":
            response, seconds = cpu_seconds(service, "/embed", files={"photo": ("a.png", content)})
        else:
            response, seconds = cpu_seconds(service, "/v1/embeddings", json={"input": [{"photo": to_base64(content)}]})
        problem = response.json().get("error", response.json())
        assert (response.status_code, problem["code"]) == (413, "too_large")
        assert seconds < image_seconds / 2
        assert service.resident_bytes() - before < 16 * MB

    @pytest.mark.parametrize("name", FILES)
    def test_unusual_file_gets_an_embedding_or_an_error(self, service: Service, name: str) -> None:
        content, statuses = FILES[name]
        before = service.resident_bytes()
        responses = [
            embed(service, photo=to_base64(content)),
            embed(service, digit={"data": to_base64(content), "media_type": "image/jpeg"}),
        ]
        if content:  # an empty part of a form is an absent modality
            responses.append(assert_safe(service.client.post("/embed", files={"photo": ("odd.jpg", content, "image/webp")})))
        assert {response.status_code for response in responses} <= statuses
        for response in responses:
            if response.status_code == 200:
                assert np.isfinite(response.json()["data"][0]["embedding"]).all()
            else:
                assert response.json()["code"] in {"bad_image", "unsupported_media_type"}
                assert response.json()["errors"][0]["pointer"].startswith("/inputs/0/")
        assert service.resident_bytes() - before < 64 * MB
        assert service.embed().status_code == 200

    def test_empty_file_in_a_form_is_an_absent_modality(self, service: Service) -> None:
        response = assert_safe(service.client.post("/embed", files={"photo": ("odd.jpg", b"", "image/webp")}))
        assert (response.status_code, response.json()["code"]) == (422, "empty_subset")

    def test_twenty_megabytes_of_base64_get_413(self, service: Service) -> None:
        before = service.resident_bytes()
        for value in ("A" * 20 * MB, {"data": "A" * 20 * MB}, "data:image/png;base64," + "A" * 20 * MB):
            response = embed(service, photo=value)
            assert (response.status_code, response.json()["code"]) == (413, "too_large")
        assert service.resident_bytes() - before < 150 * MB, "more than the bodies themselves"

    @pytest.mark.parametrize(
        ("value", "status"),
        [
            (to_base64(VALID_PNG).rstrip("="), 200),
            (to_base64(VALID_PNG).replace("+", "-").replace("/", "_"), 200),
            ("\n".join(re.findall(".{1,76}", to_base64(VALID_PNG))), 200),
            ("data:;base64," + to_base64(VALID_PNG), 200),
            ("data:image/jpeg;base64," + to_base64(VALID_PNG), 200),
            ("data:image/png;charset=x;base64," + to_base64(VALID_PNG), 200),
            ("data:text/html;base64," + to_base64(VALID_PNG), 415),
            ("data:image/svg+xml;base64," + to_base64(VALID_PNG), 415),
            ("data:image/png," + to_base64(VALID_PNG), 400),
            (to_base64(VALID_PNG) + "=", 400),
            ("=" + to_base64(VALID_PNG), 400),
            (to_base64(VALID_PNG)[:-3], 400),
            ("A", 400),
            ("\u2028AAAA", 400),
            ("AAAA\0", 400),
        ],
    )
    def test_base64_and_data_urls_get_their_status(self, service: Service, value: str, status: int) -> None:
        assert embed(service, photo=value).status_code == status


class TestBodies:
    @pytest.mark.parametrize(
        ("content", "status"),
        [
            (b'{"inputs": [{"word": "one"}], ' + b", ".join(b'"%d": 0' % n for n in range(10**6)) + b"}", 413),
            (b'{"inputs": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", 400),
            (b'{"inputs": ' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}", 400),
            (b'{"inputs": [{"word": "one", "word": "two"}], "seed": 1, "seed": 2}', 200),
            (b'{"inputs": [{"word": "one"}], "seed": 1e999}', 400),
            (b'{"inputs": [{"word": "one"}], "seed": -1e999}', 400),
            (b'{"inputs": [{"word": "one"}], "seed": NaN}', 400),
            (b'{"inputs": [{"word": "one"}], "seed": Infinity}', 400),
            (b'{"inputs": [{"word": "one"}], "seed": ' + b"9" * 10**6 + b"}", 400),
            (b'{"inputs": [{"word": "\\ud800"}]}', 400),
            (b'{"inputs": [{"\\udfff": "one"}]}', 400),
            (b'{"inputs": [{"word": "\xed\xa0\x80"}]}', 400),
            (b'{"inputs": [{"word": "a\\u0000"}]}', 422),
            (b'{"inputs": [{"word": "one\0"}]}', 400),
            (b'{"inputs": [{"word": "' + b"a" * 4 * MB + b'"}]}', 413),
            (b'{"inputs": [{"' + b"a" * 4 * MB + b'": 1}]}', 422),
            (b'{"inputs": [{"word": "one", "id": "' + b"a" * 4 * MB + b'"}]}', 422),
            (b'{"inputs": {"' + b"a" * 4 * MB + b'": 1}}', 422),
            (b'{"inputs": [{"word": "one"}], "model": "' + b"a" * 4 * MB + b'"}', 422),
            (b"\xef\xbb\xbf" + b'{"inputs": [{"word": "one"}]}', 200),
            ('{"inputs": [{"word": "one"}]}'.encode("utf-16"), 400),
            (b"null", 422),
            (b"[" * 31 * MB, 400),
            (b'"' + b"\\u0041" * 4 * MB + b'"', 422),
        ],
        ids=lambda value: value[:40] if isinstance(value, bytes) else str(value),
    )
    @pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
    def test_hostile_json_is_rejected_cheaply(
        self, service: Service, body_seconds: float, content: bytes, status: int, path: str
    ) -> None:
        if path.startswith("/v1"):
            content = content.replace(b'"inputs"', b'"input"', 1)
            status = 422 if b'"seed"' in content and status == 200 else status  # this route has no seed
        response, seconds = cpu_seconds(service, path, content=content, headers=JSON)
        assert response.status_code == status
        assert seconds < 10 * body_seconds
        assert service.embed().status_code == 200

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "gzip, identity", "GZIP"])
    def test_compressed_body_is_rejected_and_not_decompressed(self, service: Service, encoding: str) -> None:
        bomb = gzip.compress(bytes(50 * MB))
        response = assert_safe(service.client.post("/embed", content=bomb, headers={**JSON, "content-encoding": encoding}))
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")

    def test_memory_threads_and_descriptors_do_not_grow(self) -> None:
        """Threads are created on demand, so the service has one parse thread and watches no folder."""
        attacks = [b"[" * MB, b'{"inputs": [{"word": "' + b"a" * 4 * MB + b'"}]}', b'{"a": ' * 10_000]
        with running(CONCORD_DECODE_THREADS="1", CONCORD_WATCH_SECONDS="0") as service:

            def attack() -> None:
                for content in attacks:
                    assert_safe(service.client.post("/embed", content=content, headers=JSON))

            attack()
            before = (service.thread_count(), service.descriptor_count())
            resident = service.resident_bytes()
            for _ in range(20):
                attack()
            wait_for(lambda: (service.thread_count(), service.descriptor_count()) == before)
            assert service.resident_bytes() - resident < 32 * MB


CLOSE = "--b--\r\n"
HOSTILE_FORMS: dict[str, tuple[str, dict[str, str], set[int]]] = {
    "10,000 parts": ("".join(part(f"p{n}") for n in range(10_000)) + CLOSE, FORM, {400}),
    "10,000 files": ("".join(part("word", more=f'; filename="{n}"') for n in range(10_000)) + CLOSE, FORM, {400}),
    "value of 8 MB": (part("word", "x" * 8 * MB) + CLOSE, FORM, {413}),
    "name of 4 MB": (part("x" * 4 * MB) + CLOSE, FORM, {400}),
    "header of 4 MB": (part("word", "one", "\r\nX-Long: " + "x" * 4 * MB) + CLOSE, FORM, {400}),
    "100,000 headers": (part("word", "one", "\r\nX: y" * 100_000) + CLOSE, FORM, {400}),
    "no boundary": (part("word", "one") + CLOSE, {"content-type": "multipart/form-data"}, {400}),
    "empty boundary": (part("word", "one") + CLOSE, {"content-type": "multipart/form-data; boundary="}, {400}),
    "long boundary": (part("word", "one") + CLOSE, {"content-type": f"multipart/form-data; boundary={'b' * 1000}"}, {400}),
    "binary boundary": (part("word", "one") + CLOSE, {"content-type": "multipart/form-data; boundary=\xff"}, {400}),
    "boundary of 200": ("--" + "b" * 200 + "\r\n", {"content-type": f"multipart/form-data; boundary={'b' * 200}"}, {400, 422}),
    "boundaries only": ("--b\r\n" * 100_000, FORM, {400, 422}),
    "path as file name": (part("word", "one", '; filename="../../../etc/passwd"') + CLOSE, FORM, {200}),
    "null in file name": (part("word", "one", '; filename="/etc/passwd\\0.png"') + CLOSE, FORM, {200, 400}),
    "path as name": (part("../../../etc/passwd", "one") + CLOSE, FORM, {422}),
    "part twice": (part("word", "one") + part("word", "two") + CLOSE, FORM, {400}),
    "no end": (part("word", "one"), FORM, {200, 400, 422}),
    "data after the end": (part("word", "one") + CLOSE + "x" * MB, FORM, {200, 400}),
    "UTF-7": (part("word", "one"), {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}, {415}),
    "punycode": (part("word", "one"), {"content-type": "multipart/form-data; boundary=b; charset=punycode"}, {415}),
    "nested options": (part("options", "[" * 100_000) + CLOSE, FORM, {400}),
    "nested objects as options": (part("options", '{"a":' * 100_000) + CLOSE, FORM, {400}),
    "many objects as options": (part("options", ",".join('{"a":1}' for _ in range(100_000))) + CLOSE, FORM, {413}),
    "empty": ("", FORM, {400, 422}),
}


class TestForms:
    @pytest.mark.parametrize("name", HOSTILE_FORMS)
    def test_hostile_form_is_rejected_cheaply(self, service: Service, body_seconds: float, name: str) -> None:
        content, headers, statuses = HOSTILE_FORMS[name]
        raw_headers = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        before = service.resident_bytes()
        response, seconds = cpu_seconds(service, "/embed", content=content.encode("latin-1"), headers=raw_headers)
        assert response.status_code in statuses, response.text
        assert seconds < 10 * body_seconds
        assert service.resident_bytes() - before < 64 * MB
        assert service.embed().status_code == 200


class TestValues:
    @pytest.mark.parametrize(
        ("word", "status"),
        [
            ("", 422),
            (" \t\n\u00a0\u3000", 422),
            ("a" * 10**6, 413),
            ("a" * 9, 422),
            ("Ω", 422),
            ("שבע", 422),
            ("one\u200b", 422),
            ("\u202eeno", 422),
            ("e\u0301" * 3, 422),
            ("a" + "\u0301" * 9000, 422),
            ("7", 422),
            ("🎉", 422),
            ("one\ufeff", 422),
            ("\ufb01ve", 200),
            ("\uff33\uff25\uff36\uff25\uff2e", 200),
            ("  Seven ", 200),
            ("\ufdfa" * 5000, 422),
        ],
    )
    def test_text_gets_its_status(self, service: Service, word: str, status: int) -> None:
        assert embed(service, word=word).status_code == status

    def test_full_width_text_equals_the_plain_one(self, service: Service) -> None:
        plain, full_width = (embed(service, word=word).json()["data"][0]["embedding"] for word in ("fi", "\uff26\uff29"))
        np.testing.assert_allclose(plain, full_width, atol=1e-6)

    @pytest.mark.parametrize(
        ("path", "options", "status"),
        [
            ("/embed", {"inputs": [{"word": "one"}] * 33}, 422),
            ("/embed", {"inputs": []}, 422),
            ("/embed", {"inputs": [{"word": None}]}, 422),
            ("/embed", {"inputs": [{"word": "one"}, {"photo": None, "word": "two"}, {"word": "two", "id": None}]}, 200),
            ("/cross-generate", {"num_samples": 256, "targets": ["digit", "photo"]}, 422),
            ("/cross-generate", {"inputs": [{"word": "one"}] * 32, "num_samples": 5}, 422),
            ("/cross-generate", {"num_samples": 2**62}, 422),
            ("/cross-generate", {"num_samples": 10**400}, 400),
            ("/embed", {"refine": {"steps": -1}}, 422),
            ("/embed", {"refine": {"steps": 10**9}}, 422),
            ("/embed", {"refine": {"steps": 1.5}}, 422),
            ("/embed", {"refine": {"steps": "10"}}, 422),
            ("/embed", {"refine": {"lr": 0}}, 422),
            ("/embed", {"refine": {"steps": 1, "budget_ms": 0}}, 422),
            ("/embed", {"refine": {"steps": 1, "tolerance": 1e308}}, 200),
            ("/embed", {"seed": 2**63}, 422),
            ("/embed", {"seed": 2**63 - 1}, 200),
            ("/embed", {"seed": -1}, 422),
            ("/cross-generate", {"temperature": 10}, 200),
            ("/cross-generate", {"temperature": -0.1}, 422),
        ],
    )
    def test_option_out_of_range_gets_its_status(
        self, service: Service, path: str, options: dict[str, Any], status: int
    ) -> None:
        content = json.dumps({"inputs": [{"word": "one"}], **options}).encode()
        assert assert_safe(service.client.post(path, content=content, headers=JSON)).status_code == status

    def test_urls_in_values_are_never_fetched(self, service: Service) -> None:
        """Each URL names a listener of the test, or a file whose content would appear in the response."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(0.2)
            port = listener.getsockname()[1]
            hosts = [
                "127.0.0.1",
                "localhost",
                "0.0.0.0",
                "2130706433",
                "0177.0.0.1",
                "[::1]",
                "[::ffff:127.0.0.1]",
                "a@127.0.0.1",
            ]
            urls = [
                f"{scheme}://{host}:{port}/7.png" for host in hosts for scheme in ("http", "https", "HTTP", "ftp", "gopher")
            ]
            urls += [f"//127.0.0.1:{port}/7.png", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data/"]
            for url in urls:
                for value in (url, {"data": url}, {"url": url}, {"data": "AAAA", "url": url}):
                    response = embed(service, photo=value)
                    assert response.status_code in {400, 415, 422}
                    assert "root:" not in response.text
            with pytest.raises(TimeoutError):
                listener.accept()


class TestHeaders:
    @pytest.mark.parametrize(
        "name",
        [
            "../../etc/passwd",
            "digits@../..",
            "digits@",
            "@",
            "digits@0@0",
            "digits\r\nX-Evil: 1",
            "digits\0",
            "%2e%2e",
            "a" * 128,
        ],
    )
    def test_hostile_model_name_gets_404(self, service: Service, name: str) -> None:
        for response in (
            service.client.post("/embed", json={"inputs": [{"word": "one"}], "model": name}),
            service.client.post("/v1/embeddings", json={"input": "one", "model": name}),
            service.client.post("/embed", params={"model": name}, files={"word": b"one"}),
        ):
            assert assert_safe(response).status_code == 404
            assert "x-evil" not in response.headers

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/models/../../etc/passwd",
            "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
            "/v1/models/digits%00",
            "/v1/models/a%0d%0aX-Evil:%201",
            "/v1/models/" + "a" * 5000,
            "/v1/models/%ed%a0%80",
            "/%ff%fe",
            "/..;/metrics",
            "/embed%2f",
            "//embed",
        ],
    )
    def test_hostile_path_gets_404(self, service: Service, path: str) -> None:
        received = send_raw(service, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        assert b"x-evil" not in head.lower()
        assert not LEAK.search(body.decode().replace("/etc/passwd", ""))
        assert len(body) < 1000

    @pytest.mark.parametrize(
        "value", [b"a\tb", b"a b", b'a"b', b"a\xff", b"../../x", b"<script>", b"a" * 129, b"a;b", b"%0d%0a", b"a\x85b"]
    )
    def test_harmful_request_id_is_replaced(self, service: Service, value: bytes) -> None:
        response = service.client.get("/livez", headers=[(b"x-request-id", value)])
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])

    @pytest.mark.parametrize("separator", [b"\r\n", b"\n", b"\r", b"\0"])
    def test_request_id_cannot_inject_a_header(self, service: Service, separator: bytes) -> None:
        request = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: a" + separator + b" x-evil: 1\r\n\r\n"
        head, _, body = send_raw(service, request).partition(b"\r\n\r\n")
        assert b"x-evil" not in head.lower() + body.lower()

    def test_item_id_is_returned_unchanged_in_json_only(self, service: Service) -> None:
        item_id = 'a"b\\c\r\nX-Evil: 1\u2028<script>\x7f'
        response = embed(service, word="one", id=item_id)
        assert response.json()["data"][0]["id"] == item_id
        assert "x-evil" not in response.headers

    BODY = b'{"inputs":[{"word":"one"}]}'
    HEAD = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    CHUNKED = b"1b\r\n" + BODY + b"\r\n0\r\n\r\n"

    @pytest.mark.parametrize(
        ("fields", "body"),
        [
            (b"content-length: 27\r\ntransfer-encoding: chunked", CHUNKED),
            (b"transfer-encoding: chunked\r\ncontent-length: 4", CHUNKED),
            (b"content-length: 27\r\ncontent-length: 1", BODY),
            (b"content-length: 27\r\ncontent-length: 27", BODY),
            (b"content-length: 27, 27", BODY),
            (b"content-length: +27", BODY),
            (b"content-length: 0x1b", BODY),
            (b"content-length: -1", BODY),
            (b"content-length: ", BODY),
            (b"content-length: 99999999999999999999999999", BODY),
            (b"content-length : 27", BODY),
            (b"transfer-encoding: xchunked", CHUNKED),
            (b"transfer-encoding: identity", CHUNKED),
            (b"transfer-encoding: chunked, identity", CHUNKED),
            (b"transfer-encoding: gzip, chunked", CHUNKED),
            (b"transfer-encoding: chunked\r\ntransfer-encoding: chunked", CHUNKED),
            (b"transfer-encoding: \x0bchunked", CHUNKED),
            (b"transfer-encoding : chunked", CHUNKED),
            (b"transfer-encoding:\r\n chunked", CHUNKED),
            (b"x: a\rtransfer-encoding: chunked", CHUNKED),
            (b"x: a\0b\r\ncontent-length: 27", BODY),
            (b"transfer-encoding: chunked", CHUNKED.replace(b"1b\r\n", b"0x1b\r\n")),
            (b"transfer-encoding: chunked", CHUNKED.replace(b"1b\r\n", b"-1\r\n")),
            (b"transfer-encoding: chunked", CHUNKED.replace(b"1b\r\n", b"f" * 17 + b"\r\n")),
            (b"transfer-encoding: chunked", CHUNKED.replace(b"\r\n", b"\n")),
            (b"transfer-encoding: chunked", CHUNKED.replace(b"}\r\n0", b"}XX0")),
        ],
    )
    def test_request_smuggling_gets_400_and_closes_the_connection(self, service: Service, fields: bytes, body: bytes) -> None:
        second = b"GET /v1/models HTTP/1.1\r\nhost: smuggled\r\n\r\n"
        received = send_raw(service, self.HEAD + fields + b"\r\n\r\n" + body + second)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert received.count(b"HTTP/1.1 ") == 1, "the second request was processed"
        assert b"connection: close" in received

    def test_content_length_shorter_than_the_body_gets_400_only(self, service: Service) -> None:
        second = b"GET /v1/models HTTP/1.1\r\nhost: smuggled\r\n\r\n"
        received = send_raw(service, self.HEAD + b"content-length: 10\r\n\r\n" + self.BODY + second)
        assert received.count(b"HTTP/1.1 400 ") == received.count(b"HTTP/1.1 ") >= 1
        assert b"connection: close" in received

    @pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
    def test_upgrade_header_is_ignored(self, service: Service, protocol: bytes) -> None:
        """Java's client sends it with the first request. Here each request of a connection has it."""
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\nHTTP2-Settings: AAMAAABk\r\n"
        request = self.HEAD + offer + b"content-length: 27\r\n\r\n" + self.BODY
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            for _ in range(3):
                connection.sendall(request)
                response = HTTPResponse(connection)
                response.begin()
                assert (response.status, len(json.loads(response.read())["data"])) == (200, 1)

    def test_transfer_encoding_in_http_1_0_gets_400(self, service: Service) -> None:
        request = self.HEAD.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n" + self.CHUNKED
        assert send_raw(service, request).startswith(b"HTTP/1.1 400 ")

    @pytest.mark.parametrize(
        "request_start",
        [
            b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20 * MB,
            b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"x: a\r\n" * MB,
            b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"a" * 20 * MB,
            b"GET /" + b"a" * 20 * MB,
        ],
    )
    def test_endless_headers_get_4xx_or_a_closed_connection(self, service: Service, request_start: bytes) -> None:
        before = service.resident_bytes()
        received = send_raw(service, request_start)
        assert not received or re.match(rb"HTTP/1.1 4(00|31) ", received)
        assert service.resident_bytes() - before < 8 * MB
        assert service.embed().status_code == 200


def test_slow_headers_from_many_clients_do_not_delay_others(service: Service) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(500):
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=10))
            connection.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\nx: ")
        assert service.embed().status_code == 200
        assert service.client.get("/livez").status_code == 200


def test_api_keys_are_never_logged(tmp_path: Path) -> None:
    """Neither a known nor an unknown key, nor a line of the file."""
    known, unknown = "the-key-of-a-lovelace", "no-key-of-a-lovelace"
    (tmp_path / "keys").write_text(f"{known} ada\n")
    with running(CONCORD_API_KEYS_FILE=str(tmp_path / "keys"), CONCORD_LOG_LEVEL="debug") as service:
        for key, status in ((known, 200), (unknown, 403)):
            for header in (f"Bearer {key}", f"bearer   {key}"):
                assert service.client.post("/embed", json=EMBED, headers={"Authorization": header}).status_code == status
        service.client.post("/embed", json=EMBED, headers={"Authorization": known})
        (tmp_path / "keys").write_text(f"{known} ada\n{unknown} in the wrong place\n")
        service.wait_for(lambda: any("not loaded" in line["event"] for line in service.log_lines()))
        logged = service.log_lines()
    assert sum(line.get("key") == "ada" for line in logged) == 2, "the name of the key is logged"
    assert known not in json.dumps(logged)
    assert unknown not in json.dumps(logged)


CANARY = "xyzzycanary"


def test_request_contents_are_never_logged(service: Service) -> None:
    """Not even at debug level, from any place of a request, whether it is accepted or rejected."""
    png = to_base64(VALID_PNG)
    item = {"word": "one", "id": CANARY}
    headers = {
        "x-request-id": f"{CANARY} x",
        "user-agent": CANARY,
        "authorization": f"Bearer {CANARY}",
        "cookie": CANARY,
        CANARY: CANARY,
    }
    client = service.client
    lines_before = len(service.log_lines())
    bodies: list[Any] = [
        {"inputs": [item]},
        {"inputs": [{"word": CANARY[:8]}]},
        {"inputs": [{"word": CANARY}]},
        {"inputs": [{CANARY: CANARY}]},
        {"inputs": [{"photo": CANARY}]},
        {"inputs": [{"photo": {"data": png, "media_type": CANARY}}]},
        {"inputs": [{"photo": f"data:{CANARY};base64,{png}"}]},
        {"inputs": [{"photo": to_base64(CANARY.encode())}]},
        {"inputs": [item], CANARY: CANARY},
        {"inputs": [item], "model": CANARY},
        {"inputs": [item], "seed": CANARY},
        {"inputs": [item], "refine": {CANARY: 1}},
        {"inputs": [item], "targets": [CANARY]},
        {"inputs": CANARY},
        {"input": CANARY, "user": CANARY, "model": CANARY},
        CANARY,
    ]
    for path in ("/embed", "/cross-generate", "/v1/embeddings"):
        for body in bodies:
            assert_safe(client.post(path, json=body, headers=headers))
        assert_safe(client.post(f"{path}?{CANARY}={CANARY}", json=bodies[0], headers=headers))
        encoded = {**headers, "content-type": CANARY, "content-encoding": CANARY}
        assert_safe(client.post(path, content=CANARY, headers=encoded))
        assert_safe(client.post(path, content=CANARY, headers={**headers, "x-request-timeout-ms": CANARY}))
        files = {"word": (CANARY, b"one", CANARY), CANARY: (CANARY, CANARY.encode())}
        assert_safe(client.post(path, files=files, data={"id": CANARY}))
        assert_safe(client.request(CANARY[:6].upper(), path, headers=headers))
    for path in (f"/{CANARY}", f"/v1/models/{CANARY}", f"/v1/{CANARY}"):
        assert_safe(client.get(path, headers=headers))
    send_raw(service, f"{CANARY}\r\n\r\n".encode())
    send_raw(service, f"GET /{CANARY} HTTP/1.1\r\nhost: {CANARY}\r\ncontent-length: {CANARY}\r\n\r\n".encode())
    send_raw(
        service, f"GET /livez HTTP/1.1\r\nhost: {CANARY}\r\nconnection: upgrade, close\r\nupgrade: {CANARY}\r\n\r\n".encode(), 1
    )
    logged = service.log_lines()
    assert len(logged) > lines_before + 60, "the requests were not logged"
    text = json.dumps(logged).lower()
    assert CANARY not in text
    assert CANARY[:8] not in text
    assert to_base64(CANARY.encode())[:12].lower() not in text


def test_invalid_request_does_not_affect_concurrent_ones(service: Service) -> None:
    """Sixteen requests at a time, one of them with half an image, a hundred times."""
    valid, invalid = (
        post("/embed", {"inputs": [{"photo": to_base64(FILES[name][0])}]}) for name in ("valid PNG", "half a PNG")
    )
    fault = {"pointer": "/inputs/0/photo", "code": "bad_image", "detail": "the PNG file is damaged or cut short"}

    async def send_all() -> None:
        async with Connections(service.port) as connections:
            expected = embeddings(await connections.send(valid))
            for number in range(100):
                position = number % 16
                requests = [invalid if n == position else valid for n in range(16)]
                responses = await asyncio.gather(*(connections.send(request) for request in requests))
                rejected = responses.pop(position)
                assert (rejected.status, json.loads(rejected.body)["errors"]) == (400, [fault])
                assert [response.status for response in responses] == [200] * 15
                np.testing.assert_allclose([embeddings(response) for response in responses], [expected] * 15, atol=1e-5)

    asyncio.run(send_all())


def test_64_concurrent_requests_each_get_their_own_result(service: Service) -> None:
    """Every request has its own number of items, inputs and options. Its result is known from a sequential run."""

    def request(number: int) -> dict[str, Any]:
        words = [f"{chr(97 + (number + place) % 26)}{chr(97 + number // 26)}" for place in range(1 + number % 4)]
        return {
            "inputs": [{"word": word, "id": f"{number}/{word}"} for word in words],
            "seed": number,
            "refine": {"steps": (0, 0, 2)[number % 3]},
        }

    async def send_all() -> None:
        async with Connections(service.port) as connections:
            requests = [post("/embed", request(number)) for number in range(128)]
            expected = [embeddings(await connections.send(content)) for content in requests]
            assert len({tuple(np.round(vectors[0], 4)) for vectors in expected}) == 128, "two requests have the same result"
            for seed in range(3):
                limit = asyncio.Semaphore(64)

                async def send(number: int, limit: asyncio.Semaphore = limit) -> None:
                    async with limit:
                        response = await connections.send(requests[number])
                    assert response.status == 200, response
                    ids = [result["id"] for result in json.loads(response.body)["data"]]
                    assert ids == [item["id"] for item in request(number)["inputs"]]
                    np.testing.assert_allclose(embeddings(response), expected[number], atol=1e-4)

                await asyncio.gather(*(send(int(number)) for number in np.random.default_rng(seed).permutation(128)))

    asyncio.run(send_all())


def embeddings(response: TimedResponse) -> list[list[float]]:
    return [result["embedding"] for result in json.loads(response.body)["data"]]


def test_service_with_web_concurrency_set_stays_one_process() -> None:
    """Several processes would each export their own metrics. A container runs one; more containers scale it."""
    with running(WEB_CONCURRENCY="4") as service:

        async def send_all() -> list[TimedResponse]:
            async with Connections(service.port) as connections:
                return await asyncio.gather(*(connections.send(post("/embed", EMBED)) for _ in range(20)))

        assert {response.status for response in asyncio.run(send_all())} == {200}
        assert service.metric("concord_items_total", subset="word") == 20
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text()
        assert children == ""
