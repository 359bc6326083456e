"""The page's files over HTTP: what they come with, who may have them, and that the API is the same with and without them."""

import contextlib
import fnmatch
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service import site

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
ROOT = Path(__file__).parent.parent.parent
KEY = "the-key-of-a-lovelace"


@pytest.fixture
def visitor(client: httpx.Client) -> Iterator[httpx.Client]:
    """Not held against the OpenAPI document, which does not list the page."""
    with httpx.Client(base_url=client.base_url, trust_env=False) as visitor:
        yield visitor


@pytest.mark.parametrize("path", sorted(site.FILES))
def test_every_file_is_served_and_may_load_nothing_foreign(visitor: httpx.Client, path: str) -> None:
    response = visitor.get(path)
    assert response.content == site.FILES[path].read_bytes()
    assert response.headers["content-type"].partition(";")[0] == site.MEDIA_TYPES[site.FILES[path].suffix]
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_what_the_browser_has_is_not_sent_again(visitor: httpx.Client) -> None:
    first = visitor.get("/")
    again = visitor.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/page", "/page/", "/page/none.js", "/page/screenshot.png", "/page/../app.py", "/page/..%2fapp.py"]
)
def test_nothing_else_is(visitor: httpx.Client, path: str) -> None:
    response = visitor.get(visitor.base_url.copy_with(raw_path=path.encode()))
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")


def test_turned_off_there_is_no_page_and_all_else_is_the_same(serve: Serve, client: httpx.Client) -> None:
    with serve(page=False) as without:
        for path in (*site.FILES, "/page/samples/digits"):
            assert without.get(path).json()["code"] == "not_found"
        assert without.get("/openapi.json").json() == client.get("/openapi.json").json()
        origin = {"Origin": "https://elsewhere.example"}
        for ask in (
            lambda c: c.get("/v1/models", headers=origin),
            lambda c: c.post("/embed", json={"inputs": [{"word": "one"}]}, headers=origin),
            lambda c: c.post("/embed", json={}, headers=origin),
            lambda c: c.get("/readyz", headers=origin),
            lambda c: c.get("/nowhere", headers=origin),
        ):
            on, off = ask(client), ask(without)
            assert (on.status_code, set(on.headers)) == (off.status_code, set(off.headers))
            assert not [name for name in on.headers if name.startswith("access-control")]


def test_the_page_needs_no_key_and_what_it_shows_does(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY} ada\n")
    with serve(api_keys_file=tmp_path / "keys") as client, httpx.Client(base_url=client.base_url, trust_env=False) as visitor:
        assert {visitor.get(path).status_code for path in site.FILES} == {200}
        assert visitor.get("/page/samples/digits").status_code == 401
        assert visitor.get("/page/samples/digits", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_the_page_answers_to_the_names_that_all_else_does(serve: Serve) -> None:
    with serve(allowed_hosts="one.example") as client, httpx.Client(base_url=client.base_url, trust_env=False) as visitor:
        assert visitor.get("/", headers={"Host": "one.example"}).status_code == 200
        assert visitor.get("/", headers={"Host": "two.example"}).status_code == 400


def test_samples_of_no_model_are_a_problem(visitor: httpx.Client) -> None:
    assert visitor.get("/page/samples/none").json()["code"] == "unknown_model"


def test_the_package_holds_every_file() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["service"]
    for file in site.FILES.values():
        assert any(fnmatch.fnmatch(f"page/{file.name}", pattern) for pattern in patterns)
