"""What is sent to break a service, sent: over the network to a process of its own, which must refuse it, keep its memory, tell
nothing, and answer the next request."""

import asyncio
import base64
import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests import attacks
from tests.server import EMBED, ROOT, Service, running
from tests.traffic import Answer, Connections, post

FORM = {"content-type": "multipart/form-data; boundary=b"}
JSON = {"content-type": "application/json"}
LEAK = re.compile(
    rf"Traceback|site-packages|\.py\b|{re.escape(str(ROOT))}|/etc/|File \"|0x[0-9a-f]{{8}}|array\(|tensor", re.IGNORECASE
)
BOMBS = attacks.bombs()
ODD = attacks.odd()
MB = 1 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(CONCORD_LOG_LEVEL="debug") as service:
        service.embed().raise_for_status()
        yield service


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def embed(service: Service, **item: Any) -> httpx.Response:
    return told(service.client.post("/embed", json={"inputs": [item]}))


def told(response: httpx.Response) -> httpx.Response:
    """No failure of the server, and nothing of its inside in what it tells."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert not LEAK.search(response.text), response.text
        assert len(response.content) < 5000
    return response


def cpu_seconds(service: Service) -> float:
    """Of the service, which says more than the clock where other things run too."""
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def exchange(service: Service, sent: bytes, seconds: float = 10) -> bytes:
    """What comes back for these bytes, until the server closes or falls silent."""
    received = b""
    with socket.create_connection(("127.0.0.1", service.port), timeout=seconds) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                received += piece
    return received


def part(name: str, value: str = "x", more: str = "") -> str:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


class TestImages:
    @pytest.mark.parametrize("name", BOMBS)
    @pytest.mark.parametrize("way", ["json", "form", "openai"])
    def test_bombs_are_refused_at_once_and_fill_no_memory(self, service: Service, name: str, way: str) -> None:
        content = BOMBS[name]
        before = service.resident()
        started = cpu_seconds(service)
        if way == "json":
            response = embed(service, photo=b64(content))
        elif way == "form":
            response = told(service.client.post("/embed", files={"photo": ("a.png", content)}))
        else:
            response = told(service.client.post("/v1/embeddings", json={"input": [{"photo": b64(content)}]}))
        seconds = cpu_seconds(service) - started
        problem = response.json().get("error", response.json())
        assert (response.status_code, problem["code"]) == (413, "too_large")
        assert seconds <= 0.05
        assert service.resident() - before < 16 * MB

    @pytest.mark.parametrize("name", ODD)
    def test_odd_files_get_a_vector_or_a_reason(self, service: Service, name: str) -> None:
        content, statuses = ODD[name]
        before = service.resident()
        responses = [
            embed(service, photo=b64(content)),
            embed(service, digit={"data": b64(content), "media_type": "image/jpeg"}),
            told(service.client.post("/embed", files={"photo": ("odd.jpg", content, "image/webp")})),
        ]
        assert {response.status_code for response in responses} <= statuses
        for response in responses:
            if response.status_code == 200:
                assert np.isfinite(response.json()["data"][0]["embedding"]).all()
            else:
                assert response.json()["code"] in {"bad_image", "unsupported_media_type"}
                assert response.json()["errors"][0]["pointer"].startswith("/inputs/0/")
        assert service.resident() - before < 64 * MB
        assert service.embed().status_code == 200

    def test_twenty_megabytes_of_a_letter(self, service: Service) -> None:
        before = service.resident()
        for value in ("A" * 20 * MB, {"data": "A" * 20 * MB}, "data:image/png;base64," + "A" * 20 * MB):
            response = embed(service, photo=value)
            assert (response.status_code, response.json()["code"]) == (413, "too_large")
        assert service.resident() - before < 150 * MB, "the bodies themselves, for a moment"

    @pytest.mark.parametrize(
        ("value", "status"),
        [
            (b64(ODD["a whole PNG"][0]).rstrip("="), 200),
            (b64(ODD["a whole PNG"][0]).replace("+", "-").replace("/", "_"), 200),
            ("\n".join(re.findall(".{1,76}", b64(ODD["a whole PNG"][0]))), 200),
            ("data:;base64," + b64(ODD["a whole PNG"][0]), 200),
            ("data:image/jpeg;base64," + b64(ODD["a whole PNG"][0]), 200),
            ("data:image/png;charset=x;base64," + b64(ODD["a whole PNG"][0]), 200),
            ("data:text/html;base64," + b64(ODD["a whole PNG"][0]), 415),
            ("data:image/svg+xml;base64," + b64(ODD["a whole PNG"][0]), 415),
            ("data:image/png," + b64(ODD["a whole PNG"][0]), 400),
            (b64(ODD["a whole PNG"][0]) + "=", 400),
            ("=" + b64(ODD["a whole PNG"][0]), 400),
            (b64(ODD["a whole PNG"][0])[:-3], 400),
            ("A", 400),
            ("\u2028AAAA", 400),
            ("AAAA\0", 400),
        ],
    )
    def test_base64(self, service: Service, value: str, status: int) -> None:
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
            (b"\xef\xbb\xbf" + b'{"inputs": [{"word": "one"}]}', 400),
            ('{"inputs": [{"word": "one"}]}'.encode("utf-16"), 400),
            (b"null", 422),
            (b"[" * 31 * MB, 400),
            (b'"' + b"\\u0041" * 4 * MB + b'"', 422),
        ],
        ids=lambda value: value[:40] if isinstance(value, bytes) else str(value),
    )
    @pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
    def test_json(self, service: Service, content: bytes, status: int, path: str) -> None:
        if path.startswith("/v1"):
            content = content.replace(b'"inputs"', b'"input"', 1)
            status = 422 if status == 200 else status  # there is no seed
        started = cpu_seconds(service)
        response = told(service.client.post(path, content=content, headers=JSON))
        assert response.status_code == status
        assert cpu_seconds(service) - started < 1
        assert service.embed().status_code == 200

    @pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "gzip, identity", "GZIP"])
    def test_a_packed_body_is_not_unpacked(self, service: Service, encoding: str) -> None:
        import gzip  # noqa: PLC0415

        bomb = gzip.compress(bytes(50 * MB))
        response = told(service.client.post("/embed", content=bomb, headers={**JSON, "content-encoding": encoding}))
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")

    def test_nothing_outlasts_the_storm(self, service: Service) -> None:
        """Memory, threads and descriptors after many of the worst."""
        worst = [b"[" * MB, b'{"inputs": [{"word": "' + b"a" * 4 * MB + b'"}]}', b'{"a": ' * 10_000]
        for content in worst:
            service.client.post("/embed", content=content, headers=JSON)
        before = (service.threads(), service.descriptors())
        resident = service.resident()
        for _ in range(20):
            for content in worst:
                told(service.client.post("/embed", content=content, headers=JSON))
        assert (service.threads(), service.descriptors()) == before
        assert service.resident() - resident < 32 * MB


class TestForms:
    @pytest.mark.parametrize(
        ("content", "headers", "statuses"),
        [
            ("".join(part(f"p{n}") for n in range(10_000)) + "--b--\r\n", FORM, {400}),
            ("".join(part("word", more=f'; filename="{n}"') for n in range(10_000)) + "--b--\r\n", FORM, {400}),
            (part("word", "x" * 8 * MB) + "--b--\r\n", FORM, {413}),
            (part("x" * 4 * MB) + "--b--\r\n", FORM, {400}),
            (part("word", "one", "\r\nX-Long: " + "x" * 4 * MB) + "--b--\r\n", FORM, {400}),
            (part("word", "one", "\r\nX: y" * 100_000) + "--b--\r\n", FORM, {400}),
            (part("word", "one") + "--b--\r\n", {"content-type": "multipart/form-data"}, {400}),
            (part("word", "one") + "--b--\r\n", {"content-type": "multipart/form-data; boundary="}, {400}),
            (part("word", "one") + "--b--\r\n", {"content-type": f"multipart/form-data; boundary={'b' * 1000}"}, {400}),
            (part("word", "one") + "--b--\r\n", {"content-type": "multipart/form-data; boundary=\xff"}, {400}),
            ("--" + "b" * 200 + "\r\n", {"content-type": f"multipart/form-data; boundary={'b' * 200}"}, {400, 422}),
            ("--b\r\n" * 100_000, FORM, {400, 422}),
            (part("word", "one", '; filename="../../../etc/passwd"') + "--b--\r\n", FORM, {200}),
            (part("word", "one", '; filename="/etc/passwd\\0.png"') + "--b--\r\n", FORM, {200, 400}),
            (part("../../../etc/passwd", "one") + "--b--\r\n", FORM, {422}),
            (part("word", "one") + part("word", "two") + "--b--\r\n", FORM, {400}),
            (part("word", "one"), FORM, {200, 400, 422}),
            (part("word", "one") + "--b--\r\n" + "x" * MB, FORM, {200, 400}),
            (part("word", "one"), {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}, {415}),
            (part("word", "one"), {"content-type": "multipart/form-data; boundary=b; charset=punycode"}, {415}),
            (part("options", "[" * 100_000) + "--b--\r\n", FORM, {400}),
            (part("options", '{"a":' * 100_000) + "--b--\r\n", FORM, {400}),
            (part("options", ",".join('{"a":1}' for _ in range(100_000))) + "--b--\r\n", FORM, {413}),
            ("", FORM, {400, 422}),
        ],
        ids=range(24),
    )
    def test_attacks(self, service: Service, content: str, headers: dict[str, str], statuses: set[int]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        started = cpu_seconds(service)
        before = service.resident()
        response = told(service.client.post("/embed", content=content.encode("latin-1"), headers=raw))
        assert response.status_code in statuses, response.text
        assert cpu_seconds(service) - started < 1
        assert service.resident() - before < 64 * MB
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
    def test_texts(self, service: Service, word: str, status: int) -> None:
        assert embed(service, word=word).status_code == status

    def test_normal_forms_are_one_text(self, service: Service) -> None:
        plain, wide = (embed(service, word=word).json()["data"][0]["embedding"] for word in ("fi", "\uff26\uff29"))
        np.testing.assert_allclose(plain, wide, atol=1e-6)

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
    def test_numbers(self, service: Service, path: str, options: dict[str, Any], status: int) -> None:
        content = json.dumps({"inputs": [{"word": "one"}], **options}).encode()
        assert told(service.client.post(path, content=content, headers=JSON)).status_code == status

    def test_no_address_is_ever_asked(self, service: Service) -> None:
        """Each names a listener of ours, or a place that would be told of in the answer."""
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
    def test_names_of_models_lead_nowhere(self, service: Service, name: str) -> None:
        for response in (
            service.client.post("/embed", json={"inputs": [{"word": "one"}], "model": name}),
            service.client.post("/v1/embeddings", json={"input": "one", "model": name}),
            service.client.post("/embed", params={"model": name}, files={"word": b"one"}),
        ):
            assert told(response).status_code == 404
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
    def test_paths_lead_nowhere(self, service: Service, path: str) -> None:
        received = exchange(service, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        assert b"x-evil" not in head.lower()
        assert not LEAK.search(body.decode().replace("/etc/passwd", ""))
        assert len(body) < 1000

    @pytest.mark.parametrize(
        "value", [b"a\tb", b"a b", b'a"b', b"a\xff", b"../../x", b"<script>", b"a" * 129, b"a;b", b"%0d%0a", b"a\x85b"]
    )
    def test_a_request_id_that_could_do_harm_is_not_repeated(self, service: Service, value: bytes) -> None:
        response = service.client.get("/livez", headers=[(b"x-request-id", value)])
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])

    @pytest.mark.parametrize("separator", [b"\r\n", b"\n", b"\r", b"\0"])
    def test_a_header_cannot_be_parted(self, service: Service, separator: bytes) -> None:
        sent = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: a" + separator + b" x-evil: 1\r\n\r\n"
        head, _, body = exchange(service, sent).partition(b"\r\n\r\n")
        assert b"x-evil" not in head.lower() + body.lower()

    def test_ids_come_back_as_they_were_in_json_alone(self, service: Service) -> None:
        odd = 'a"b\\c\r\nX-Evil: 1\u2028<script>\x7f'
        response = embed(service, word="one", id=odd)
        assert response.json()["data"][0]["id"] == odd
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
    def test_two_servers_could_not_disagree_on_where_a_request_ends(self, service: Service, fields: bytes, body: bytes) -> None:
        second = b"GET /v1/models HTTP/1.1\r\nhost: smuggled\r\n\r\n"
        received = exchange(service, self.HEAD + fields + b"\r\n\r\n" + body + second)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert received.count(b"HTTP/1.1 ") == 1, "the rest of the connection is not read"
        assert b"connection: close" in received

    def test_after_a_length_that_lies_nothing_is_read(self, service: Service) -> None:
        sent = self.HEAD + b"content-length: 10\r\n\r\n" + self.BODY + b"GET /v1/models HTTP/1.1\r\nhost: smuggled\r\n\r\n"
        received = exchange(service, sent)
        assert received.count(b"HTTP/1.1 400 ") == received.count(b"HTTP/1.1 ") >= 1
        assert b"connection: close" in received

    @pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
    def test_an_offer_to_speak_something_else_is_passed_over(self, service: Service, protocol: bytes) -> None:
        """As Java's client makes it, and more than once in a connection."""
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\nHTTP2-Settings: AAMAAABk\r\n"
        request = self.HEAD + offer + b"content-length: 27\r\n\r\n" + self.BODY
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as connection:
            for _ in range(3):
                connection.sendall(request)
                response = HTTPResponse(connection)
                response.begin()
                assert (response.status, len(json.loads(response.read())["data"])) == (200, 1)

    def test_a_transfer_encoding_in_http_1_0(self, service: Service) -> None:
        sent = self.HEAD.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n" + self.CHUNKED
        assert exchange(service, sent).startswith(b"HTTP/1.1 400 ")

    @pytest.mark.parametrize(
        "sent",
        [
            b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20 * MB,
            b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"x: a\r\n" * MB,
            b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"a" * 20 * MB,
            b"GET /" + b"a" * 20 * MB,
        ],
    )
    def test_headers_without_end_are_cut(self, service: Service, sent: bytes) -> None:
        before = service.resident()
        received = exchange(service, sent)
        assert not received or re.match(rb"HTTP/1.1 4(00|31) ", received)
        assert service.resident() - before < 8 * MB
        assert service.embed().status_code == 200


