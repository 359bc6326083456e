"""The configuration of a run: its tables, and what must agree among them. ``config_file`` reads one."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from model.modality import ImageModality, Modality, TextModality
from model.vae.posterior import Fusion
from training.room import MOST_BYTES


class ConfigError(Exception):
    """A configuration that must not run. The message names the file and every place that is wrong."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hub(_Table):
    """A data set on the Hugging Face hub."""

    hub: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    config: str | None = None
    split: str
    revision: str | None = None
    """Commit or tag. None: the newest, so that a later run may see other data."""


def _place_kind(value: object) -> str:
    return "Hub" if isinstance(value, dict | Hub) else "Path"


Place = Annotated[Annotated[str, Tag("Path")] | Annotated[Hub, Tag("Hub")], Discriminator(_place_kind)]
"""A Parquet file, a folder with one folder of images a class, or a data set on the hub. Paths start in the data folder."""


class Source(_Table):
    """One table of rows, and which of its columns hold which modalities."""

    train: Place
    test: Place | None = None
    """None: ``train`` holds both, and ``split`` or ``held_out`` parts them."""
    split: str | None = None
    """Column that says "train" or "test" of each row."""
    held_out: float | None = Field(default=None, gt=0, le=0.5)
    """Share of the rows that are tested on and not trained on, drawn once and for all."""
    columns: dict[str, str | tuple[str, ...]] = Field(min_length=1)
    """Modality name -> column name; several columns of single numbers make up one vector or one set of attributes."""
    label: str | None = None
    """Column of the class of each row."""
    licence: str

    @model_validator(mode="after")
    def _split_is_clear(self) -> "Source":
        ways = [name for name in ("test", "split", "held_out") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(
                "the test rows come from exactly one of test (a file of their own), split (a column) and held_out (a share); "
                f"received {' and '.join(ways) or 'none'}"
            )
        return self


class Data(_Table):
    """Where rows come from and how modalities of different sources meet in one row."""

    folder: Path = Path("data")
    """Relative to the working directory; ``--data`` and ``CONCORD_DATA`` come before it."""
    pairing: Literal["row", "class"]
    """row: the rows of the one source. class: rows of the first source, each with random rows of the others of its class."""
    random_offset: tuple[str, ...] = ()
    """Text modalities placed at random inside their length, anew each epoch."""
    random_flip: tuple[str, ...] = ()
    """Image modalities mirrored left to right in half of the rows, drawn anew each epoch."""
    random_shift: dict[str, PositiveInt] = Field(default={})
    """Image modalities moved by up to so many pixels in each direction, drawn anew each epoch."""
    rows: Literal["all", "complete"] = "all"
    """Training rows: all with what each has, or only those that lack nothing. All test rows are tested on either way."""
    class_names: tuple[str, ...] | None = None
    """In the order of the label numbers. None: the names that the sources give."""
    rows_per_epoch: PositiveInt | None = None
    """Training rows an epoch takes, drawn anew each time. None: all."""
    bad_values: Literal["fail", "absent"] = "fail"
    """A value that cannot be read ends the run before it begins, or counts as absent, with a warning."""
    max_vocabulary: PositiveInt = 2000
    """Words that a text learns at most, the most frequent ones."""
    memory_mb: PositiveInt = MOST_BYTES >> 20
    """Decoded values of one modality that take more lie in a file in ``TMPDIR``, and training reads its batches from there."""
    sources: tuple[Source, ...] = Field(min_length=1)

    @property
    def most_bytes(self) -> int:
        """``memory_mb`` in bytes."""
        return self.memory_mb << 20


class Network(_Table):
    """Sizes of encoders and decoders."""

    latent: PositiveInt = 32
    features: PositiveInt = 256
    width: PositiveInt = 32
    hidden: PositiveInt = 512
    fusion: Fusion = "set"
    """Of the aligned encoder of ``concord``. set: one network for every subset. product: of an expert for each modality."""


class Objective(_Table):
    beta: PositiveFloat = 1.0
    """Weight of the KL term of the ELBO."""


class Stage(_Table):
    """What every stage of training has."""

    epochs: PositiveInt
    batch_size: PositiveInt = 256
    learning_rate: PositiveFloat = 1e-3
    """Highest of the stage: it rises over the first steps and falls to zero along a cosine."""
    weight_decay: float = Field(default=0, ge=0)
    """Share of every weight lost a step, times the learning rate (Loshchilov & Hutter 2019): for few rows, against learning
    them by heart."""
    accumulate: PositiveInt = 1
    """Passes that a batch is shared between, one after the other, where it does not fit into memory at once."""


class Joint(Stage):
    """Stage 1: the joint VAE."""

    epochs: PositiveInt = 10


class Refiner(Stage):
    """Stage 2: the refiner of the joint posterior, beside the VAE."""

    epochs: PositiveInt = 2
    steps: NonNegativeInt = 4
    """Refinement steps of every batch, in this stage and in the next. 0: the joint posterior itself teaches, and the decoders
    learn from two samples of it, as often as they would from both."""
    samples: int = Field(default=2, ge=2, multiple_of=2)
    """Noise samples a step while training, in antithetic pairs."""
    serving_samples: int = Field(default=4, ge=2, multiple_of=2)
    """The same in the bundle, where fewer rows can pay for steadier steps."""


Divergence = Literal["forward", "reverse", "both", "none"]


class Align(Stage):
    """Stage 3: the encoder of every subset, taught by the refined posterior, beside both."""

    epochs: PositiveInt = 5
    reconstruction: float = Field(default=0.2, ge=0)
    """Weight of reconstructing all modalities from a sample of a random subset's posterior, against the joint ELBO."""
    reconstruction_teaches: Literal["all", "encoder"] = "all"
    """all: decoders learn from it too, and blur what a subset leaves open. encoder: only the aligned encoder does, to keep to
    what the decoders know."""
    several: float = Field(default=0.1, gt=0)
    """Weight of aligning a subset of several modalities against a single one. Low, the trunks see what each modality tells
    alone; high, they see the details that only several together make certain."""
    pull: float = Field(default=0.1, ge=0)
    """Weight of KL(q(z | X) || q(z | x_m)) of each single modality, both sides learning, as in JMVAE-kl (Suzuki et al. 2017,
    equation 6): the joint encoder keeps to what each modality can tell. 0: only the students move."""
    divergence: Divergence = "forward"
    """forward: KL(teacher || student), which covers all that the teacher allows. reverse: KL(student || teacher), which keeps
    to where the teacher is sure. both: their mean. none: no teacher; what is drawn to reconstruct learns by its own ELBO, of
    all modalities, and ``pull`` wants to be 0."""

    @model_validator(mode="after")
    def _students_learn(self) -> "Align":
        if self.divergence == "none" and not self.reconstruction:
            raise ValueError('divergence = "none" leaves students to reconstruction: give that a weight above 0')
        return self


class Refresh(Stage):
    """Stage 4: the refiner alone, from aligned posteriors of all subsets as the service starts, beside networks that have come
    to rest. Its steps fit the decoders of stage 2, and the more epochs stage 3 takes the less they fit any more."""

    epochs: NonNegativeInt = 0
    steps: PositiveInt | None = None
    """Refinement steps of every batch. None: as many as the refiner's."""


class Flow(Stage):
    """Stage 5: a flow alone, to draw samples through, taught by the refined posterior of all modalities around the posterior of
    every subset. A Gaussian of few modalities has to choose between covering all that fits and being coherent.
    """

    epochs: NonNegativeInt = 0
    couplings: PositiveInt = 8
    spread: float = Field(default=1.0, gt=0, le=1)
    """Standard deviation of the noise that samples begin with; it learns with 1. Below, samples are more coherent and less
    diverse, as with a lower temperature."""


Model = Literal["concord", "jmvae", "mvae", "mmvae", "mopoe", "mvtcae", "jnf"]


class Config(_Table):
    """A whole run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    version: str = Field(default="1", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    model: Model = "concord"
    """Ours, or a rival on the same terms (``baselines``)."""
    seed: NonNegativeInt = 0
    threads: PositiveInt | None = None
    """Of PyTorch. None: as many as the process may use cores. Other numbers of threads round otherwise."""
    precision: Literal["bfloat16", "float32"] = "float32"
    modalities: tuple[Modality, ...] = Field(min_length=2, max_length=8)
    data: Data
    network: Network = Network()
    objective: Objective = Objective()
    joint: Joint = Joint()
    refiner: Refiner = Refiner()
    align: Align = Align()
    refresh: Refresh = Refresh()
    flow: Flow = Flow()

    @property
    def epochs(self) -> int:
        """Of the stages that encoders and decoders learn in."""
        return self.joint.epochs + self.refiner.epochs + self.align.epochs

    @property
    def horizon(self) -> int:
        """Refinement steps that the refiner was taught last, 0 where it never was."""
        again = self.refresh.steps if self.refresh.epochs else None
        return (again or self.refiner.steps) if self.refiner.steps else 0

    @property
    def thread_count(self) -> int:
        """``threads``, counted."""
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def sha256(self) -> str:
        """Of all that is not the default: two files that mean the same have the same hash, and an option that came later, and
        is not used, changes none. The bundle's version trains nothing, and what only ours has is not in a rival's."""
        content = self.model_dump(mode="json", exclude_defaults=True, exclude={"version"})
        if self.model != "concord":
            for own in ("refresh", "flow"):
                content.pop(own, None)
            for stage in {"refiner", "align"} & content.keys():
                shared = {name: value for name, value in content.pop(stage).items() if name in Stage.model_fields}
                content |= {stage: shared} if shared else {}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def _parts_agree(self) -> "Config":
        names = [m.name for m in self.modalities]
        if len(set(names)) != len(names):
            raise ValueError(f"[[modalities]] names one twice: {names}")
        fed = Counter(name for source in self.data.sources for name in source.columns)
        if unknown := set(fed) - set(names):
            raise ValueError(f"[[data.sources]] columns name {sorted(unknown)}, the modalities are {names}")
        if wrong := [name for name in names if fed[name] != 1]:
            counts = ", ".join(f"{name} has {fed[name]}" for name in wrong)
            raise ValueError(f"each modality needs exactly one column among [[data.sources]]: {counts}")
        texts = [m.name for m in self.modalities if isinstance(m, TextModality)]
        if wrong := [name for name in self.data.random_offset if name not in texts]:
            raise ValueError(f"data.random_offset names {wrong}, the text modalities are {texts}")
        images = [m.name for m in self.modalities if isinstance(m, ImageModality)]
        for key in ("random_flip", "random_shift"):
            if wrong := [name for name in getattr(self.data, key) if name not in images]:
                raise ValueError(f"data.{key} names {wrong}, the image modalities are {images}")
        if self.data.pairing == "row" and len(self.data.sources) > 1:
            raise ValueError(
                f'data.pairing = "row" takes the rows of one source, received {len(self.data.sources)}: '
                'join them into one file, or pair by "class"'
            )
        if self.data.pairing == "class" and any(source.label is None for source in self.data.sources):
            raise ValueError('data.pairing = "class" needs a label column in every [[data.sources]]')
        return self
