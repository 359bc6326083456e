"""The way past the router: for POSTs of the calls alone, with the same refusals."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import Request, Response

from service import app, door
from service.direct import Direct
from service.errors import Problem


async def handled(request: Request) -> Response:
    if await request.body() == b"bad":
        raise Problem("invalid_json", "no JSON")
    return Response(b"handled")


async def routed(scope: Any, receive: Any, send: Any) -> None:
    await Response(b"routed")(scope, receive, send)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "answer"),
    [
        ("POST", "/call", b"good", 200, b"handled"),
        ("POST", "/call", b"bad", 400, b'"code":"invalid_json"'),
        ("GET", "/call", b"", 200, b"routed"),
        ("POST", "/call/", b"", 200, b"routed"),
        ("POST", "/other", b"", 200, b"routed"),
    ],
)
def test_who_answers(method: str, path: str, body: bytes, status: int, answer: bytes) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "state": {"request_id": "1"}}
    asyncio.run(Direct(routed, {"/call": handled})(scope, receive, send))
    assert sent[0]["status"] == status
    assert answer in sent[1]["body"]


def test_what_is_no_request_is_handed_on() -> None:
    seen: list[str] = []

    async def inner(scope: Any, *_: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Direct(inner, {})({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_every_call_has_its_short_way_and_its_door(client: httpx.Client) -> None:
    """A call that is added to the router alone would be answered, and cost more than the others."""
    document = client.get("/openapi.json").json()
    posted = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posted == {*app.CALLS} == set(door.CALLS.values())


def test_a_slash_more_or_another_method_is_the_routers(client: httpx.Client) -> None:
    assert client.post("/embed/").status_code == 404
    assert client.put("/embed").status_code == 405
    assert client.get("/embed").headers["allow"] == "POST"