def test_slow_headers_from_many_hold_up_nobody(service: Service) -> None:
    with contextlib.ExitStack() as crowd:
        for _ in range(500):
            connection = crowd.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=10))
            connection.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\nx: ")
        assert service.embed().status_code == 200
        assert service.client.get("/livez").status_code == 200


def test_no_key_is_logged(tmp_path: Path) -> None:
    """Neither one that is known nor one that is not, nor the file's."""
    known, unknown = "the-key-of-a-lovelace", "no-key-of-a-lovelace"
    (tmp_path / "keys").write_text(f"{known} ada\n")
    with running(CONCORD_API_KEYS_FILE=str(tmp_path / "keys"), CONCORD_LOG_LEVEL="debug") as service:
        for key, status in ((known, 200), (unknown, 403)):
            for header in (f"Bearer {key}", f"bearer   {key}"):
                assert service.client.post("/embed", json=EMBED, headers={"Authorization": header}).status_code == status
        service.client.post("/embed", json=EMBED, headers={"Authorization": known})
        (tmp_path / "keys").write_text(f"{known} ada\n{unknown} in the wrong place\n")
        service.wait_for(lambda: any("not read" in line["event"] for line in service.lines()), 10)
        logged = service.lines()
    assert sum(line.get("key") == "ada" for line in logged) == 2, "the name is told"
    assert known not in json.dumps(logged)
    assert unknown not in json.dumps(logged)


