"""Request bodies: their size limit, and the two forms they come in, JSON and one sample as multipart."""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Problem, respond, too_large_body

LINGER_SECONDS = 0.5
RETRY_AFTER_MS = 1000
MAX_PARTS = 64
OPTIONS_PART = "options"


@dataclass(frozen=True)
class Form:
    """One sample: a value for each part, bytes where it came as a file and text otherwise; and the options part, JSON."""

    sample: dict[str, str | bytes]
    options: bytes | None

    def __len__(self) -> int:
        """Bytes of what it holds, about: a character of text counts for one."""
        return sum(map(len, self.sample.values())) + len(self.options or b"")


class BodyLimit:
    """Refuses bodies over ``limit`` bytes: before the first byte where Content-Length says so, else when the limit is crossed.
    Refuses with 503 what would make all bodies under way larger than ``total``.

    Starlette's own ``max_body_size`` answers in plain text. And to close a connection while the client still sends would reset
    it, and with it lose the answer: what still comes is read and thrown away for a moment after the answer went out.
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
                held = f"the bodies of requests under way hold {self._held} bytes"
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

        declared = Headers(scope=scope).get("content-length", "")
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


async def read(request: Request, limit: int) -> bytes | Form:
    """The body: JSON, not yet parsed, or a multipart form.

    Raises:
        Problem: 400, 413 or 415.
    """
    if _media_type(request) == "multipart/form-data":
        return await _read_form(request, limit)
    return await read_json(request, "application/json, or multipart/form-data a part per modality")


async def read_json(request: Request, taken: str = "application/json") -> bytes:
    """The body, which is said to be JSON and not yet parsed.

    Args:
        taken: what else might have been sent, for the refusal.

    Raises:
        Problem: 413 or 415.
    """
    media_type = _media_type(request)
    if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
        return await request.body()
    raise Problem("unsupported_media_type", f"content type {media_type[:64]!r} is not taken: send {taken}")


def _media_type(request: Request) -> str:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Problem("unsupported_media_type", f"content encoding {encoding[:32]!r} is not taken: send the body as it is")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_form(request: Request, limit: int) -> Form:
    sample: dict[str, str | bytes] = {}
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8"):  # Python knows charsets that yield no valid text, or take their time
        raise Problem("unsupported_media_type", "a form's text is read as UTF-8: leave the charset out")
    try:
        parser = MultiPartParser(
            request.headers, request.stream(), max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=limit
        )
        parser.spool_max_size = limit  # parts stay in memory: nothing of a request is written to a disk
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem("bad_multipart", f"the body is no multipart/form-data: {error.message}") from error
    for name, part in form.multi_items():
        if name in sample:
            raise Problem("bad_multipart", f"part {name[:64]!r} comes twice: one sample has one value for each modality")
        sample[name] = part if isinstance(part, str) else await part.read()
    await form.close()
    options = sample.pop(OPTIONS_PART, None)
    return Form(sample, options.encode() if isinstance(options, str) else options)


def parse_object(content: bytes, what: str, most_values: int) -> dict[str, Any]:
    """A JSON object (RFC 8259: no NaN, no Infinity; of a name given twice the last counts).

    Args:
        most_values: values it may hold, about. Counted before it is parsed: a body of millions of them would hold up every
            other thread for seconds.

    Raises:
        Problem: 400 not JSON, 413 too many values, 422 not an object.
    """
    if content.count(b",") > most_values:
        raise Problem("too_large", f"{what} holds more than {most_values} values, which is more than any request needs")
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise Problem("invalid_json", f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem("invalid_value", f"{what} must be a JSON object, received {type(value).__name__}")
    return value
