"""The fast path: POST requests to inference routes, with the errors of the router."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import Request, Response
from opentelemetry.trace import INVALID_SPAN

from concord.service.api.endpoints import ENDPOINTS
from concord.service.errors import Problem
from concord.service.http.fast_path import FastPath
from concord.service.request_state import RequestState, attach


async def handle(request: Request) -> Response:
    if await request.body() == b"bad":
        raise Problem("invalid_json", "not JSON")
    return Response(b"handled")


async def route(scope: Any, receive: Any, send: Any) -> None:
    await Response(b"routed")(scope, receive, send)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "content"),
    [
        ("POST", "/call", b"good", 200, b"handled"),
        ("POST", "/call", b"bad", 400, b'"code":"invalid_json"'),
        ("GET", "/call", b"", 200, b"routed"),
        ("POST", "/call/", b"", 200, b"routed"),
        ("POST", "/other", b"", 200, b"routed"),
    ],
)
def test_fast_path_handles_post_to_its_paths_only(method: str, path: str, body: bytes, status: int, content: bytes) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": []}
    attach(scope, RequestState("1", INVALID_SPAN))
    asyncio.run(FastPath(route, {"/call": handle})(scope, receive, send))
    assert sent[0]["status"] == status
    assert content in sent[1]["body"]


def test_fast_path_passes_on_other_scopes() -> None:
    types: list[str] = []

    async def inner(scope: Any, *_: Any) -> None:
        types.append(scope["type"])

    asyncio.run(FastPath(inner, {})({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert types == ["lifespan"]


def test_fast_path_routes_match_openapi(client: httpx.Client) -> None:
    """A POST route that is added to the router alone would work, and bypass admission control and the fast path."""
    document = client.get("/openapi.json").json()
    post_routes = {path for path, operations in document["paths"].items() if "post" in operations}
    assert post_routes == {*ENDPOINTS}


def test_other_methods_and_paths_reach_the_router(client: httpx.Client) -> None:
    assert client.post("/embed/").status_code == 404
    assert client.put("/embed").status_code == 405
    assert client.get("/embed").headers["allow"] == "POST"
