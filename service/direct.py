"""The calls that make up the load, answered ahead of FastAPI's router, which costs more than all else that a small one needs.

Its routes stay: they are what the OpenAPI document is made of, and what says which methods there are.
"""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Problem, respond

Handler = Callable[[Request], Awaitable[Response]]


class Direct:
    """Innermost: hands POSTs to these paths to their handlers, and everything else on.

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
