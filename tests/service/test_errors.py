import httpx
import orjson
import pytest

from model.codec import Code
from service.errors import CODES, Fault, Problem, ProblemSchema


def test_every_code_of_the_codec_has_a_status() -> None:
    assert set(Code.__args__) <= set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_problem_is_a_problem_object(code: str) -> None:
    answer = Problem(code, "why").answer("abc")
    body = ProblemSchema.model_validate_json(answer.body, strict=True)
    assert (body.status, body.code, body.detail, body.instance) == (CODES[code][0], code, "why", "urn:request:abc")
    assert answer.status_code == body.status
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(orjson.loads(answer.body)) == {"type", "title", "status", "code", "detail", "instance"}


def test_the_first_fault_decides_and_all_are_told() -> None:
    problem = Problem.of([Fault("/inputs/0/photo", "bad_image", "not a picture"), Fault("/seed", "invalid_value", "odd")])
    assert (problem.status, problem.code, problem.detail) == (400, "bad_image", "/inputs/0/photo: not a picture (and 1 more)")
    assert [error["pointer"] for error in problem.body("a")["errors"]] == ["/inputs/0/photo", "/seed"]


@pytest.mark.parametrize(("milliseconds", "seconds"), [(1, "1"), (1000, "1"), (1001, "2")])
def test_retry_after_is_never_too_early(milliseconds: int, seconds: str) -> None:
    answer = Problem("queue_full", "full", retry_after_ms=milliseconds).answer("a")
    assert answer.headers["retry-after"] == seconds
    assert orjson.loads(answer.body)["retry_after_ms"] == milliseconds


@pytest.mark.parametrize(("method", "path"), [("GET", "/nope"), ("POST", "/embed/"), ("GET", "/docs"), ("GET", "//embed")])
def test_no_such_route(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, client.base_url.copy_with(raw_path=path.encode()))
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(("method", "path", "allowed"), [("GET", "/embed", "POST"), ("DELETE", "/readyz", "GET")])
def test_no_such_method(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()["code"], response.headers["allow"]) == (405, "method_not_allowed", allowed)