CANARY = "xyzzycanary"


def test_nothing_of_a_request_is_logged(service: Service) -> None:
    """Not at the debug level, not from any place in which something can be sent, whether it is taken or refused."""
    png = b64(ODD["a whole PNG"][0])
    item = {"word": "one", "id": CANARY}
    headers = {
        "x-request-id": f"{CANARY} x",
        "user-agent": CANARY,
        "authorization": f"Bearer {CANARY}",
        "cookie": CANARY,
        CANARY: CANARY,
    }
    client = service.client
    lines = len(service.lines())
    bodies: list[Any] = [
        {"inputs": [item]},
        {"inputs": [{"word": CANARY[:8]}]},
        {"inputs": [{"word": CANARY}]},
        {"inputs": [{CANARY: CANARY}]},
        {"inputs": [{"photo": CANARY}]},
        {"inputs": [{"photo": {"data": png, "media_type": CANARY}}]},
        {"inputs": [{"photo": f"data:{CANARY};base64,{png}"}]},
        {"inputs": [{"photo": b64(CANARY.encode())}]},
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
            told(client.post(path, json=body, headers=headers))
        told(client.post(f"{path}?{CANARY}={CANARY}", json=bodies[0], headers=headers))
        told(client.post(path, content=CANARY, headers={**headers, "content-type": CANARY, "content-encoding": CANARY}))
        told(client.post(path, content=CANARY, headers={**headers, "x-request-timeout-ms": CANARY}))
        told(
            client.post(path, files={"word": (CANARY, b"one", CANARY), CANARY: (CANARY, CANARY.encode())}, data={"id": CANARY})
        )
        told(client.request(CANARY[:6].upper(), path, headers=headers))
    for path in (f"/{CANARY}", f"/v1/models/{CANARY}", f"/v1/{CANARY}"):
        told(client.get(path, headers=headers))
    exchange(service, f"{CANARY}\r\n\r\n".encode())
    exchange(service, f"GET /{CANARY} HTTP/1.1\r\nhost: {CANARY}\r\ncontent-length: {CANARY}\r\n\r\n".encode())
    exchange(
        service, f"GET /livez HTTP/1.1\r\nhost: {CANARY}\r\nconnection: upgrade, close\r\nupgrade: {CANARY}\r\n\r\n".encode(), 1
    )
    logged = service.lines()
    assert len(logged) > lines + 60, "it was logged that they came"
    text = json.dumps(logged).lower()
    assert CANARY not in text
    assert CANARY[:8] not in text
    assert b64(CANARY.encode())[:12].lower() not in text


def test_a_poisoned_request_harms_no_neighbour(service: Service) -> None:
    """16 at a time, one of them with half a picture, a hundred times."""
    whole, half = (post("/embed", {"inputs": [{"photo": b64(ODD[name][0])}]}) for name in ("a whole PNG", "half a PNG"))
    fault = {"pointer": "/inputs/0/photo", "code": "bad_image", "detail": "the PNG file is damaged or cut short"}

    async def rounds() -> None:
        connections = Connections(service.port)
        alone = vectors(await connections.ask(whole))
        for number in range(100):
            guilty = number % 16
            answers = await asyncio.gather(*(connections.ask(half if n == guilty else whole) for n in range(16)))
            refused = answers.pop(guilty)
            assert (refused.status, json.loads(refused.body)["errors"]) == (400, [fault])
            assert [answer.status for answer in answers] == [200] * 15
            np.testing.assert_allclose([vectors(answer) for answer in answers], [alone] * 15, atol=1e-5)
        await connections.close()

    asyncio.run(rounds())


def test_64_at_a_time_each_get_their_own_answer(service: Service) -> None:
    """Every request has its own number of items, input and options, and knows what it must get."""

    def request(number: int) -> dict[str, Any]:
        words = [f"{chr(97 + (number + place) % 26)}{chr(97 + number // 26)}" for place in range(1 + number % 4)]
        steps = (0, 0, 2)[number % 3]
        return {
            "inputs": [{"word": word, "id": f"{number}/{word}"} for word in words],
            "seed": number,
            "refine": {"steps": steps},
        }

    async def rounds() -> None:
        connections = Connections(service.port)
        sent = [post("/embed", request(number)) for number in range(128)]
        expected = [vectors(await connections.ask(one)) for one in sent]
        assert len({tuple(np.round(one[0], 4)) for one in expected}) == 128, "each can be told from all others"
        for seed in range(3):
            waiting = asyncio.Semaphore(64)

            async def ask(number: int, waiting: asyncio.Semaphore = waiting) -> None:
                async with waiting:
                    answer = await connections.ask(sent[number])
                assert answer.status == 200, answer
                ids = [one["id"] for one in json.loads(answer.body)["data"]]
                assert ids == [item["id"] for item in request(number)["inputs"]]
                np.testing.assert_allclose(vectors(answer), expected[number], atol=1e-4)

            await asyncio.gather(*(ask(int(number)) for number in np.random.default_rng(seed).permutation(128)))
        await connections.close()

    asyncio.run(rounds())


def vectors(answer: Answer) -> list[list[float]]:
    return [one["embedding"] for one in json.loads(answer.body)["data"]]


def test_one_process_whatever_the_environment_says() -> None:
    """Several would each tell their own metrics: a container has one, and containers are what scales."""
    with running(WEB_CONCURRENCY="4") as service:

        async def ask() -> list[Answer]:
            connections = Connections(service.port)
            answers = await asyncio.gather(*(connections.ask(post("/embed", EMBED)) for _ in range(20)))
            await connections.close()
            return answers

        assert {answer.status for answer in asyncio.run(ask())} == {200}
        assert service.metric('concord_items_total{subset="word"}') == 20
        children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text()
        assert children == ""
