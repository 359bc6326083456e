"""Descriptions of modalities: name, kind, array shape, likelihood and limits. Checks and batching of their arrays.

A modality describes one field of a row. Each of the six kinds fixes the array of a value:

=========== ============================ ========= ==========================================
kind        array of one row             dtype     values
=========== ============================ ========= ==========================================
image       (channels, height, width)    float32   [0, 1]
audio       (1, mels, frames)            float32   [0, 1], a log-mel spectrogram
text        (length,)                    int64     token ids, 0 pads
vector      (size,)                      float32   finite, standardised with the stored statistics
binary      (size,)                      float32   0 or 1
categorical (1,)                         int64     index of the class
=========== ============================ ========= ==========================================

An image or a text may have a frozen encoder (``EncodedModality``): it is then the vector of its features.

A configuration may leave out what can be computed from the training rows: the statistics of a vector, the alphabet or
vocabulary of a text, the classes. A bundle holds all of them.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Shaped
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
RESERVED_NAMES = frozenset({"id", "options", "present"})  # field names of the HTTP API and of the graphs
Segmentation = Literal["letters", "unicode"]
PixelLikelihood = Literal["laplace", "gaussian", "bernoulli", "logistic_mixture"]
LearnedScale = Literal["none", "modality", "channel"]
DEFAULT_COMPONENTS = 3
"""Of a mixture of logistic distributions."""
PIXEL_LEVELS = 256
"""Values of a pixel under the ``logistic_mixture``: multiples of 1/255."""
UNKNOWN_CHARACTER = "\ufffd"
"""In an alphabet: the token of every character outside the alphabet."""
MAX_MODALITIES = 12
"""Of one model. Nothing in the method limits them; every subset of them can be in a request, and there are 2 ** M - 1."""
PIXEL_STD = 0.25
"""Typical standard deviation of the pixels of photographs and of the values of spectrograms, in [0, 1]."""
BYTES = 256
"""Subwords of one byte."""
FIRST_WORD = 2
"""Token of the vocabulary's first word. Token 0 is padding, token 1 is any word outside the vocabulary."""


