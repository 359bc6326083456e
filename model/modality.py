"""What a modality is: its name, kind, array shape, likelihood and limits.

A modality describes one slot of a row. Five kinds are known; each fixes how a value looks as an array:

=========== ============================ ========= ==========================================
kind        array of one row             dtype     values
=========== ============================ ========= ==========================================
image       (channels, height, width)    float32   [0, 1]
text        (length,)                    int64     token ids, 0 pads
vector      (size,)                      float32   finite, standardised by the stored statistics
binary      (size,)                      float32   0 or 1
categorical (1,)                         int64     number of the class
=========== ============================ ========= ==========================================

A configuration may leave out what the training rows can tell: statistics of a vector, alphabet or vocabulary of a text, the
classes. A bundle holds them all.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Shaped
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
RESERVED_NAMES = frozenset({"id", "options", "present"})  # field names of the HTTP contract and of the graphs
UNKNOWN_CHARACTER = "\ufffd"
"""In an alphabet it stands for every character that the alphabet lacks."""
FIRST_WORD = 2
"""Token of the vocabulary's first word. 0 pads, 1 is any word that the vocabulary lacks."""


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
    channels: int = Field(ge=1, le=64)
    """1 is grey and 3 is RGB, as image files have them; any other number travels as raw numbers."""
    height: int = Field(ge=2)
    width: int = Field(ge=2)
    likelihood: Literal["laplace", "gaussian", "bernoulli"] = "laplace"
    scale: PositiveFloat = 0.75
    """Scale of the Laplace or standard deviation of the Gaussian; unused by the Bernoulli."""
    background: Literal["black", "white"] = "white"
    """What shows through transparent pixels."""

    @property
    def in_files(self) -> bool:
        """Whether image files have so many channels."""
        return self.channels in (1, 3)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


class TextModality(_Described):
    """A text of characters or of words, one token each, of any length up to a limit."""

    kind: Literal["text"] = "text"
    length: PositiveInt
    """Most tokens."""
    unit: Literal["character", "word"] = Field(default="character", exclude_if=lambda unit: unit == "character")
    """What a token is. Words are runs of letters and digits, inner apostrophes, hyphens and dots included."""
    alphabet: str = Field(default="", exclude_if=lambda alphabet: not alphabet)
    """Of characters; the first one pads, and is not told apart from absence at either end. Empty: to be learned."""
    vocabulary: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), exclude_if=lambda words: not words)
    """Of words; any other word is read as the token of unknown words, which is never generated. Empty: to be learned."""
    lowercase: bool = True
    too_long: Literal["refuse", "cut"] = Field(default="refuse", exclude_if=lambda answer: answer == "refuse")
    """A text of more tokens is refused, or loses those beyond the limit."""
    likelihood: Literal["categorical", "shifted"] = "categorical"
    """shifted: each token's categorical after a cyclic shift of the whole text, every shift equally likely. For a text whose
    place in its field says nothing: z need not tell the place, and what is generated stands at the beginning."""

    @model_validator(mode="after")
    def _tokens_differ(self) -> "TextModality":
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("the alphabet names a character twice")
        if len(self.alphabet) == 1 or self.alphabet[:1] == UNKNOWN_CHARACTER:
            raise ValueError("an alphabet is a padding character and at least one other, U+FFFD not first")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("the vocabulary names a word twice")
        if self.alphabet if self.unit == "word" else self.vocabulary:
            raise ValueError('an alphabet goes with unit = "character", a vocabulary with unit = "word"')
        return self

    @cached_property
    def token_ids(self) -> Mapping[str, int]:
        """Token of each character or word that has one of its own."""
        if self.unit == "word":
            return {word: number for number, word in enumerate(self.vocabulary, start=FIRST_WORD)}
        return {character: number for number, character in enumerate(self.alphabet) if character != UNKNOWN_CHARACTER}

    @property
    def unknown_token(self) -> int | None:
        """Token of whatever has none of its own. None: such a text is refused."""
        if self.unit == "word":
            return FIRST_WORD - 1
        return self.alphabet.find(UNKNOWN_CHARACTER) if UNKNOWN_CHARACTER in self.alphabet else None

    @property
    def categories(self) -> int:
        """Number of tokens."""
        return len(self.vocabulary) + FIRST_WORD if self.unit == "word" else len(self.alphabet)

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


class CategoricalModality(_Described):
    """One of several named classes."""

    kind: Literal["categorical"] = "categorical"
    classes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Empty: to be learned."""
    likelihood: Literal["categorical"] = "categorical"

    @model_validator(mode="after")
    def _classes_differ(self) -> "CategoricalModality":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        if len(self.classes) == 1:
            raise ValueError("a single class says nothing: name two or more, or leave the modality out")
        return self

    @cached_property
    def class_ids(self) -> Mapping[str, int]:
        """Number of each class."""
        return {name: number for number, name in enumerate(self.classes)}

    @property
    def categories(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def dtype(self) -> type[np.generic]:
        return np.int64


Modality = Annotated[
    ImageModality | TextModality | VectorModality | BinaryModality | CategoricalModality, Field(discriminator="kind")
]


def unlearned(modality: Modality) -> str | None:
    """The field that a network needs and that is still empty, if there is one."""
    if isinstance(modality, CategoricalModality) and not modality.classes:
        return "classes"
    if isinstance(modality, TextModality) and not (modality.vocabulary or modality.alphabet):
        return "vocabulary" if modality.unit == "word" else "alphabet"
    return None


def resolve_weights(modalities: Sequence[Modality]) -> dict[str, float]:
    """Likelihood weight of each modality: its own, or the largest array size over its own size.

    The default balances a 3072-value picture against an 8-character word, as MoPoE's code does (Sutter et al. 2021). A word
    or a class is one choice among many and counts as the logarithm of how many, or a single class would drown a picture.
    """
    sizes = {modality.name: _size(modality) for modality in modalities}
    largest = max(sizes.values())
    return {m.name: m.weight if m.weight is not None else largest / sizes[m.name] for m in modalities}


def _size(modality: Modality) -> float:
    size = math.prod(modality.shape)
    if isinstance(modality, CategoricalModality) or (isinstance(modality, TextModality) and modality.unit == "word"):
        return size * math.log(modality.categories)
    return float(size)


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
    if isinstance(modality, TextModality | CategoricalModality):
        high = modality.categories - 1
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
