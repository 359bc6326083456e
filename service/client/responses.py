"""Responses as typed results with NumPy arrays and Pillow images, and errors as typed exceptions."""

import base64
import io
import os
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union

import httpx
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

Vector = NDArray[np.float32]
"""(latent,)"""


@dataclass(frozen=True)
class Sound:
    """A generated sound.

    Attributes:
        samples: (samples,) in [-1, 1].
        sample_rate: in Hz.
        file: the bytes of a WAV file.
        spectrogram: (1, mels, frames) in [0, 1], with ``spectrogram=True``.
    """

    samples: NDArray[np.float32]
    sample_rate: int
    file: bytes
    spectrogram: NDArray[np.float32] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the WAV file."""
        Path(path).write_bytes(self.file)


Generated = Union["Image.Image", Sound, np.ndarray, str, dict[str, float]]
"""A picture (or an array, channels first, in [0, 1], with ``image="raw"``), a sound (or its spectrogram, with
``audio="raw"``), a vector, a text, or probabilities by name."""


@dataclass(frozen=True)
class Fault:
    """One error in a request. ``pointer`` is a JSON pointer into its body: ``/inputs/0/photo``."""

    pointer: str
    code: str
    detail: str


class ServiceError(Exception):
    """The service responded without a result.

    Attributes:
        status: of HTTP.
        code: for programs; one of the codes in the OpenAPI document, or ``http_<status>`` if the response is not the service's.
        faults: every error that was found in the body.
        pointer: place of the first one; empty if the body is valid.
        request_id: the request's name in the service's log.
        retry_after_ms: milliseconds after which a retry may succeed.
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
    """400, 404, 405, 413, 415 or 422: the request is invalid, and would fail again."""


class AccessError(ServiceError):
    """401 or 403: the API key is missing or unknown."""


class UnavailableError(ServiceError):
    """429 or 503: the quota is spent, or the service is overloaded, starting or stopping, after all retries."""


class DeadlineError(ServiceError):
    """504: no result in time. Not retried, since the request itself may take too long."""


@dataclass(frozen=True)
class Refinement:
    """What refinement did, in weighted nats. ``trace`` is set if it was requested."""

    steps: int
    objective: str
    before: float
    after: float
    stopped: str
    trace: list[float] | None = None


@dataclass(frozen=True)
class Embedding:
    """The embedding of one item. ``log_var`` is set with ``representation="mean_log_var"``."""

    index: int
    id: str | None
    embedding: Vector
    log_var: Vector | None
    modalities: tuple[str, ...]
    refinement: Refinement | None


@dataclass(frozen=True)
class TrainingExample:
    """A training example that the bundle carries.

    Attributes:
        similarity: cosine of the item's embedding and that of the example.
        values: a thumbnail, or texts. Empty if the bundle has ids only.
    """

    id: str
    similarity: float
    values: list[Generated]


