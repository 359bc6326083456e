"""Inference routes served ahead of FastAPI's router, which costs more than everything else that a small request needs.

The routes stay registered: they make up the OpenAPI document and serve other methods.
"""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from concord.service.errors import Problem, respond

Handler = Callable[[Request], Awaitable[Response]]


class FastPath:
    """Innermost middleware: passes POST requests to these paths to their handlers, and everything else on.

    Args:
        handlers: by path. They raise ``Problem`` as routes do.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self.app = app
        self.handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        try:
            response = await handler(Request(scope, receive))
        except Problem as problem:
            response = respond(scope, problem)
        await response(scope, receive, send)
