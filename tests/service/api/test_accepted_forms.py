"""Requests in the forms that browsers, proxies and frameworks send them."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from concord.service.api.requests import parse_options
from concord.service.api.schemas import EmbeddingsOptions, EmbedOptions, GenerateOptions
from concord.service.errors import CODES
from tests.support.raw_http import connect, head, read_response, send_raw
from tests.support.server import ROOT, Serve

PHOTO = (ROOT / "tests/fixtures/photo-7.png").read_bytes()
OPTIONS: dict[str, dict[str, Any]] = {
    "/embed": {"model": "digits", "seed": 3, "refine": {"steps": 1, "trace": True}, "normalize": True},
    "/cross-generate": {"num_samples": 2, "latent": "mean", "output": {"image": "webp"}, "targets": ["digit"]},
    "/v1/embeddings": {"model": "digits", "encoding_format": "base64", "dimensions": 32, "user": "ada"},
}


def option_fields(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Paths of all options of a model, those of inner objects included."""
    for name, field in model.model_fields.items():
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((name, *inner) for inner in option_fields(field.annotation))


@pytest.mark.parametrize("options", [EmbedOptions, GenerateOptions, EmbeddingsOptions])
@given(data=st.data())
def test_null_options_are_the_same_as_left_out(options: type[BaseModel], data: st.DataObject) -> None:
    fields: dict[str, Any] = {}
    for path in data.draw(st.lists(st.sampled_from(list(option_fields(options))), unique=True)):
        inner = fields
        for name in path[:-1]:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner.setdefault(path[-1], None)
    assert parse_options(options, fields) == parse_options(options, {})


@pytest.mark.parametrize("path", OPTIONS)
def test_response_with_every_other_option_null_is_that_without_them(client: httpx.Client, path: str) -> None:
    items = "input" if path.startswith("/v1") else "inputs"
    body = {items: [{"word": "seven"}], **OPTIONS[path]}
    names = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    request = names["schema"]["$ref"].rpartition("/")[2]
    properties = client.get("/openapi.json").json()["components"]["schemas"][request]["properties"]
    nulls = dict.fromkeys(properties)
    assert client.post(path, json={**nulls, **body}).json() == client.post(path, json=body).json()


def test_form_with_empty_file_and_blank_text_treats_them_as_absent(client: httpx.Client) -> None:
    files = {"photo": ("", b"", "application/octet-stream"), "word": (None, "seven"), "digit": ("", b"")}
    response = client.post("/embed", files=files, data={"id": "  "})
    assert response.json()["data"][0]["modalities"] == ["word"]
    assert response.json()["data"][0]["id"] is None
    blank = client.post("/embed", files={"photo": ("x.png", PHOTO), "word": (None, " \r\n")})
    assert blank.json()["data"][0]["modalities"] == ["photo"]
    none = client.post("/embed", files={"photo": ("", b""), "word": (None, "")})
    assert (none.status_code, none.json()["code"]) == (422, "empty_subset")


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Disposition: form-data; name=photo\r\nContent-Type: image/png",
        b"Content-Disposition: form-data; name=photo\r\ncontent-type: application/octet-stream",
        b"Content-Disposition: form-data; name=photo; filename*=UTF-8''na%C3%AFve.png",
        b"Content-Disposition: form-data; name=photo; filename*=UTF-8''x.png\r\nContent-Type: image/png",
    ],
)
def test_form_part_with_media_type_or_extended_file_name_is_read_as_bytes(client: httpx.Client, headers: bytes) -> None:
    content = b"--b\r\n" + headers + b"\r\n\r\n" + PHOTO + b"\r\n--b--\r\n"
    response = client.post("/embed", content=content, headers={"content-type": "multipart/form-data; boundary=b"})
    expected = client.post("/embed", files={"photo": ("x.png", PHOTO)})
    assert response.json()["data"] == expected.json()["data"]


@pytest.mark.parametrize("media_type", [b"text/plain; charset=utf-8", b"application/json"])
def test_form_part_with_text_media_type_stays_text(client: httpx.Client, media_type: bytes) -> None:
    part = b"--b\r\nContent-Disposition: form-data; name=word\r\nContent-Type: " + media_type + b"\r\n\r\nseven\r\n--b--\r\n"
    response = client.post("/embed", content=part, headers={"content-type": "multipart/form-data; boundary=b"})
    assert response.json()["data"][0]["modalities"] == ["word"]


HEAD_PATHS = [
    "/livez",
    "/readyz",
    "/healthz",
    "/v2/health/live",
    "/v2/health/ready",
    "/metrics",
    "/v1/models",
    "/openapi.json",
]


@pytest.mark.parametrize("path", HEAD_PATHS)
def test_head_has_status_and_headers_of_get_without_body(client: httpx.Client, path: str) -> None:
    got = client.get(path)
    response = client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == got.headers["content-type"]
    assert client.get("/livez").status_code == 200  # the connection is still in step


def test_head_of_an_inference_route_is_not_allowed(client: httpx.Client) -> None:
    assert client.head("/embed").status_code == 405
    assert all("head" not in operations for operations in client.get("/openapi.json").json()["paths"].values())


@pytest.mark.parametrize("cut", [1, 20, 58, 63, 64, 66, 70, 90, 1000])
def test_http2_offer_in_any_segment_keeps_the_body(client: httpx.Client, cut: int) -> None:
    """``cut`` falls into the request line, into the name and the value of Upgrade, behind it, and into the body."""
    body = json.dumps({"inputs": [{"word": "seven"}]}).encode()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    request = head("/embed", len(body), *offer) + body
    with connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(request[:cut])
        status = client.get("/livez").status_code  # the server has handled the first segment by now
        connection.sendall(request[cut:])
        assert (status, read_response(file)[0]) == (200, 200)


