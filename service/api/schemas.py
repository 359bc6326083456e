"""Options of requests, and responses, as the OpenAPI document describes them.

Options are parsed with these models. Responses are built as plain dictionaries and never pass through their models, which
would cost more than the inference: those exist for the OpenAPI document and for tests that validate responses. Class names are
part of the OpenAPI document and do not change.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from concord.model.codec import AudioFormat, ImageFormat
from concord.service.errors import ProblemSchema


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Natural = Annotated[int, Field(ge=0, le=2**63 - 1), BeforeValidator(_whole)]
"""JSON has one kind of number: 3.0 is an integer."""
Positive = Annotated[int, Field(ge=1, le=2**63 - 1), BeforeValidator(_whole)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RefineOptions(_Options):
    """Refinement of the posterior, step by step, by the gradient of the objective."""

    steps: Natural = Field(0, description="Most steps to take; 0 returns the encoder's posterior. The server limits it.")
    tolerance: float | None = Field(None, ge=0, description="Stop when a step gains less than this, in nats.")
    budget_ms: float | None = Field(None, gt=0, description="Stop after this time, and return the best posterior so far.")
    trace: bool = Field(False, description="Also return the objective at every step.")


class OutputOptions(_Options):
    """How generated values are written."""

    image: ImageFormat = Field("png", description="png and webp are lossless; raw is little-endian float32 in base64.")
    audio: AudioFormat = Field("wav", description="wav is mono with 16 bits; raw is the spectrogram, little-endian float32.")
    spectrogram: bool = Field(False, description="Also return the spectrogram of each generated sound, as audio raw does.")
    text: Literal["string"] = "string"


class TextOptions(_Options):
    """How the words of generated sentences are chosen. No effect on texts whose tokens the model generates independently."""

    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the most likely word; 1 samples from the distribution.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample only the most likely words whose probabilities sum up to this.")


class CallOptions(_Options):
    """Options of both endpoints."""

    model: str | None = Field(None, max_length=128, description='"name" or "name@version"; the default model if left out.')
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    seed: Natural = Field(0, description="The same request with the same seed and bundle gets the same response.")
    refine: RefineOptions = Field(default_factory=RefineOptions)
    on_error: Literal["fail", "partial"] = Field(
        "fail", description="partial: an invalid item gets an error, the others their results."
    )


class EmbedOptions(CallOptions):
    representation: Literal["mean", "sample", "mean_log_var"] = "mean"
    normalize: bool = Field(False, description="Scale the embedding to unit L2 norm.")


class GenerateOptions(CallOptions):
    targets: list[str] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="What to generate; if left out, the modalities that the item lacks. A present one is reconstructed.",
    )
    num_samples: Positive = Field(1, description="Values of each target.")
    latent: Literal["sample", "mean"] = Field("sample", description="Decode samples of the posterior, or its mean.")
    temperature: float = Field(1.0, ge=0, le=10, description="Scales how far samples lie from the posterior's mean.")
    text: TextOptions = Field(default_factory=TextOptions)
    output: OutputOptions = Field(default_factory=OutputOptions)
    return_embedding: bool = False
    nearest: Natural = Field(
        0, description="Also return so many of the nearest training examples of each target whose gallery the bundle has."
    )


class EmbeddingsOptions(_Options):
    """OpenAI's options next to ``input``."""

    model: str | None = Field(None, max_length=128, description='"name" or "name@version"; the default model if left out.')
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is little-endian float32.")
    dimensions: Positive | None = Field(None, description="Only the model's latent size: embeddings are not cut short.")
    user: str | None = Field(None, description="Ignored.")


Vector = Annotated[list[float] | str, Field(description="Numbers, or base64 of little-endian float32.")]


class RefinementAnswer(BaseModel):
    steps: int
    objective: Literal["elbo", "observed"] = Field(
        description="elbo: every modality was present; observed: only the terms of present modalities."
    )
    before: float = Field(description="Objective of the encoder's posterior, in weighted nats.")
    after: float = Field(description="Objective of the returned posterior; never below before. Both are 0 if it is not finite.")
    stopped: Literal["steps", "tolerance", "budget", "diverged"]
    trace: list[float] | None = Field(None, description="Objective at every step, if requested.")


class EmbeddingAnswer(BaseModel):
    object: Literal["embedding"]
    index: int
    id: str | None
    embedding: Vector
    log_var: Vector | None
    modalities: list[str]
    refinement: RefinementAnswer | None


class TrainingExample(BaseModel):
    id: str
    similarity: float = Field(
        description="Cosine of the item's embedding and that of the example, by its value of the target alone."
    )
    values: list[dict[str, Any]] = Field(
        description="A thumbnail {media_type, data, width, height}, or each text {text}; empty if the gallery has ids only."
    )


class GenerationAnswer(BaseModel):
    index: int
    id: str | None
    modalities: list[str]
    generated: dict[str, list[dict[str, Any]]] = Field(
        description="An image is {media_type, data, width, height}, or {data, shape, dtype} when raw; a sound "
        "{media_type, data, sample_rate, seconds}, with spectrogram {data, shape, dtype} on demand, or only that when raw; "
        "a text {text}; "
        "a vector {data}; attributes {data: {name: probability}}; a class {class, data: {name: probability}}."
    )
    embedding: Vector | None
    refinement: RefinementAnswer | None
    nearest: dict[str, list[TrainingExample]] | None = Field(
        None, description="With nearest: training examples by target, the most similar one first."
    )


class FailedItem(BaseModel):
    """Replaces the result of an invalid item, with on_error partial."""

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
    """OpenAI's fields (id, object, created, owned_by) and more about the bundle."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time.")
    owned_by: str
    version: str
    state: Literal["ready", "failing", "failed"] = Field(
        description="failing: see /readyz. failed: its folder now holds something that cannot be loaded; this bundle stays."
    )
    latent: int = Field(description="Dimensions of an embedding.")
    modalities: list[dict[str, Any]]
    capabilities: list[str]
    recommended_refine_steps: int | None = Field(
        description="Value of refine.steps with which requests get the best results, as measured in training, at most the "
        "limit. The default of refine.steps stays 0. Null: not measured."
    )
    limits: dict[str, int]
    provenance: dict[str, Any]


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelAnswer]
