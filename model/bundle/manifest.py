"""The manifest of a bundle: what the service needs to run its graphs, and where they come from."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from concord.model.encoder import ENCODER_NAME, Encoder
from concord.model.modality import (
    MAX_MODALITIES,
    AudioModality,
    CategoricalModality,
    EncodedModality,
    ImageModality,
    Modality,
    TextModality,
)

FORMAT = 7
"""The newest format that can be read. A bundle is written in the oldest format that can describe it, see ``oldest_format``:

- 1: images of 1 or 3 channels, texts of characters, vectors, binary attributes.
- 2: adds texts of words, unknown characters, texts that are cut or shifted, classes, images with any number of channels.
- 3: adds a sample graph, for posterior samples that are not Gaussian.
- 4: adds words by Unicode's rules, modalities with the name of a value of the graphs, and more than eight modalities.
- 5: adds frozen encoders of images and texts, and audio.
- 6: adds texts with the autoregressive likelihood, whose decode graph is that of one token.
- 7: adds galleries of training examples, images and audio with a learned scale, and images with the logistic mixture.
"""
GRAPH_VALUES = frozenset(
    {"present", "mean", "log_var", "anchor_mean", "anchor_log_var", "noise", "next_mean", "next_log_var", "objective"}
)
"""Inputs and outputs of the encode and the refine graph that are not a modality's."""
_MAX_MODALITIES_OF_FORMAT_3 = 8
MAX_FILE_BYTES = 2 << 30
"""Largest file of a bundle, 2 GiB."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Strict):
    """Hash and size of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class Graphs(_Strict):
    """File name of each graph."""

    encode: str
    refine: str
    decode: dict[str, str]
    draw: str | None = None
    """The sample graph: noise -> a sample of the posterior. None: samples are those of the Gaussian posterior."""

    @property
    def names(self) -> list[str]:
        """File names of all graphs."""
        return [self.encode, self.refine, *self.decode.values(), *([self.draw] if self.draw else [])]


class GalleryFacts(_Strict):
    """A gallery of training examples, see ``model.gallery``."""

    file: str
    """Name of the file."""
    rows: int = Field(ge=1)
    """Number of training examples."""
    values: bool
    """Whether the file holds their pictures, as thumbnails, or their texts. Else ids only."""


class RefinementFacts(_Strict):
    """What a caller of the refine graph needs."""

    samples: int = Field(ge=1)
    """Noise samples per row: the graph's ``noise`` is (batch, samples, latent)."""
    horizon: int = Field(ge=1)
    """Number of steps that the refiner was trained for."""


class DataSource(_Strict):
    """One file of training or evaluation data."""

    file: str
    sha256: str
    rows: int
    licence: str


class Provenance(_Strict):
    """When, from which code, configuration and data a bundle was made."""

    created: str
    code_revision: str
    config_sha256: str
    seed: int
    libraries: dict[str, str]
    data: list[DataSource]


class Manifest(_Strict):
    """What the service needs to run the graphs, and the origin and metrics of the model."""

    format: int = Field(ge=1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    modalities: list[Modality] = Field(min_length=2, max_length=MAX_MODALITIES)
    latent: int = Field(ge=1)
    beta: float = Field(gt=0)
    """Weight of the KL term in the objective that refinement maximises."""
    weights: dict[str, float]
    """Likelihood weight of each modality in that objective."""
    graphs: Graphs
    refinement: RefinementFacts
    encoders: dict[Annotated[str, Field(pattern=ENCODER_NAME)], Encoder] = Field(default={}, exclude_if=lambda found: not found)
    """Frozen encoders, by name. Modalities that use the same one share it."""
    galleries: dict[str, GalleryFacts] = Field(default={}, exclude_if=lambda found: not found)
    """Training examples that the bundle carries, by modality."""
    files: dict[str, FileEntry]
    """Every file that the service reads, by name."""
    provenance: Provenance
    metrics: dict[str, Any]
    """Of ``evaluate``. Versions that do not know one of them read the bundle too."""

    @field_validator("metrics")
    @classmethod
    def _recommended_steps_are_a_number(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        steps = metrics.get("recommended_steps")
        if steps is not None and (type(steps) is not int or steps < 0):
            raise ValueError(f"recommended_steps must be an integer of at least 0, received {steps!r}")
        return metrics

    @property
    def recommended_steps(self) -> int | None:
        """Refinement steps with which requests get the best results, from ``metrics``. None: not measured."""
        return self.metrics.get("recommended_steps")

    @property
    def encoder_files(self) -> list[str]:
        """Names of the files of all frozen encoders."""
        found = [name for encoder in self.encoders.values() for name in (encoder.graph, encoder.tokenizer)]
        return [name for name in found if name is not None]


def graph_input(modality: str) -> str:
    """Name of a modality's input in the encode and the refine graph: the modality's name, with the prefix ``input.`` if it is
    one of ``GRAPH_VALUES``."""
    return f"input.{modality}" if modality in GRAPH_VALUES else modality


def oldest_format(facts: Mapping[str, Any]) -> int:
    """The oldest format that can describe a bundle, so that older versions can read it.

    Args:
        facts: the manifest's fields, at least ``modalities`` and ``graphs``.
    """
    if facts.get("galleries"):
        return 7
    modalities = [TypeAdapter(Modality).validate_python(fields) for fields in facts["modalities"]]
    has_sample_graph = Graphs.model_validate(facts["graphs"]).draw is not None
    has_renamed_input = any(graph_input(modality.name) != modality.name for modality in modalities)
    formats = {1: True, 3: has_sample_graph, 4: has_renamed_input or len(modalities) > _MAX_MODALITIES_OF_FORMAT_3}
    return max([number for number, is_needed in formats.items() if is_needed] + [*map(_oldest_format_of, modalities)])


def _oldest_format_of(modality: Modality) -> int:
    if isinstance(modality, ImageModality | AudioModality):
        newest = modality.learned_scale != "none" or modality.likelihood == "logistic_mixture"
        return 7 if newest else 5 if isinstance(modality, AudioModality) else 1 if modality.in_files else 2
    if isinstance(modality, EncodedModality):
        return 5
    if isinstance(modality, TextModality):
        if modality.likelihood == "autoregressive":
            return 6
        if modality.unit == "word" and modality.segmentation == "unicode":
            return 4
        basic = modality.unit == "character" and modality.likelihood == "categorical" and modality.too_long == "refuse"
        return 1 if basic and modality.unknown_token is None else 2
    return 2 if isinstance(modality, CategoricalModality) else 1
