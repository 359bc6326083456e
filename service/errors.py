"""Error responses: RFC 9457 problem objects, and OpenAI's envelope below ``/v1``."""

from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

from concord.service.request_state import state_of

MEDIA_TYPE = "application/problem+json"

CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "Not JSON"),
    "bad_multipart": (400, "Bad multipart body"),
    "bad_base64": (400, "Bad base64"),
    "bad_image": (400, "Undecodable image"),
    "bad_audio": (400, "Undecodable audio"),
    "bad_request": (400, "Bad request"),
    "missing_key": (401, "No API key"),
    "wrong_key": (403, "Wrong API key"),
    "not_found": (404, "No such route"),
    "unknown_model": (404, "No such model"),
    "method_not_allowed": (405, "Method not allowed"),
    "request_timeout": (408, "Request Timeout"),
    "too_large": (413, "Too large"),
    "unsupported_media_type": (415, "Unsupported media type"),
    "invalid_value": (422, "Invalid request"),
    "out_of_range": (422, "Out of range"),
    "unknown_modality": (422, "Unknown modality"),
    "empty_subset": (422, "No modality given"),
    "nothing_to_generate": (422, "Nothing to generate"),
    "no_gallery": (422, "No gallery"),
    "bad_text": (422, "Bad text"),
    "bad_vector": (422, "Bad vector"),
    "bad_attributes": (422, "Bad attributes"),
    "bad_class": (422, "Bad class"),
    "wrong_type": (422, "Wrong type"),
    "quota_exceeded": (429, "Quota exceeded"),
    "headers_too_large": (431, "Request Header Fields Too Large"),
    "client_gone": (499, "Client closed the connection"),
    "internal": (500, "Internal error"),
    "queue_full": (503, "Server overloaded"),
    "engine_failed": (503, "Inference failed"),
    "not_ready": (503, "Not ready"),
    "deadline_passed": (504, "Deadline passed"),
}
"""Status and title of each code. The set is closed, which also bounds the labels of the metric that counts rejections."""

OPENAI_PREFIX = "/v1/"
"""Routes for OpenAI's clients, whose errors have the shape that those expect."""

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


@dataclass(frozen=True)
class Fault:
    """One error in a request. ``pointer`` is a JSON pointer (RFC 6901) into the body."""

    pointer: str
    code: str
    detail: str


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """Why a request, or one of its items, has no result.

    Args:
        code: one of ``CODES``; it fixes the status.
        detail: for a reader: what was received, what is allowed, what to do.
        faults: every fault found in the body.
        retry_after_ms: milliseconds after which a retry may succeed; rounded up to seconds for ``Retry-After``.
        headers: of the response.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        faults: tuple[Fault, ...] = (),
        retry_after_ms: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.faults, self.retry_after_ms = code, detail, faults, retry_after_ms
        self.status, self.title = CODES[code]
        self.headers = dict(headers or {})
        if retry_after_ms is not None:
            self.headers["Retry-After"] = str(-(-retry_after_ms // 1000))
            self.headers["Retry-After-Ms"] = str(retry_after_ms)  # OpenAI's clients read this one first

    @classmethod
    def from_faults(cls, faults: list[Fault]) -> "Problem":
        """The problem of a body with these faults: the first one gives code and status, all are listed."""
        first = faults[0]
        where = f"{first.pointer}: " if first.pointer else ""
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return cls(first.code, f"{where}{first.detail}{more}", faults=tuple(faults))

    def body(self, request_id: str) -> dict[str, Any]:
        """The problem object."""
        fields: dict[str, Any] = {
            "type": f"about:blank#{self.code.replace('_', '-')}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "instance": f"urn:request:{request_id}",
        }
        if self.retry_after_ms is not None:
            fields["retry_after_ms"] = self.retry_after_ms
        if self.faults:
            fields["errors"] = [{"pointer": f.pointer, "code": f.code, "detail": f.detail} for f in self.faults]
        return fields

    def envelope(self) -> dict[str, Any]:
        """The same in OpenAI's shape. ``param`` is the place of the first fault, written ``input[0].photo``."""
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        place = self.faults[0].pointer if self.faults else ""
        param = "".join(f"[{t}]" if t.isdigit() else f".{t}" for t in place.split("/")[1:]).removeprefix(".")
        return {"error": {"message": self.detail, "type": kind, "param": param or None, "code": self.code}}

    def response(self, request_id: str, path: str = "/") -> Response:
        """The HTTP response, in the shape that clients of this path expect."""
        openai = path.startswith(OPENAI_PREFIX)
        content = self.envelope() if openai else self.body(request_id)
        media_type = "application/json" if openai else MEDIA_TYPE
        return Response(orjson.dumps(content), status_code=self.status, media_type=media_type, headers=self.headers)


def too_large_body(limit: int) -> Problem:
    return Problem("too_large", f"the body is larger than {limit} bytes: send fewer items in each request, or smaller pictures")


def respond(scope: Scope, problem: Problem) -> Response:
    """The response to this request. Its state keeps the code for logs and metrics."""
    state = state_of(scope)
    state.error_code = problem.code
    return problem.response(state.request_id, scope["path"])


async def problem_handler(request: Request, problem: Exception) -> Response:
    """Exception handler of ``Problem``."""
    assert isinstance(problem, Problem)
    return respond(request.scope, problem)


async def http_exception_handler(request: Request, error: Exception) -> Response:
    """Exception handler for Starlette's own errors: no such route, no such method, an unreadable body."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "bad_request")
    detail = {
        "not_found": f"no route {request.url.path[:200]}: see /openapi.json",
        "method_not_allowed": f"{request.method} is not allowed here: see the Allow header",
    }.get(code, error.detail)
    return respond(request.scope, Problem(code, detail, headers=dict(error.headers or {})))


class FaultSchema(BaseModel):
    pointer: str = Field(description="JSON pointer into the body.", examples=["/inputs/0/photo"])
    code: str
    detail: str


class ProblemSchema(BaseModel):
    """Why there is no result, as RFC 9457 has it."""

    type: str = Field(examples=["about:blank#bad-image"])
    title: str
    status: int
    code: str = Field(description="For programs: stable, one of a fixed set.", json_schema_extra={"enum": [*CODES]})
    detail: str = Field(description="For people.")
    instance: str = Field(description="The request id, as in X-Request-Id.")
    retry_after_ms: int | None = Field(None, description="Milliseconds after which a retry may succeed.")
    errors: list[FaultSchema] | None = Field(None, description="Every error found in the body.")


class OpenAIFault(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["input[0].photo"])
    code: str = Field(description="For programs: the same as elsewhere in this service.", json_schema_extra={"enum": [*CODES]})


class OpenAIErrorSchema(BaseModel):
    """Why there is no result, as OpenAI's clients have it."""

    error: OpenAIFault
