"""Request bodies in the two forms they come in: JSON, and one item as multipart/form-data."""

from codecs import BOM_UTF8
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser

from concord.service.errors import Problem
from concord.service.request_state import header

MAX_PARTS = 64
OPTIONS_PART = "options"


@dataclass(frozen=True)
class Form:
    """One item: a value for each part, bytes if it came as a file and text otherwise; and the options part, JSON."""

    item: dict[str, str | bytes]
    options: bytes | None

    def __len__(self) -> int:
        """Approximate size in bytes: a character of text counts as one."""
        return sum(map(len, self.item.values())) + len(self.options or b"")


class _FormParser(MultiPartParser):
    """Reads a part as bytes if it has a file name in either notation, or a media type that is not text."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = (part.content_disposition or b"").lower()
        media_type = dict(part.item_headers).get(b"content-type", b"text/plain").lower()
        is_text = media_type.startswith((b"text/", b"application/json"))
        if b"filename=" not in disposition and (b"filename*=" in disposition or not is_text):
            part.content_disposition = (part.content_disposition or b"") + b'; filename=""'
        super().on_headers_finished()


async def read(request: Request, limit: int) -> bytes | Form:
    """The body: JSON, not yet parsed, or a multipart form.

    Raises:
        Problem: 400, 413 or 415.
    """
    media_type = _media_type(request)
    if media_type == "multipart/form-data":
        return await _read_form(request, limit)
    return await read_json(request, "application/json, or multipart/form-data with a part per modality", media_type)


async def read_json(request: Request, accepted: str = "application/json", media_type: str | None = None) -> bytes:
    """The body, declared as JSON and not yet parsed.

    Args:
        accepted: media types of this route, for the error message.
        media_type: of the body, if it is known.

    Raises:
        Problem: 413 or 415.
    """
    media_type = _media_type(request) if media_type is None else media_type
    if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
        return await request.body()
    raise Problem("unsupported_media_type", f"content type {media_type[:64]!r} is not accepted: send {accepted}")


def _media_type(request: Request) -> str:
    encoding = header(request.scope, b"content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise Problem("unsupported_media_type", f"content encoding {encoding[:32]!r} is not accepted: send the body unencoded")
    return header(request.scope, b"content-type").partition(";")[0].strip().lower()


async def _read_form(request: Request, limit: int) -> Form:
    item: dict[str, str | bytes] = {}
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8"):  # some of Python's charsets yield invalid text, and some are slow
        raise Problem("unsupported_media_type", "the text of a form is read as UTF-8: leave the charset out")
    try:
        parser = _FormParser(request.headers, request.stream(), max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=limit)
        parser.spool_max_size = limit  # parts stay in memory: nothing of a request is written to disk
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem("bad_multipart", f"the body is not valid multipart/form-data: {error.message}") from error
    for name, part in form.multi_items():
        if name in item:
            raise Problem("bad_multipart", f"part {name[:64]!r} comes twice: an item has one value for each modality")
        value = part if isinstance(part, str) else await part.read()
        if value.strip():  # browsers send a part for every field, also for those left empty
            item[name] = value
    await form.close()
    options = item.pop(OPTIONS_PART, None)
    return Form(item, options.encode() if isinstance(options, str) else options)


def parse_object(content: bytes, name: str, max_values: int) -> dict[str, Any]:
    """A JSON object (RFC 8259: no NaN, no Infinity; of repeated names the last counts).

    Args:
        name: of the content, for error messages.
        max_values: approximate number of values allowed. Counted before parsing: a body of millions of values would block
            every other thread for seconds.

    Raises:
        Problem: 400 not JSON, 413 too many values, 422 not an object.
    """
    if content.count(b",") > max_values:
        raise Problem("too_large", f"{name} holds more than {max_values} values, which is more than any request needs")
    try:
        value = orjson.loads(content.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise Problem("invalid_json", f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem("invalid_value", f"{name} must be a JSON object, received {type(value).__name__}")
    return value
