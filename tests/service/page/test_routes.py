"""Routes of the page over HTTP: headers, access, and the API with the page turned off."""

import contextlib
import fnmatch
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from concord.service.page import routes
from tests.support.server import ROOT

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]
KEY = "the-key-of-a-lovelace"


@pytest.fixture
def page_client(client: httpx.Client) -> Iterator[httpx.Client]:
    """A client without the check against the OpenAPI document, which does not list the page."""
    with httpx.Client(base_url=client.base_url, trust_env=False) as page_client:
        yield page_client


@pytest.mark.parametrize("path", sorted(routes.FILES))
def test_static_file_is_served_with_a_policy_against_foreign_content(page_client: httpx.Client, path: str) -> None:
    response = page_client.get(path)
    assert response.content == routes.FILES[path].read_bytes()
    assert response.headers["content-type"].partition(";")[0] == routes.MEDIA_TYPES[routes.FILES[path].suffix]
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_static_file_with_current_etag_is_not_modified(page_client: httpx.Client) -> None:
    first = page_client.get("/")
    second = page_client.get("/", headers={"If-None-Match": first.headers["etag"]})
    assert (second.status_code, second.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/page", "/page/", "/page/none.js", "/page/screenshot.png", "/page/../app.py", "/page/..%2fapp.py"]
)
def test_other_path_below_page_is_not_found(page_client: httpx.Client, path: str) -> None:
    response = page_client.get(page_client.base_url.copy_with(raw_path=path.encode()))
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")


def test_page_turned_off_is_not_found_and_the_api_is_unchanged(serve: Serve, client: httpx.Client) -> None:
    with serve(page=False) as disabled:
        for path in (*routes.FILES, "/page/samples/digits"):
            assert disabled.get(path).json()["code"] == "not_found"
        assert disabled.get("/openapi.json").json() == client.get("/openapi.json").json()
        origin = {"Origin": "https://elsewhere.example"}
        for send in (
            lambda c: c.get("/v1/models", headers=origin),
            lambda c: c.post("/embed", json={"inputs": [{"word": "one"}]}, headers=origin),
            lambda c: c.post("/embed", json={}, headers=origin),
            lambda c: c.get("/readyz", headers=origin),
            lambda c: c.get("/nowhere", headers=origin),
        ):
            on, off = send(client), send(disabled)
            assert (on.status_code, set(on.headers)) == (off.status_code, set(off.headers))
            assert not [name for name in on.headers if name.startswith("access-control")]


def test_api_key_is_required_for_demo_data_and_not_for_static_files(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY} ada\n")
    with (
        serve(api_keys_file=tmp_path / "keys") as client,
        httpx.Client(base_url=client.base_url, trust_env=False) as page_client,
    ):
        assert {page_client.get(path).status_code for path in routes.FILES} == {200}
        assert page_client.get("/page/samples/digits").status_code == 401
        assert page_client.get("/page/samples/digits", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_page_with_allowed_hosts_rejects_other_hosts(serve: Serve) -> None:
    with serve(allowed_hosts="one.example") as client, httpx.Client(base_url=client.base_url, trust_env=False) as page_client:
        assert page_client.get("/", headers={"Host": "one.example"}).status_code == 200
        assert page_client.get("/", headers={"Host": "two.example"}).status_code == 400


def test_demo_data_of_unknown_model_is_a_problem(page_client: httpx.Client) -> None:
    assert page_client.get("/page/samples/none").json()["code"] == "unknown_model"


def test_package_data_includes_every_static_file() -> None:
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = package_data["concord.service.page"]
    assert len(routes.FILES) > 10
    for file in routes.FILES.values():
        path = file.relative_to(routes.FOLDER.parent).as_posix()
        assert any(fnmatch.fnmatch(path, pattern) for pattern in patterns), path
