"""The options a caller may set and the answers that come back, as the OpenAPI document describes them.

Options are parsed with these models. Answers are built as plain dictionaries and never pass through theirs, which would cost
more than the inference: the answer models exist for the OpenAPI document and for the tests that hold the answers against them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from model.codec import ImageFormat
from service.errors import ProblemSchema


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Natural = Annotated[int, Field(ge=0, le=2**63 - 1), BeforeValidator(_whole)]
"""JSON has one kind of number: 3.0 is an integer."""
Positive = Annotated[int, Field(ge=1, le=2**63 - 1), BeforeValidator(_whole)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RefineOptions(_Options):
    """Steps that climb the objective from the encoder's posterior."""

    steps: Natural = Field(0, description="Most steps to take; 0 answers with the encoder alone. The server caps it.")
    tolerance: float | None = Field(None, ge=0, description="Stop when a step gains less than this, in nats.")
    budget_ms: float | None = Field(None, gt=0, description="Stop when this time is spent, and answer with the best so far.")
    trace: bool = Field(False, description="Also answer with the objective at every step.")


class OutputOptions(_Options):
    """How generated values are written."""

    image: ImageFormat = Field("png", description="png and webp are lossless; raw is little-endian float32 in base64.")
    text: Literal["string"] = "string"


class CallOptions(_Options):
    """What both endpoints take."""

    model: str | None = Field(None, max_length=128, description='"name" or "name@version"; the default bundle when left out.')
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    seed: Natural = Field(0, description="Same request, same seed, same bundle: the same answer.")
    refine: RefineOptions = Field(default_factory=RefineOptions)
    on_error: Literal["fail", "partial"] = Field(
        "fail", description="partial: a bad item carries its error, the others their results."
    )


class EmbedOptions(CallOptions):
    representation: Literal["mean", "sample", "mean_log_var"] = "mean"
    normalize: bool = Field(False, description="Scale the embedding to unit L2 norm.")


class GenerateOptions(CallOptions):
    targets: list[str] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="What to generate; when left out, what the item lacks. A present one is reconstructed.",
    )
    num_samples: Positive = Field(1, description="Values of each target.")
    latent: Literal["sample", "mean"] = Field("sample", description="Decode samples of the posterior, or its mean.")
    temperature: float = Field(1.0, ge=0, le=10, description="Scales how far samples lie from the posterior's mean.")
    output: OutputOptions = Field(default_factory=OutputOptions)
    return_embedding: bool = False


class EmbeddingsOptions(_Options):
    """OpenAI's, beside ``input``."""

    model: str | None = Field(None, max_length=128, description='"name" or "name@version"; the default bundle when left out.')
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    dimensions: Positive | None = Field(None, description="Embeddings are not cut short: the bundle's own number or nothing.")
    user: str | None = Field(None, description="Ignored.")


Vector = Annotated[list[float] | str, Field(description="Numbers, or base64 of little-endian float32.")]


class RefinementAnswer(BaseModel):
    steps: int
    objective: Literal["elbo", "observed"] = Field(
        description="elbo: every modality was present; observed: only the terms of those that were."
    )
    before: float = Field(description="Objective of the encoder's posterior, in weighted nats.")
    after: float = Field(description="Objective of the answer; never below before. Both 0 where it is not finite.")
    stopped: Literal["steps", "tolerance", "budget", "diverged"]
    trace: list[float] | None = Field(None, description="Objective at every step, when asked for.")


class EmbeddingAnswer(BaseModel):
    object: Literal["embedding"]
    index: int
    id: str | None
    embedding: Vector
    log_var: Vector | None
    modalities: list[str]
    refinement: RefinementAnswer | None


class GenerationAnswer(BaseModel):
    index: int
    id: str | None
    modalities: list[str]
    generated: dict[str, list[dict[str, Any]]] = Field(
        description="An image is {media_type, data, width, height}, or {data, shape, dtype} when raw; a text {text}; "
        "a vector {data}; attributes {data: {name: probability}}; a class {class, data: {name: probability}}."
    )
    embedding: Vector | None
    refinement: RefinementAnswer | None


class FailedItem(BaseModel):
    """In place of a result, with on_error partial."""

    index: int
    id: str | None
    error: ProblemSchema


class EmbedUsage(BaseModel):
    items: int
    images: int
    text_characters: int
    refine_steps: int


class GenerateUsage(BaseModel):
    items: int
    generated: int
    refine_steps: int


class EmbedAnswer(BaseModel):
    object: Literal["list"]
    model: str
    model_version: str
    dimensions: int
    data: list[EmbeddingAnswer | FailedItem]
    usage: EmbedUsage


class GenerateAnswer(BaseModel):
    object: Literal["list"]
    model: str
    model_version: str
    data: list[GenerationAnswer | FailedItem]
    usage: GenerateUsage


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: Vector


class OpenAIUsage(BaseModel):
    prompt_tokens: int = Field(description="Characters of the texts: a token is a character.")
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """In OpenAI's shape."""

    object: Literal["list"]
    model: str
    data: list[OpenAIEmbedding]
    usage: OpenAIUsage


class HealthAnswer(BaseModel):
    status: Literal["ok", "failing"]
    checks: dict[str, str] = Field(description='Each check and "ok", or what is wrong.')


class ModelAnswer(BaseModel):
    """OpenAI's fields (id, object, created, owned_by) and what else there is to know of a bundle."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time.")
    owned_by: str
    version: str
    state: Literal["ready", "failing", "failed"] = Field(
        description="failing: see /readyz. failed: what lies in its folder now could not be loaded, and this one is served on."
    )
    latent: int = Field(description="Dimensions of an embedding.")
    modalities: list[dict[str, Any]]
    capabilities: list[str]
    limits: dict[str, int]
    provenance: dict[str, Any]


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelAnswer]
