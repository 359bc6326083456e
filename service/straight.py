"""The straight way to the calls: past the layers of routing that look for what a path alone tells."""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Problem, respond


class Straight:
    """Answers what is posted to a call; all else goes on to the router, which also describes the calls.

    Args:
        calls: an endpoint for each path.
    """

    def __init__(self, app: ASGIApp, calls: Mapping[str, Callable[[Request], Awaitable[Response]]]) -> None:
        self.app = app
        self.calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self.calls.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if call is None:
            await self.app(scope, receive, send)
            return
        try:
            answer = await call(Request(scope, receive, send))
        except Problem as problem:
            answer = respond(scope, problem)
        await answer(scope, receive, send)
