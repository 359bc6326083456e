"""What the client makes of the service's answers: small typed results, NumPy arrays and Pillow images, and typed exceptions."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union

import httpx
import numpy as np
from jaxtyping import Float32

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

Vector = Float32[np.ndarray, " latent"]
Generated = Union["Image.Image", np.ndarray, str, dict[str, float]]
"""A picture (or an array, channels first, in [0, 1], with ``image="raw"``), a vector, a text, or probabilities by name."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a request. ``pointer`` is a JSON pointer into its body: ``/inputs/0/photo``."""

    pointer: str
    code: str
    detail: str


class ServiceError(Exception):
    """The service answered, and not with a result.

    Attributes:
        status: of HTTP.
        code: what went wrong, for programs; one of the codes in the OpenAPI document, or ``http_<status>`` where something
            else than the service answered.
        faults: every fault that was found in the body.
        pointer: place of the first one, empty where the body is not to blame.
        request_id: what the service's log calls the request.
        retry_after_ms: when it is worth trying again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        faults: tuple[Fault, ...] = (),
        request_id: str = "",
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(f"{code} ({status}): {detail}")
        self.status, self.code, self.detail, self.faults = status, code, detail, faults
        self.request_id, self.retry_after_ms = request_id, retry_after_ms

    @property
    def pointer(self) -> str:
        return self.faults[0].pointer if self.faults else ""


class InvalidRequestError(ServiceError):
    """400, 404, 405, 413, 415 or 422: the request is to blame, and would fail again."""


class AccessError(ServiceError):
    """401 or 403: no key, or one that is not known."""


class UnavailableError(ServiceError):
    """429 or 503: over the key's quota, or the service is overloaded, starting or stopping. The retries are spent."""


class DeadlineError(ServiceError):
    """504: no result in time. Not tried again, since the work may be what takes so long."""


@dataclass(frozen=True)
class Refinement:
    """What the steps came to, in weighted nats. ``trace`` is there when it was asked for."""

    steps: int
    objective: str
    before: float
    after: float
    stopped: str
    trace: list[float] | None = None


@dataclass(frozen=True)
class Embedding:
    """One item embedded. ``log_var`` is there with ``representation="mean_log_var"``."""

    index: int
    id: str | None
    embedding: Vector
    log_var: Vector | None
    modalities: tuple[str, ...]
    refinement: Refinement | None


@dataclass(frozen=True)
class Generation:
    """One item's generated values, by modality, ``num_samples`` of each."""

    index: int
    id: str | None
    modalities: tuple[str, ...]
    generated: dict[str, list[Generated]]
    embedding: Vector | None
    refinement: Refinement | None


@dataclass(frozen=True)
class Failure:
    """One item without a result, with ``on_error="partial"``."""

    index: int
    id: str | None
    error: ServiceError


@dataclass(frozen=True)
class Reply(Generic[T]):
    """The answer to one call, in the order of its inputs."""

    model: str
    model_version: str
    results: list[T]
    failures: list[Failure]
    usage: dict[str, int]
    request_id: str


@dataclass(frozen=True)
class Embeddings(Reply[Embedding]):
    """The reply of ``embed``."""

    @property
    def matrix(self) -> Float32[np.ndarray, "item latent"]:
        """The embeddings of all results, one below the other."""
        return np.stack([result.embedding for result in self.results])


@dataclass(frozen=True)
class Model:
    """A bundle that is served; ``modalities``, ``limits`` and ``provenance`` as GET /v1/models tells them."""

    id: str
    version: str
    state: str
    latent: int
    modalities: list[dict[str, Any]]
    limits: dict[str, int]
    provenance: dict[str, Any]


def embeddings(response: httpx.Response) -> Embeddings:
    """The reply of POST /embed. Raises ServiceError, as all of these do."""

    def parse(one: dict[str, Any]) -> Embedding:
        return Embedding(
            one["index"],
            one["id"],
            _vector(one["embedding"]),
            one["log_var"] and _vector(one["log_var"]),
            tuple(one["modalities"]),
            one["refinement"] and Refinement(**one["refinement"]),
        )

    return Embeddings(*_reply(response, parse))


def generations(response: httpx.Response) -> Reply[Generation]:
    """The reply of POST /cross-generate."""

    def parse(one: dict[str, Any]) -> Generation:
        return Generation(
            one["index"],
            one["id"],
            tuple(one["modalities"]),
            {name: [_generated(value) for value in values] for name, values in one["generated"].items()},
            one["embedding"] and _vector(one["embedding"]),
            one["refinement"] and Refinement(**one["refinement"]),
        )

    return Reply(*_reply(response, parse))


def models(response: httpx.Response) -> list[Model]:
    """The reply of GET /v1/models."""
    names = Model.__dataclass_fields__
    return [Model(**{name: one[name] for name in names}) for one in _accept(response)["data"]]


def error(body: dict[str, Any], status: int, request_id: str) -> ServiceError:
    """The exception of a problem object, of OpenAI's envelope, or of what neither is."""
    told = body.get("error", body)
    if not isinstance(told, dict) or not isinstance(told.get("code"), str):
        told = {"code": f"http_{status}", "detail": "the answer is not the service's: is it what listens there?"}
    kind: type[ServiceError] = {
        401: AccessError,
        403: AccessError,
        429: UnavailableError,
        503: UnavailableError,
        504: DeadlineError,
    }.get(status, InvalidRequestError if 400 <= status < 500 else ServiceError)
    return kind(
        status,
        told["code"],
        told.get("detail") or told.get("message") or "",
        faults=tuple(Fault(**fault) for fault in told.get("errors") or ()),
        request_id=request_id,
        retry_after_ms=told.get("retry_after_ms"),
    )


def _accept(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code == 200 and isinstance(body, dict):
        return body
    told = body if isinstance(body, dict) else {}
    raise error(told, response.status_code, response.headers.get("x-request-id", ""))


def _reply(
    response: httpx.Response, parse: Callable[[dict[str, Any]], T]
) -> tuple[str, str, list[T], list[Failure], dict[str, int], str]:
    """The fields of ``Reply``."""
    body = _accept(response)
    request_id = response.headers.get("x-request-id", "")
    results, failures = [], []
    for one in body["data"]:
        if "error" in one:
            problem = one["error"]
            failures.append(Failure(one["index"], one["id"], error(problem, problem["status"], request_id)))
        else:
            results.append(parse(one))
    return body["model"], body["model_version"], results, failures, body["usage"], request_id


def _vector(packed: str) -> Vector:
    return np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float32)


def _generated(value: dict[str, Any]) -> Generated:
    if "text" in value:
        return str(value["text"])
    data = value["data"]
    if "media_type" in value:
        from PIL import Image  # noqa: PLC0415 - only who generates pictures needs it

        image = Image.open(io.BytesIO(base64.b64decode(data)))
        image.load()
        return image
    if "shape" in value:
        return _vector(data).reshape(value["shape"])
    return {str(name): float(p) for name, p in data.items()} if isinstance(data, dict) else np.asarray(data, dtype=np.float32)
