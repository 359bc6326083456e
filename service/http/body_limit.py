"""Size limits of request bodies: of each, and of all in progress together."""

import asyncio
import contextlib

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord.service.errors import Problem, respond, too_large_body

LINGER_SECONDS = 0.5
RETRY_AFTER_MS = 1000


class BodyLimit:
    """Rejects bodies over ``limit`` bytes: before the first byte if Content-Length says so, else when the limit is crossed.
    Rejects with 503 what would make all bodies in progress larger than ``total``.

    Starlette's own ``max_body_size`` responds in plain text. And closing a connection while the client still sends would reset
    it, and lose the response: after the response, the rest of the body is read and discarded for a moment.
    """

    def __init__(self, app: ASGIApp, limit: int, total: int) -> None:
        self.app = app
        self.limit = limit
        self.total = total
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0
        crossed = False

        async def limited() -> Message:
            nonlocal received, crossed
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._held += size
            if received > self.limit:
                crossed = True
                raise too_large_body(self.limit)
            if self._held > self.total:
                crossed = True
                held = f"the bodies of requests in progress hold {self._held} bytes"
                raise Problem("queue_full", held, retry_after_ms=RETRY_AFTER_MS)
            return message

        async def lingering(message: Message) -> None:
            if not crossed:
                await send(message)
            elif message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
                await send(message)
            else:
                await send({**message, "more_body": True})
                await _drain(receive)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            crossed = True
            await respond(scope, too_large_body(self.limit))(scope, receive, lingering)
        else:
            try:
                await self.app(scope, limited, lingering)
            finally:
                self._held -= received


async def _drain(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass
