"""What a modality is: its name, kind, array shape, likelihood and limits.

A modality describes one slot of a row. Four kinds are known; each fixes how a value looks as an array:

======== ============================ ========= ==========================================
kind     array of one row             dtype     values
======== ============================ ========= ==========================================
image    (channels, height, width)    float32   [0, 1]
text     (length,)                    int64     token ids, 0 is the padding character
vector   (size,)                      float32   finite, standardised by the stored statistics
binary   (size,)                      float32   0 or 1
======== ============================ ========= ==========================================
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
RESERVED_NAMES = frozenset({"id", "options", "present"})  # field names of the HTTP contract and of the graphs


class _Described(BaseModel):
    """What all kinds share. Frozen: a bundle's modalities never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    weight: PositiveFloat | None = None
    """Multiplies log p(x_m | z) in the objective. None: the largest array size among the modalities over this one's."""

    @model_validator(mode="after")
    def _name_is_free(self) -> "_Described":
        if self.name in RESERVED_NAMES:
            raise ValueError(f"{self.name!r} is a reserved word: name the modality otherwise")
        return self


class ImageModality(_Described):
    """A picture, channels first."""

    kind: Literal["image"] = "image"
    channels: Literal[1, 3]
    height: PositiveInt
    width: PositiveInt
    likelihood: Literal["laplace", "gaussian", "bernoulli"] = "laplace"
    scale: PositiveFloat = 0.75
    """Scale of the Laplace or standard deviation of the Gaussian; unused by the Bernoulli."""
    background: Literal["black", "white"] = "white"
    """What shows through transparent pixels."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


class TextModality(_Described):
    """A short text over a fixed alphabet, one token a character."""

    kind: Literal["text"] = "text"
    length: PositiveInt
    alphabet: str = Field(min_length=2)
    """One token a character; the first one pads, and is not told apart from absence at either end."""
    lowercase: bool = True
    likelihood: Literal["categorical"] = "categorical"

    @model_validator(mode="after")
    def _characters_differ(self) -> "TextModality":
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("the alphabet names a character twice")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def dtype(self) -> type[np.generic]:
        return np.int64


class VectorModality(_Described):
    """Real numbers: sensor readings, features of another model."""

    kind: Literal["vector"] = "vector"
    size: PositiveInt
    likelihood: Literal["gaussian", "laplace"] = "gaussian"
    scale: PositiveFloat = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    """Statistics of the training rows; a wire value x enters the networks as (x - mean) / std."""

    @model_validator(mode="after")
    def _statistics_fit(self) -> "VectorModality":
        for label, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.size:
                raise ValueError(f"{label} has {len(values)} numbers, the vector has {self.size}")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


class BinaryModality(_Described):
    """Named attributes, each true or false."""

    kind: Literal["binary"] = "binary"
    attributes: tuple[str, ...] = Field(min_length=1)
    likelihood: Literal["bernoulli"] = "bernoulli"

    @model_validator(mode="after")
    def _attributes_differ(self) -> "BinaryModality":
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError("an attribute is named twice")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.attributes),)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


Modality = Annotated[ImageModality | TextModality | VectorModality | BinaryModality, Field(discriminator="kind")]


def resolve_weights(modalities: Sequence[Modality]) -> dict[str, float]:
    """Likelihood weight of each modality: its own, or the largest array size over its own size.

    The default balances a 3072-value picture against an 8-character word, as MoPoE's code does (Sutter et al. 2021).
    """
    sizes = {modality.name: int(np.prod(modality.shape)) for modality in modalities}
    largest = max(sizes.values())
    return {m.name: m.weight if m.weight is not None else largest / sizes[m.name] for m in modalities}


def check_array(modality: Modality, array: NDArray[Any]) -> None:
    """Refuse an array that is not one row of the modality.

    Raises:
        ValueError: wrong shape or dtype, a value out of range or not finite. Says what was received and what is allowed.
    """
    expected = np.dtype(modality.dtype)
    if array.shape != modality.shape or array.dtype != expected:
        raise ValueError(
            f"{modality.name}: received shape {array.shape} of {array.dtype}, a row is {modality.shape} of {expected}"
        )
    low: float = 0
    high: float = 1
    if isinstance(modality, TextModality):
        high = len(modality.alphabet) - 1
    elif isinstance(modality, VectorModality):
        low, high = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
    if not bool(np.all((array >= low) & (array <= high))):  # a comparison with NaN is false
        raise ValueError(f"{modality.name}: values must be finite and within [{low}, {high}]")
    if isinstance(modality, BinaryModality) and not bool(np.all((array == 0) | (array == 1))):
        raise ValueError(f"{modality.name}: values must be 0 or 1")


def collate(
    modalities: Sequence[Modality], rows: Sequence[Mapping[str, NDArray[Any]]]
) -> tuple[dict[str, Shaped[np.ndarray, "batch ..."]], Bool[np.ndarray, "batch modality"]]:
    """Stack rows that lack modalities into full batches and the mask that tells filler from evidence.

    Args:
        rows: one mapping a row, from modality name to its array; names that are missing are absent modalities.

    Returns:
        arrays of shape (batch, *modality.shape), zeros where absent; and ``present`` (batch, modality), its columns in the
        order of ``modalities``.
    """
    present = np.array([[m.name in row for m in modalities] for row in rows], dtype=bool).reshape(len(rows), len(modalities))
    inputs = {}
    for modality in modalities:
        stacked = np.zeros((len(rows), *modality.shape), dtype=modality.dtype)
        for index, row in enumerate(rows):
            if modality.name in row:
                stacked[index] = row[modality.name]
        inputs[modality.name] = stacked
    return inputs, present
