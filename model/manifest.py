"""The manifest of a bundle: what the service must know to use its graphs, and where they come from."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from model.modality import CategoricalModality, ImageModality, Modality, TextModality

FORMAT = 3
"""The newest that is read. Written is the oldest that can tell of the bundle's modalities and graphs: 1 knows images of one or
three channels, texts of characters, vectors and attributes; 2 came with words, unknown characters, texts that are cut or
shifted, classes and any other image; 3 with samples that are not a Gaussian's."""
MAX_FILE_BYTES = 2 << 30


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Strict):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class Graphs(_Strict):
    """File name of each graph."""

    encode: str
    refine: str
    decode: dict[str, str]
    draw: str | None = None
    """Gives samples of a posterior. None: they are those of the Gaussian."""

    @property
    def names(self) -> list[str]:
        """Of all files."""
        return [self.encode, self.refine, *self.decode.values(), *([self.draw] if self.draw else [])]


class RefinementFacts(_Strict):
    """What a caller of the refine graph must know."""

    samples: int = Field(ge=1)
    """Noise samples a row: the graph's ``noise`` is (batch, samples, latent)."""
    horizon: int = Field(ge=1)
    """Steps the refiner was trained for."""


class DataSource(_Strict):
    file: str
    sha256: str
    rows: int
    licence: str


class Provenance(_Strict):
    created: str
    code_revision: str
    config_sha256: str
    seed: int
    libraries: dict[str, str]
    data: list[DataSource]


class Manifest(_Strict):
    """What the service must know to use the graphs, and what a reader wants to know of their origin."""

    format: int = Field(ge=1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    modalities: list[Modality] = Field(min_length=2, max_length=8)
    latent: int = Field(ge=1)
    beta: float = Field(gt=0)
    """Weight of the KL term in the objective that refinement climbs."""
    weights: dict[str, float]
    """Likelihood weight of each modality in that objective."""
    graphs: Graphs
    refinement: RefinementFacts
    files: dict[str, FileEntry]
    """Every file the service reads, by name."""
    provenance: Provenance
    metrics: dict[str, Any]


def oldest_format(facts: Mapping[str, Any]) -> int:
    """The oldest format that can tell of the modalities and graphs of a manifest's ``facts``."""
    told = [TypeAdapter(Modality).validate_python(fields) for fields in facts["modalities"]]
    drawn = Graphs.model_validate(facts["graphs"]).draw is not None
    return max([3 if drawn else 1, *map(_oldest_format, told)])


def _oldest_format(modality: Modality) -> int:
    if isinstance(modality, ImageModality):
        return 1 if modality.in_files else 2
    if isinstance(modality, TextModality):
        old = modality.unit == "character" and modality.likelihood == "categorical" and modality.too_long == "refuse"
        return 1 if old and modality.unknown_token is None else 2
    return 2 if isinstance(modality, CategoricalModality) else 1
