"""What a caller is told when a request fails: RFC 9457 problem objects, and OpenAI's envelope below ``/v1``."""

from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"

CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "Not JSON"),
    "bad_multipart": (400, "Bad multipart body"),
    "bad_base64": (400, "Bad base64"),
    "bad_image": (400, "Undecodable image"),
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
"""Status and title of each code: the whole vocabulary of failure, which also bounds the metric that counts rejections."""

OPENAI_PREFIX = "/v1/"
"""Where OpenAI's clients ask, and are told of errors in their own shape."""

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a request. ``pointer`` is a JSON pointer (RFC 6901) into the body."""

    pointer: str
    code: str
    detail: str


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """A request, or one of its items, that gets no result.

    Args:
        code: one of ``CODES``; it fixes the status.
        detail: for a person, with what was received and what is allowed.
        faults: every fault found, where the body is to blame.
        retry_after_ms: when it is worth trying again; rounded up to seconds for ``Retry-After``.
        headers: of the answer.
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
            self.headers["Retry-After-Ms"] = str(retry_after_ms)  # the finer one, which OpenAI's clients look for first

    @classmethod
    def of(cls, faults: list[Fault]) -> "Problem":
        """The problem that the faults of a body add up to: the first one gives code and status, all are listed."""
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

    def answer(self, request_id: str, path: str = "/") -> Response:
        """The whole HTTP answer, in the shape that is spoken at this path."""
        openai = path.startswith(OPENAI_PREFIX)
        content = self.envelope() if openai else self.body(request_id)
        media_type = "application/json" if openai else MEDIA_TYPE
        return Response(orjson.dumps(content), status_code=self.status, media_type=media_type, headers=self.headers)


def too_large_body(limit: int) -> Problem:
    return Problem("too_large", f"the body is larger than {limit} bytes: send fewer items in each request, or smaller pictures")


def respond(scope: Scope, problem: Problem) -> Response:
    """The answer to this request. Telemetry reads the code from its state."""
    scope["state"]["code"] = problem.code
    return problem.answer(scope["state"]["request_id"], scope["path"])


async def answer_problem(request: Request, problem: Exception) -> Response:
    """Exception handler of ``Problem``."""
    assert isinstance(problem, Problem)
    return respond(request.scope, problem)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler of what Starlette raises itself: no such route, no such method, a body it could not read."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "bad_request")
    detail = {
        "not_found": f"no route {request.url.path[:200]}: see /openapi.json",
        "method_not_allowed": f"{request.method} is not taken here: see the Allow header",
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
    retry_after_ms: int | None = Field(None, description="When it is worth trying again.")
    errors: list[FaultSchema] | None = Field(None, description="Every fault found in the body.")


class OpenAIFault(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["input[0].photo"])
    code: str = Field(description="For programs: the same as elsewhere in this service.", json_schema_extra={"enum": [*CODES]})


class OpenAIErrorSchema(BaseModel):
    """Why there is no result, as OpenAI's clients have it."""

    error: OpenAIFault
