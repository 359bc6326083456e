"""Descriptions of frozen encoders: pretrained networks that compute the feature vector of a picture or a text.

A description is data, not code: the input of the graph, how a file becomes that input, and how the graph's output becomes one
vector. It is ``encoder.json`` next to an ONNX file, and a part of the manifest of a bundle.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, PositiveInt, model_validator

MAX_SIDE = 2048
"""Largest height and width in pixels of a network's input."""
MAX_TOKENIZER_BYTES = 32 << 20
"""Largest tokenizer.json."""
PIXELS = "pixels"
"""Name of the input of a graph of pictures, float32 (batch, 3, height, width)."""
TOKENS, MASK, TOKEN_TYPES = "input_ids", "attention_mask", "token_type_ids"
"""Names of the inputs of a graph of texts, int64 (batch, tokens). A graph may lack the last one, or the last two."""
ENCODER_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImagePreprocessing(_Strict):
    """How a picture becomes the input of a network: RGB, resized, cropped, divided by 255, (x - mean) / std."""

    kind: Literal["image"] = "image"
    height: int = Field(ge=2, le=MAX_SIDE)
    """Pixels of the network's input."""
    width: int = Field(ge=2, le=MAX_SIDE)
    """Pixels of the network's input."""
    resize: PositiveInt | None = None
    """Pixels of the picture's shorter side before the centre of height x width is cut out. None: as small as possible."""
    stretch: bool = False
    """Whether the whole picture is scaled to height x width. Its aspect ratio changes. Nothing is cut off then."""
    resampling: Literal["bilinear", "bicubic"] = "bicubic"
    """Filter of the resizing, with antialiasing."""
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.0, 0.0, 0.0)
    """Of red, green and blue, in [0, 1]."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0)
    background: Literal["black", "white"] = "white"
    """Colour behind transparent pixels."""

    @property
    def channels(self) -> int:
        """The input is RGB."""
        return 3

    @model_validator(mode="after")
    def _check_resize(self) -> "ImagePreprocessing":
        if self.resize is not None and (self.stretch or self.resize < min(self.height, self.width)):
            raise ValueError(f"resize is {self.resize}: leave it out with stretch, else it is at least the shorter side")
        return self


class TextPreprocessing(_Strict):
    """How a text becomes the input of a network: the tokens of a tokenizer.json."""

    kind: Literal["text"] = "text"
    length: int = Field(ge=3, le=8192)
    """Tokens that the network reads at most, with those that the tokenizer adds."""
    prefix: str = Field(default="", max_length=200)
    """Text in front of every text, such as the ``query: `` of E5."""
    pad: int = Field(default=0, ge=0)
    """Token of the padding. It is masked."""


Preprocessing = Annotated[ImagePreprocessing | TextPreprocessing, Field(discriminator="kind")]


class EncoderDescription(_Strict):
    """One frozen encoder, without its files.

    The output of the graph has one vector for each row (batch, size), or more than one: (batch, tokens, size) of a text,
    (batch, patches, size) or (batch, size, height, width) of a picture. ``pooling`` makes one of them.
    """

    preprocessing: Preprocessing
    pooling: Literal["none", "mean", "first"] = "none"
    """none: the graph returns one vector. mean: their mean, without padding. first: the first one, as of a class token."""
    normalize: bool = False
    """Whether the vector is divided by its Euclidean length."""
    output: str | None = None
    """Name of the graph's output. None: the first one."""
    licence: str = "not stated"
    """Of the network. It applies to bundles that contain it."""
    origin: str = "not stated"
    """Where the network comes from: a package, an address, a publication."""


class Encoder(EncoderDescription):
    """One frozen encoder of a bundle."""

    size: PositiveInt
    """Numbers of a feature vector."""
    graph: str
    """Name of the file of the ONNX graph, which contains its weights."""
    tokenizer: str | None = None
    """Name of the file of the tokenizer, of a network of texts."""

    @model_validator(mode="after")
    def _check_tokenizer(self) -> "Encoder":
        if (self.tokenizer is not None) != isinstance(self.preprocessing, TextPreprocessing):
            raise ValueError("a network of texts has a tokenizer, and no other network has one")
        return self


@dataclass(frozen=True)
class EncoderFiles:
    """A frozen encoder on disk, in training.

    Attributes:
        name: in a bundle.
        graph: file of the ONNX graph, which contains its weights.
        tokenizer: file of the tokenizer, of an encoder of texts.
        size: numbers of a feature vector.
        sha256: hash of graph, tokenizer and description.
    """

    name: str
    description: EncoderDescription
    graph: Path
    tokenizer: Path | None
    size: int
    sha256: str

    def in_bundle(self) -> Encoder:
        """Its description in a manifest."""
        return Encoder(
            **dict(self.description),
            size=self.size,
            graph=f"encoder-{self.name}.onnx",
            tokenizer=None if self.tokenizer is None else f"tokenizer-{self.name}.json",
        )