class _ModalityBase(BaseModel):
    """Fields of every kind. Frozen, because a bundle's modalities never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name of the modality in requests: lower-case letters, digits and _, a letter first, at most 64 characters."""
    weight: PositiveFloat | None = None
    """Factor of log p(x_m | z) in the objective. None: see ``objective.weights``."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in RESERVED_NAMES and _NAME.fullmatch(name):
            return name
        proposal = propose_name(name, str(cls.model_fields["kind"].default))
        if name in RESERVED_NAMES:
            raise ValueError(f"the name is a reserved word: choose another one, for example {proposal!r}")
        raise ValueError(
            "a name has lower-case letters, digits and _, a letter first, and at most 64 characters: choose another one, for "
            f"example {proposal!r}"
        )


class ImageModality(_ModalityBase):
    """An image, channels first."""

    kind: Literal["image"] = "image"
    channels: int = Field(ge=1, le=64)
    """1: grey. 3: RGB. Images with any other number of channels are sent as raw float32 arrays, not as image files."""
    height: int = Field(ge=2)
    """Pixels. Images of other sizes are cropped to the aspect ratio and resized."""
    width: int = Field(ge=2)
    """Pixels."""
    likelihood: PixelLikelihood = "laplace"
    """``logistic_mixture``: each pixel is one of 256 levels, with a mixture of logistic distributions that z determines."""
    scale: PositiveFloat = 0.75
    """Scale of the Laplace or standard deviation of the Gaussian, for pixels in [0, 1]. The others do not use it."""
    learned_scale: LearnedScale = Field(default="none", exclude_if=lambda choice: choice == "none")
    """Whether ``scale`` is only the initial scale and training learns it: one number for all values, or one per channel."""
    components: int = Field(default=DEFAULT_COMPONENTS, ge=1, le=10, exclude_if=lambda count: count == DEFAULT_COMPONENTS)
    """Components of the ``logistic_mixture``."""
    background: Literal["black", "white"] = "white"
    """Colour behind transparent pixels."""

    @model_validator(mode="after")
    def _check_learned_scale(self) -> "ImageModality":
        _check_has_scale(self)
        return self

    @property
    def in_files(self) -> bool:
        """Whether image files can hold this number of channels."""
        return self.channels in (1, 3)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


class AudioModality(_ModalityBase):
    """A sound of fixed length, as the log-mel spectrogram that ``model.codec.audio`` computes. Low frequencies come first."""

    kind: Literal["audio"] = "audio"
    sample_rate: int = Field(default=16_000, ge=2_000, le=96_000)
    """Samples per second, in Hz. Audio of other rates is resampled. Frequencies above half of it are lost."""
    seconds: float = Field(gt=0, le=60)
    """Length. Of a longer clip the part with the most energy is kept; a shorter one is padded with silence."""
    window: int = Field(default=512, ge=16, multiple_of=2)
    """Length of the window of the Fourier transform, in samples."""
    hop: PositiveInt = 256
    """Samples from one frame of the spectrogram to the next; at most half the window."""
    mels: int = Field(default=40, ge=2)
    """Frequency bands, equally spaced on the mel scale."""
    floor: float = Field(default=-60.0, le=-10, ge=-120)
    """Level that becomes 0, in decibels. The loudest value of each clip, 0 decibels, becomes 1."""
    likelihood: Literal["laplace", "gaussian", "bernoulli"] = "laplace"
    scale: PositiveFloat = 0.75
    """Scale of the Laplace or standard deviation of the Gaussian, for values in [0, 1]. The Bernoulli does not use it."""
    learned_scale: LearnedScale = Field(default="none", exclude_if=lambda choice: choice == "none")
    """Whether ``scale`` is only the initial scale and training learns it."""

    @model_validator(mode="after")
    def _check_learned_scale(self) -> "AudioModality":
        _check_has_scale(self)
        return self

    @model_validator(mode="after")
    def _check_resolution(self) -> "AudioModality":
        if self.hop > self.window // 2:
            raise ValueError(f"hop is {self.hop}, at most half the window ({self.window // 2}) is allowed")
        if self.samples < 2 * self.window:
            raise ValueError(
                f"{self.seconds} s are {self.samples} samples, at least two windows ({2 * self.window}) are needed"
            )
        lowest_band = self.band_edges[1]
        if lowest_band < self.sample_rate / self.window:
            raise ValueError(
                f"{self.mels} mels are too many: the lowest band, {lowest_band:.1f} Hz, is narrower than the resolution of the "
                f"window, {self.sample_rate / self.window:.1f} Hz. Reduce mels or enlarge the window"
            )
        return self

    @property
    def band_edges(self) -> Float64[np.ndarray, " edge"]:
        """Edges of the ``mels`` bands in Hz, equally spaced on the mel scale (HTK's formula) from 0 to half the sample rate.

        Band k lies between edges k and k + 2, with its peak at edge k + 1: there are ``mels`` + 2 edges.
        """
        highest = 2595 * math.log10(1 + self.sample_rate / 1400)
        edges: NDArray[np.float64] = 700 * (10 ** (np.linspace(0, highest, self.mels + 2) / 2595) - 1)
        return edges

    @property
    def samples(self) -> int:
        """Samples in ``seconds``."""
        return round(self.seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Frames of the spectrogram."""
        return -(-self.samples // self.hop)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.mels, self.frames)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


def _check_has_scale(modality: ImageModality | AudioModality) -> None:
    if modality.learned_scale != "none" and modality.likelihood not in ("laplace", "gaussian"):
        raise ValueError(
            f'learned_scale = "{modality.learned_scale}" needs likelihood = "laplace" or "gaussian", received '
            f'"{modality.likelihood}", which has no scale: leave learned_scale out'
        )


class TextModality(_ModalityBase):
    """A text of at most ``length`` tokens. Each token is a character, a word or a part of a word."""

    kind: Literal["text"] = "text"
    length: PositiveInt
    """Maximum number of tokens of a text. ``too_long`` says what happens to longer ones."""
    unit: Literal["character", "word", "subword"] = Field(default="character", exclude_if=lambda unit: unit == "character")
    """Unit of a token. A word is a run of letters and digits; it may contain apostrophes, hyphens and dots inside. In scripts
    without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word. Subwords are frequent
    words and parts of words, learned from the training rows (byte pair encoding); they need the autoregressive likelihood."""
    segmentation: Segmentation = Field(default="letters", exclude_if=lambda rule: rule == "letters")
    """Rule that splits a text into words. ``unicode``, the default of a configuration: Unicode's word boundaries. ``letters``,
    the rule of manifests that do not name one: combining marks and joiners separate words, and a run of letters is one word in
    every script."""
    alphabet: str = Field(default="", exclude_if=lambda alphabet: not alphabet)
    """All characters. The first one is padding and is stripped from both ends. Empty: computed from the training rows."""
    vocabulary: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), exclude_if=lambda words: not words)
    """All words. Any other word becomes the unknown token, which is never generated. Empty: computed from the training rows."""
    merges: tuple[Annotated[str, Field(pattern=r"^[^ ]+ [^ ]+$")], ...] | None = Field(
        default=None, exclude_if=lambda merges: merges is None
    )
    """Of subwords: pairs of subwords that are merged into one, the first ones first. None: computed from the training rows."""
    lowercase: bool = True
    """Whether texts are converted to lower case."""
    too_long: Literal["refuse", "cut"] = Field(default="refuse", exclude_if=lambda policy: policy == "refuse")
    """Treatment of a text with more than ``length`` tokens: reject it (``refuse``) or drop the rest (``cut``)."""
    likelihood: Literal["categorical", "shifted", "autoregressive"] = "categorical"
    """``categorical``: given z, tokens are independent of each other. ``autoregressive``: each token depends on those before it
    too, so generated sentences are readable. ``shifted`` averages the categorical likelihood over all cyclic shifts of the
    text, each equally likely. Use it if the position of a text in its field has no meaning: z need not encode it, and generated
    texts start at the left."""

    @model_validator(mode="after")
    def _check_tokens(self) -> "TextModality":
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("the alphabet names a character twice: name each once")
        if len(self.alphabet) == 1 or self.alphabet[:1] == UNKNOWN_CHARACTER:
            raise ValueError("an alphabet needs a padding character and at least one other; U+FFFD must not come first")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("the vocabulary names a word twice: name each once")
        given = {"character": self.alphabet, "word": self.vocabulary, "subword": self.merges is not None}
        if any(value for unit, value in given.items() if unit != self.unit):
            raise ValueError(
                'use an alphabet with unit = "character", a vocabulary with unit = "word" and merges with unit = "subword"'
            )
        if self.unit == "subword" and self.likelihood != "autoregressive":
            raise ValueError('unit = "subword" needs likelihood = "autoregressive": parts of a word depend on each other')
        return self

    @cached_property
    def token_ids(self) -> Mapping[str, int]:
        """Token of each character of the alphabet, or of each word of the vocabulary."""
        if self.unit == "word":
            return {word: token for token, word in enumerate(self.vocabulary, start=FIRST_WORD)}
        return {character: token for token, character in enumerate(self.alphabet) if character != UNKNOWN_CHARACTER}

    @property
    def unknown_token(self) -> int | None:
        """Token of characters or words outside the alphabet or vocabulary. None: a text that contains one is rejected, or there
        is none, as with subwords."""
        if self.unit == "word":
            return FIRST_WORD - 1
        return self.alphabet.find(UNKNOWN_CHARACTER) if UNKNOWN_CHARACTER in self.alphabet else None

    @property
    def categories(self) -> int:
        """Number of different tokens."""
        if self.unit == "subword":
            return 1 + BYTES + len(dict.fromkeys(merge.replace(" ", "") for merge in self.merges or ()))
        return len(self.vocabulary) + FIRST_WORD if self.unit == "word" else len(self.alphabet)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def dtype(self) -> type[np.generic]:
        return np.int64


class VectorModality(_ModalityBase):
    """A vector of real numbers: sensor readings, features of another model."""

    kind: Literal["vector"] = "vector"
    size: PositiveInt
    """Numbers in the vector."""
    likelihood: Literal["gaussian", "laplace"] = "gaussian"
    scale: PositiveFloat = 1.0
    """Standard deviation of the Gaussian or scale of the Laplace, in standardised units."""
    mean: tuple[float, ...] | None = None
    """Means of the training rows. None: computed from them."""
    std: tuple[PositiveFloat, ...] | None = None
    """Standard deviations of the training rows. None: computed from them. The networks receive (x - mean) / std."""

    @model_validator(mode="after")
    def _check_statistics(self) -> "VectorModality":
        for label, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.size:
                raise ValueError(f"{label} has {len(values)} numbers, the vector has {self.size}: give one for each")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


class EncodedModality(VectorModality):
    """An image or a text whose features a frozen, pretrained network computes. The model sees the feature vector only.

    A value is a picture or a text, or the feature vector itself. A generated value is a feature vector.
    """

    kind: Literal["image", "text"]  # type: ignore[assignment]  # what a value is, not how the model treats it
    encoder: str
    """The frozen encoder. In a configuration: a folder, an ONNX file, ``owner/name`` of the Hugging Face hub, or the name of an
    installed package's network. In a bundle: its name in the manifest."""
    size: NonNegativeInt = 0
    """Numbers in the feature vector. 0: as many as the encoder computes."""
    too_long: Literal["refuse", "cut"] = Field(default="refuse", exclude_if=lambda policy: policy == "refuse")
    """Treatment of a text with more tokens than the encoder reads: reject it (``refuse``) or drop the rest (``cut``)."""