def test_http2_offer_on_a_pipelined_request_keeps_every_body(client: httpx.Client) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    bodies = [json.dumps({"inputs": [{"id": str(number), "word": "seven"}]}).encode() for number in range(4)]
    requests = [head("/embed", len(body), *(offer if number % 2 else ())) + body for number, body in enumerate(bodies)]
    with connect(client) as connection, connection.makefile("rb") as file:
        connection.sendall(b"".join(requests))
        responses = [read_response(file) for _ in requests]
    assert [status for status, _, _ in responses] == [200] * 4
    assert [json.loads(content)["data"][0]["id"] for _, _, content in responses] == ["0", "1", "2", "3"]


def test_upgrade_word_in_a_body_is_left_alone(client: httpx.Client) -> None:
    content = b"--b\r\nContent-Disposition: form-data; name=word\r\n\r\nx\r\nUpgrade: h2c\r\n--b--\r\n"
    kind = "content-type: multipart/form-data; boundary=b"
    request = head("/embed", len(content), "connection: close").replace(b"content-type: application/json", kind.encode())
    assert b"allowed are ' abcdef" in send_raw(client, request + content)  # the text arrived, and its line break is unknown


def test_connect_method_is_rejected(client: httpx.Client) -> None:
    response = send_raw(client, b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\nconnection: close\r\nupgrade: h2c\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(("given_id", "echoed"), [(7, "7"), (3.0, "3"), (-1, "-1"), (0, "0"), (None, None), ("a", "a")])
def test_whole_number_id_is_echoed_as_a_string(client: httpx.Client, given_id: object, echoed: str | None) -> None:
    response = client.post("/embed", json={"inputs": [{"id": given_id, "word": "seven"}]})
    assert response.json()["data"][0]["id"] == echoed


@pytest.mark.parametrize("given_id", [1.5, True, 2**53 + 2, [], "x" * 129])
def test_id_that_is_neither_string_nor_whole_number_is_rejected(client: httpx.Client, given_id: object) -> None:
    response = client.post("/embed", json={"inputs": [{"id": given_id, "word": "seven"}]})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/inputs/0/id"


def test_one_object_for_inputs_is_a_list_of_one(client: httpx.Client) -> None:
    item = {"word": "seven"}
    for path, name in (("/embed", "inputs"), ("/cross-generate", "inputs"), ("/v1/embeddings", "input")):
        assert client.post(path, json={name: item}).json() == client.post(path, json={name: [item]}).json()


def test_json_with_byte_order_mark_is_read(client: httpx.Client) -> None:
    content = codecs.BOM_UTF8 + b'{"inputs": [{"word": "seven"}]}'
    assert client.post("/embed", content=content, headers={"content-type": "application/json"}).status_code == 200
    options = codecs.BOM_UTF8 + b'{"seed": 1}'
    assert client.post("/embed", files={"word": (None, "seven"), "options": (None, options)}).status_code == 200


def test_v1_embeddings_takes_2048_texts_in_chunks(client: httpx.Client) -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six"]
    texts = [words[number % 7] for number in range(2048)]
    response = client.post("/v1/embeddings", json={"input": texts})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(2048))
    expected = [client.post("/v1/embeddings", json={"input": word}).json()["data"][0]["embedding"] for word in words]
    assert all(one["embedding"] == pytest.approx(expected[one["index"] % 7], abs=1e-5) for one in data)
    assert client.post("/v1/embeddings", json={"input": [*texts, "one"]}).status_code == 422
    assert client.post("/v1/embeddings", json={"input": [{"word": "one"}] * 33}).status_code == 422


def test_v1_embeddings_chunks_wait_for_space_in_the_queue(serve: Serve) -> None:
    """A queue of one chunk, shared with other requests: the list is longer than the queue ever holds."""
    with serve(max_items=4, max_queue_items=4) as client:
        response = client.post("/v1/embeddings", json={"input": ["one"] * 50})
    assert (response.status_code, len(response.json()["data"])) == (200, 50)


def test_quota_allows_a_list_longer_than_its_burst_and_then_pauses(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-some-length ada 50\n")
    authorization = {"authorization": "Bearer a-key-of-some-length"}
    with serve(api_keys_file=keys) as client:
        first = client.post("/v1/embeddings", json={"input": ["one"] * 200}, headers=authorization)
        second = client.post("/v1/embeddings", json={"input": "one"}, headers=authorization)
    assert (first.status_code, second.status_code) == (200, 429)
    assert 2000 < int(second.headers["retry-after-ms"]) <= 3100  # 150 items too many, at 50 a second, and one more


def test_series_of_fixed_labels_start_at_zero(serve: Serve) -> None:
    with serve() as client:
        families = list(text_string_to_metric_families(client.get("/metrics").text))
    zeros = {(s.name, *s.labels.values()) for family in families for s in family.samples if s.value == 0}
    assert {("concord_rejections_total", code) for code in CODES} <= zeros
    assert {("concord_refine_stops_total", reason) for reason in ("steps", "tolerance", "budget", "diverged")} <= zeros
    subsets = ("digit", "photo", "word", "digit+photo", "digit+word", "photo+word", "digit+photo+word")
    assert {("concord_items_total", subset) for subset in subsets} <= zeros
    assert ("concord_request_duration_seconds_count", "/embed", "200") in zeros


def test_head_of_the_page_and_on_the_operators_port(serve: Serve) -> None:
    with serve(admin_port=0) as client:
        operators = f"http://127.0.0.1:{client.admin_port}"  # type: ignore[attr-defined]
        for address in (f"{client.base_url}/", f"{operators}/metrics", f"{operators}/readyz"):
            response = httpx.head(address, trust_env=False)
            assert (response.status_code, response.content) == (200, b"")
