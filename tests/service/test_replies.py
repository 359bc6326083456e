"""Answers as the client reads them, also those of other servers that stand in between."""

import httpx
import orjson
import pytest

from service import errors, replies
from service.replies import AccessError, DeadlineError, InvalidRequestError, ServiceError, UnavailableError

KINDS = {
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


def raised(response: httpx.Response) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        replies.models(response)
    return caught.value


@pytest.mark.parametrize("code", errors.CODES)
@pytest.mark.parametrize("path", ["/embed", "/v1/models"])
def test_every_problem_in_both_shapes(code: str, path: str) -> None:
    answer = errors.Problem(code, "why").answer("abc", path)
    error = raised(httpx.Response(answer.status_code, content=answer.body, headers={"X-Request-Id": "abc"}))
    assert (error.status, error.code, error.detail, error.request_id) == (errors.CODES[code][0], code, "why", "abc")
    assert type(error) is KINDS.get(error.status, InvalidRequestError)
    assert (error.pointer, error.faults) == ("", ())
    assert code in str(error)
    assert "why" in str(error)


def test_faults_keep_their_places() -> None:
    faults = [errors.Fault("/inputs/0/photo", "bad_image", "no"), errors.Fault("/seed", "invalid_value", "odd")]
    error = raised(httpx.Response(400, content=errors.Problem.of(faults).answer("a").body))
    assert error.pointer == "/inputs/0/photo"
    assert [(fault.pointer, fault.code, fault.detail) for fault in error.faults] == [
        ("/inputs/0/photo", "bad_image", "no"),
        ("/seed", "invalid_value", "odd"),
    ]


@pytest.mark.parametrize(
    ("status", "content"),
    [(502, b"<html>Bad gateway</html>"), (503, b""), (404, b"[]"), (200, b"<html>"), (200, b"[]"), (500, b'{"error": "x"}')],
)
def test_answers_of_something_else(status: int, content: bytes) -> None:
    error = raised(httpx.Response(status, content=content))
    assert (error.status, error.code, error.request_id) == (status, f"http_{status}", "")
    assert "not the service's" in error.detail


def test_vectors_and_probabilities() -> None:
    item = {
        "index": 0,
        "id": None,
        "modalities": ["word"],
        "generated": {"sensor": [{"data": [1.5, 2]}], "face": [{"data": {"smile": 0.25}}]},
        "embedding": None,
        "refinement": None,
    }
    answer = {"object": "list", "model": "m", "model_version": "1", "data": [item], "usage": {"items": 1}}
    (result,) = replies.generations(httpx.Response(200, content=orjson.dumps(answer))).results
    sensor, face = result.generated["sensor"][0], result.generated["face"][0]
    assert getattr(sensor, "dtype", None) == "float32"
    assert list(sensor) == [1.5, 2]
    assert face == {"smile": 0.25}