class BinaryModality(_ModalityBase):
    """Named attributes, each true or false."""

    kind: Literal["binary"] = "binary"
    attributes: tuple[str, ...] = Field(min_length=1)
    """Names of the attributes, in the order of the values."""
    likelihood: Literal["bernoulli"] = "bernoulli"

    @model_validator(mode="after")
    def _check_attributes(self) -> "BinaryModality":
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError("an attribute is named twice: name each once")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.attributes),)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32


class CategoricalModality(_ModalityBase):
    """One of two or more named classes."""

    kind: Literal["categorical"] = "categorical"
    classes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names of the classes. Empty: computed from the training rows."""
    likelihood: Literal["categorical"] = "categorical"

    @model_validator(mode="after")
    def _check_classes(self) -> "CategoricalModality":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice: name each once")
        if len(self.classes) == 1:
            raise ValueError("a single class carries no information: name two or more, or leave the modality out")
        return self

    @cached_property
    def class_ids(self) -> Mapping[str, int]:
        """Index of each class."""
        return {name: index for index, name in enumerate(self.classes)}

    @cached_property
    def similar_classes(self) -> Mapping[str, tuple[str, ...]]:
        """Classes by ``fold``. More than one where classes differ in upper case or white space only."""
        similar: dict[str, tuple[str, ...]] = {}
        for name in self.classes:
            similar[fold(name)] = (*similar.get(fold(name), ()), name)
        return similar

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


def _tag(fields: object) -> object:
    """The kind of a modality; ``encoded`` if it has a frozen encoder."""
    given = fields if isinstance(fields, Mapping) else vars(fields) if isinstance(fields, BaseModel) else {}
    return "encoded" if given.get("encoder") is not None else given.get("kind")


Modality = Annotated[
    Annotated[ImageModality, Tag("image")]
    | Annotated[AudioModality, Tag("audio")]
    | Annotated[TextModality, Tag("text")]
    | Annotated[VectorModality, Tag("vector")]
    | Annotated[BinaryModality, Tag("binary")]
    | Annotated[CategoricalModality, Tag("categorical")]
    | Annotated[EncodedModality, Tag("encoded")],
    Discriminator(
        _tag,
        custom_error_type="kind",
        custom_error_message="kind must be image, audio, text, vector, binary or categorical",
    ),
]


def is_picture(modality: Modality) -> bool:
    """Whether a value of the modality is a picture, which a frozen encoder may read."""
    return isinstance(modality, ImageModality | EncodedModality) and modality.kind == "image"


def is_picture_file(modality: Modality) -> bool:
    """Whether a value of the modality is an image file."""
    return is_picture(modality) and not (isinstance(modality, ImageModality) and not modality.in_files)


def is_text(modality: Modality) -> bool:
    """Whether a value of the modality is a text, which a frozen encoder may read."""
    return isinstance(modality, TextModality | EncodedModality) and modality.kind == "text"


def fold(name: str) -> str:
    """A name without what people spell differently: upper case, white space at its ends, several spaces for one."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def propose_name(title: str, kind: str) -> str:
    """A valid modality name that resembles a title, such as the name of a column.

    Args:
        kind: of the modality. It begins the name where the title alone is not a valid one.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", title.casefold()) if not unicodedata.combining(c))
    base = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:48]
    return base if _NAME.fullmatch(base) and base not in RESERVED_NAMES else f"{kind}_{base}".rstrip("_")


def missing_statistics(modality: Modality) -> str | None:
    """Name of the field that must be computed from the training rows before a network can be built.

    Returns:
        ``classes``, ``vocabulary``, ``alphabet``, ``merges`` or ``size`` if that field is empty. None if nothing is missing.
    """
    if isinstance(modality, CategoricalModality) and not modality.classes:
        return "classes"
    if isinstance(modality, EncodedModality) and not modality.size:
        return "size"
    if isinstance(modality, TextModality) and modality.unit == "subword":
        return "merges" if modality.merges is None else None
    if isinstance(modality, TextModality) and not (modality.vocabulary or modality.alphabet):
        return "vocabulary" if modality.unit == "word" else "alphabet"
    return None


WeightRule = Literal["size", "information"]


def resolve_weights(modalities: Sequence[Modality], rule: WeightRule = "size") -> dict[str, float]:
    """Likelihood weight of each modality, by name: ``modality.weight`` if given, else that of the rule.

    Args:
        rule: ``size``: the largest array size over the size of this modality, so that all modalities count alike. For words and
            classes the size is that of the array times log(number of categories), because the plain ratio would give a single
            class a far larger weight than an image. ``information``: the square root of the largest information over the
            information of this modality, see ``information``. It lies half-way (in the logarithm) between weights of 1, with
            which an image drowns a class, and equal shares, with which a single number counts as much as all pixels.

    Source: of ``size``, the code of MoPoE (Sutter et al. 2021), which balances a 3072-value image against an 8-character word
    this way.
    """
    measure, power = (_size, 1.0) if rule == "size" else (information, 0.5)
    sizes = {modality.name: measure(modality) for modality in modalities}
    largest = max(sizes.values())
    return {m.name: m.weight if m.weight is not None else (largest / sizes[m.name]) ** power for m in modalities}


def information(modality: Modality) -> float:
    """Nats by which the best possible prediction of a value is better than a constant one, under its likelihood.

    An estimate from the description alone. Classes and attributes count as equally frequent, words and characters too. Numbers
    have the variance 1, and pixels a standard deviation of ``PIXEL_STD``, as photographs have. Numbers of a vector, and pixels,
    count as independent.
    """
    values = math.prod(modality.shape)
    match modality:
        case TextModality() | CategoricalModality():
            return values * math.log(modality.categories)
        case BinaryModality():
            return values * math.log(2)
        case ImageModality(likelihood="bernoulli") | AudioModality(likelihood="bernoulli"):
            return values * 2 * PIXEL_STD**2  # KL(Bernoulli(x) || Bernoulli(1/2)) to second order
        case ImageModality(likelihood="logistic_mixture"):
            return values * math.log(PIXEL_STD * PIXEL_LEVELS)  # from the spread of the data to a single level
    std = PIXEL_STD if isinstance(modality, ImageModality | AudioModality) else 1.0
    if modality.likelihood == "gaussian":
        return values * 0.5 * (std / modality.scale) ** 2
    return values * math.sqrt(2 / math.pi) * std / modality.scale  # the mean distance of normal values from their mean


def _size(modality: Modality) -> float:
    size = math.prod(modality.shape)
    if isinstance(modality, CategoricalModality) or (isinstance(modality, TextModality) and modality.unit != "character"):
        return size * math.log(modality.categories)
    return float(size)


def check_array(modality: Modality, array: NDArray[Any]) -> None:
    """Check that an array is one row of the modality: (*modality.shape) of ``modality.dtype``, values in range.

    Raises:
        ValueError: the shape or dtype is wrong, or a value is out of range or not finite.
    """
    expected = np.dtype(modality.dtype)
    if array.shape != modality.shape or array.dtype != expected:
        raise ValueError(
            f"{modality.name}: received shape {array.shape} of {array.dtype}, a row has shape {modality.shape} of {expected}"
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
    """Stack rows into one batch per modality and a mask of the modalities that each row has.

    Args:
        rows: one mapping per row, from modality name to its array (*modality.shape). A missing name is an absent modality.

    Returns:
        the arrays (batch, *modality.shape) by name, zeros where absent; and ``present`` (batch, modality), whose columns have
        the order of ``modalities``.
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
