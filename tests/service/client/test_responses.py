"""Responses as the client reads them, also those of proxies between it and the service."""

import sys

import httpx
import orjson
import pytest

from concord.client import responses
from concord.client.responses import AccessError, DeadlineError, InvalidRequestError, ServiceError, UnavailableError
from concord.service import errors

ERRORS = {
    400: InvalidRequestError,
    401: AccessError,
    403: AccessError,
    404: InvalidRequestError,
    422: InvalidRequestError,
    429: UnavailableError,
    500: ServiceError,
    503: UnavailableError,
    504: DeadlineError,
}


def raised_error(response: httpx.Response) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        responses.models(response)
    return caught.value


@pytest.mark.parametrize("code", errors.CODES)
@pytest.mark.parametrize("path", ["/embed", "/v1/models"])
def test_problem_in_both_shapes_raises_the_error_of_its_status(code: str, path: str) -> None:
    response = errors.Problem(code, "why").response("abc", path)
    error = raised_error(httpx.Response(response.status_code, content=response.body, headers={"X-Request-Id": "abc"}))
    assert (error.status, error.code, error.detail, error.request_id) == (errors.CODES[code][0], code, "why", "abc")
    assert type(error) is ERRORS.get(error.status, InvalidRequestError)
    assert (error.pointer, error.faults) == ("", ())
    assert code in str(error)
    assert "why" in str(error)


def test_faults_of_a_problem_keep_their_pointers() -> None:
    faults = [errors.Fault("/inputs/0/photo", "bad_image", "no"), errors.Fault("/seed", "invalid_value", "odd")]
    error = raised_error(httpx.Response(400, content=errors.Problem.from_faults(faults).response("a").body))
    assert error.pointer == "/inputs/0/photo"
    assert [(fault.pointer, fault.code, fault.detail) for fault in error.faults] == [
        ("/inputs/0/photo", "bad_image", "no"),
        ("/seed", "invalid_value", "odd"),
    ]


@pytest.mark.parametrize(
    ("status", "content"),
    [(502, b"<html>Bad gateway</html>"), (503, b""), (404, b"[]"), (200, b"<html>"), (200, b"[]"), (500, b'{"error": "x"}')],
)
def test_response_of_a_proxy_raises_with_its_status(status: int, content: bytes) -> None:
    error = raised_error(httpx.Response(status, content=content))
    assert (error.status, error.code, error.request_id) == (status, f"http_{status}", "")
    assert "not the service's" in error.detail


def test_generated_vectors_are_arrays_and_attributes_are_dicts() -> None:
    item = {
        "index": 0,
        "id": None,
        "modalities": ["word"],
        "generated": {"sensor": [{"data": [1.5, 2]}], "face": [{"data": {"smile": 0.25}}]},
        "embedding": None,
        "refinement": None,
    }
    body = {"object": "list", "model": "m", "model_version": "1", "data": [item], "usage": {"items": 1}}
    (result,) = responses.generations(httpx.Response(200, content=orjson.dumps(body))).results
    sensor, face = result.generated["sensor"][0], result.generated["face"][0]
    assert getattr(sensor, "dtype", None) == "float32"
    assert list(sensor) == [1.5, 2]
    assert face == {"smile": 0.25}


def test_picture_without_pillow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = {"media_type": "image/png", "data": "iVBORw0KGgo="}
    one = {
        "index": 0,
        "id": None,
        "modalities": ["word"],
        "generated": {"photo": [picture]},
        "embedding": None,
        "refinement": None,
    }
    body = {"model": "m", "model_version": "1", "data": [one], "usage": {}}
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        responses.generations(httpx.Response(200, json=body))