@dataclass(frozen=True)
class Generation:
    """One item's generated values, by modality, ``num_samples`` of each. ``nearest`` has the nearest training examples by
    modality, the most similar one first, if they were requested."""

    index: int
    id: str | None
    modalities: tuple[str, ...]
    generated: dict[str, list[Generated]]
    embedding: Vector | None
    refinement: Refinement | None
    nearest: dict[str, list[TrainingExample]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """One item without a result, with ``on_error="partial"``."""

    index: int
    id: str | None
    error: ServiceError


@dataclass(frozen=True)
class Response(Generic[T]):
    """The response to one call, in the order of its inputs."""

    model: str
    model_version: str
    results: list[T]
    failures: list[Failure]
    usage: dict[str, int]
    request_id: str


@dataclass(frozen=True)
class Embeddings(Response[Embedding]):
    """The response of ``embed``."""

    @property
    def matrix(self) -> NDArray[np.float32]:
        """The embeddings of all results, (results, latent)."""
        return np.stack([result.embedding for result in self.results])


@dataclass(frozen=True)
class Model:
    """A bundle that is served; ``modalities``, ``limits`` and ``provenance`` as in GET /v1/models.

    ``recommended_refine_steps`` is None if the bundle, or the version of the service, has no recommendation.
    """

    id: str
    version: str
    state: str
    latent: int
    modalities: list[dict[str, Any]]
    limits: dict[str, int]
    provenance: dict[str, Any]
    recommended_refine_steps: int | None = None


def embeddings(response: httpx.Response) -> Embeddings:
    """The response of POST /embed. Raises ServiceError, as all of these functions do."""

    def parse(one: dict[str, Any]) -> Embedding:
        return Embedding(
            one["index"],
            one["id"],
            _vector(one["embedding"]),
            one["log_var"] and _vector(one["log_var"]),
            tuple(one["modalities"]),
            one["refinement"] and Refinement(**one["refinement"]),
        )

    return Embeddings(*_fields(response, parse))


def generations(response: httpx.Response) -> Response[Generation]:
    """The response of POST /cross-generate."""

    def parse(one: dict[str, Any]) -> Generation:
        return Generation(
            one["index"],
            one["id"],
            tuple(one["modalities"]),
            {name: [_generated(value) for value in values] for name, values in one["generated"].items()},
            one["embedding"] and _vector(one["embedding"]),
            one["refinement"] and Refinement(**one["refinement"]),
            {name: [_example(found) for found in examples] for name, examples in one.get("nearest", {}).items()},
        )

    return Response(*_fields(response, parse))


def models(response: httpx.Response) -> list[Model]:
    """The response of GET /v1/models."""
    names = Model.__dataclass_fields__
    return [Model(**{name: one[name] for name in names if name in one}) for one in _accept(response)["data"]]


def error(body: dict[str, Any], status: int, request_id: str) -> ServiceError:
    """The exception for a problem object, for OpenAI's envelope, or for any other body."""
    fields = body.get("error", body)
    if not isinstance(fields, dict) or not isinstance(fields.get("code"), str):
        fields = {"code": f"http_{status}", "detail": "the response is not the service's: is another program listening there?"}
    kind: type[ServiceError] = {
        401: AccessError,
        403: AccessError,
        429: UnavailableError,
        503: UnavailableError,
        504: DeadlineError,
    }.get(status, InvalidRequestError if 400 <= status < 500 else ServiceError)
    return kind(
        status,
        fields["code"],
        fields.get("detail") or fields.get("message") or "",
        faults=tuple(Fault(**fault) for fault in fields.get("errors") or ()),
        request_id=request_id,
        retry_after_ms=fields.get("retry_after_ms"),
    )


def _accept(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code == 200 and isinstance(body, dict):
        return body
    raise error(body if isinstance(body, dict) else {}, response.status_code, response.headers.get("x-request-id", ""))


def _fields(
    response: httpx.Response, parse: Callable[[dict[str, Any]], T]
) -> tuple[str, str, list[T], list[Failure], dict[str, int], str]:
    """The fields of ``Response``."""
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
    if "sample_rate" in value:
        return _sound(value)
    if "media_type" in value:
        try:
            from PIL import Image  # noqa: PLC0415 - needed only to receive pictures
        except ImportError as error:
            raise ImportError("Pillow is not installed. Pictures in responses need it: pip install pillow") from error

        image = Image.open(io.BytesIO(base64.b64decode(data)))
        image.load()
        return image
    if "shape" in value:
        return _vector(data).reshape(value["shape"])
    return {str(name): float(p) for name, p in data.items()} if isinstance(data, dict) else np.asarray(data, dtype=np.float32)


def _example(found: dict[str, Any]) -> TrainingExample:
    return TrainingExample(found["id"], found["similarity"], [_generated(value) for value in found["values"]])


def _sound(value: dict[str, Any]) -> Sound:
    file = base64.b64decode(value["data"])
    with wave.open(io.BytesIO(file)) as content:
        levels = np.frombuffer(content.readframes(content.getnframes()), "<i2")
    spectrogram = value.get("spectrogram")
    return Sound(
        (levels / 32767).astype(np.float32),
        int(value["sample_rate"]),
        file,
        None if spectrogram is None else _vector(spectrogram["data"]).reshape(spectrogram["shape"]),
    )
