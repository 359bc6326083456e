import httpx
import orjson
import pytest

from concord.model.codec import Code
from concord.service.errors import CODES, Fault, Problem, ProblemSchema


def test_codes_include_every_code_of_the_codec() -> None:
    assert set(Code.__args__) <= set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_problem_response_is_a_problem_object(code: str) -> None:
    response = Problem(code, "why").response("abc")
    body = ProblemSchema.model_validate_json(response.body, strict=True)
    assert (body.status, body.code, body.detail, body.instance) == (CODES[code][0], code, "why", "urn:request:abc")
    assert response.status_code == body.status
    assert response.headers["content-type"] == "application/problem+json"
    assert set(orjson.loads(response.body)) == {"type", "title", "status", "code", "detail", "instance"}


def test_problem_from_faults_takes_the_first_code_and_lists_all() -> None:
    problem = Problem.from_faults(
        [Fault("/inputs/0/photo", "bad_image", "not a picture"), Fault("/seed", "invalid_value", "odd")]
    )
    assert (problem.status, problem.code, problem.detail) == (400, "bad_image", "/inputs/0/photo: not a picture (and 1 more)")
    assert [error["pointer"] for error in problem.body("a")["errors"]] == ["/inputs/0/photo", "/seed"]


@pytest.mark.parametrize(("milliseconds", "seconds"), [(1, "1"), (1000, "1"), (1001, "2")])
def test_retry_after_header_rounds_up_to_seconds(milliseconds: int, seconds: str) -> None:
    response = Problem("queue_full", "full", retry_after_ms=milliseconds).response("a")
    assert response.headers["retry-after"] == seconds
    assert orjson.loads(response.body)["retry_after_ms"] == milliseconds


@pytest.mark.parametrize(("method", "path"), [("GET", "/nope"), ("POST", "/embed/"), ("GET", "/docs"), ("GET", "//embed")])
def test_unknown_route_gets_404(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, client.base_url.copy_with(raw_path=path.encode()))
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", "/embed", "POST"), ("DELETE", "/readyz", "GET")])
def test_unknown_method_gets_405_and_the_allow_header(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()["code"], response.headers["allow"]) == (405, "method_not_allowed", allowed)
