"""The configuration of a run as pydantic models. ``config_file`` reads one from a TOML file."""

import hashlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

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

from concord.model.gallery import MAX_ROWS
from concord.model.modality import (
    MAX_MODALITIES,
    AudioModality,
    EncodedModality,
    ImageModality,
    Modality,
    TextModality,
    WeightRule,
    is_picture_file,
    is_text,
)

DEVICES = r"^(auto|cpu|cuda|cuda:\d{1,2}|mps)$"
"""Names of devices."""
RENAMED_KEYS = {"align": {"several": "multimodal_weight", "pull": "jmvae_weight"}}
"""Table -> deprecated key -> its name now. Version 0.2 accepts the deprecated keys, the next version rejects them."""
_log = logging.getLogger(__name__)


def rename_keys(tables: dict[str, Any], source: str) -> dict[str, Any]:
    """Return ``tables`` with the deprecated keys renamed, and log a warning for each.

    Args:
        tables: a configuration, as read from TOML or JSON.
        source: where they come from, for the messages.

    Raises:
        ValueError: a key is given under its deprecated and its new name.
    """
    renamed = dict(tables)
    for table, keys in RENAMED_KEYS.items():
        values = renamed.get(table)
        if not isinstance(values, dict):
            continue
        for old, new in keys.items():
            if old not in values:
                continue
            if new in values:
                raise ValueError(f"{table}.{old} is the deprecated name of {table}.{new}, both are given: remove {table}.{old}")
            _log.warning("%s: %s.%s is deprecated: rename it to %s.%s", source, table, old, table, new)
            values = {new if key == old else key: value for key, value in values.items()}
        renamed[table] = values
    return renamed


def _environment_threads(processes: int) -> int | None:
    """Return ``OMP_NUM_THREADS``, or None if it is not set.

    torchrun sets it to 1 for each of several processes if the user does not set it, so 1 counts as not set there.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # OpenMP: a number for each level of nesting
    number = int(first) if first.isascii() and first.isdigit() else 0
    return None if number == 0 or (number == 1 and processes > 1) else number


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hub(_Table):
    """A data set on the Hugging Face hub."""

    hub: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Name of the data set: owner/name."""
    config: str | None = None
    """Configuration of the data set, if it has several."""
    split: str
    """Split of the data set."""
    revision: str | None = None
    """Commit or tag. None: the newest revision, so a later run may read other data."""


def _place_kind(value: object) -> str:
    return "Hub" if isinstance(value, dict | Hub) else "Path"


Place = Annotated[Annotated[str, Tag("Path")] | Annotated[Hub, Tag("Hub")], Discriminator(_place_kind)]
"""A Parquet file, a folder with one folder of images per class, or a data set on the hub. Paths are relative to the data
folder."""


class Source(_Table):
    """One table of rows, and the columns that hold the modalities."""

    train: Place
    """A Parquet file, a folder with one folder of images per class, or a table ``hub``. Relative to the data folder, or the
    address of a Parquet file in an object store: s3://bucket/key."""
    test: Place | None = None
    """The test rows, in the same forms. None: ``train`` holds both splits, separated by ``split`` or ``held_out``."""
    split: str | None = None
    """Column with "train" or "test" in each row. If no row has "test", the test rows are those with "validation", or else
    "valid", "val" or "dev"."""
    where: dict[str, str] = Field(default={})
    """Column -> value. Only rows that hold these values are used: strings, or names of classes."""
    held_out: float | None = Field(default=None, gt=0, le=0.5)
    """Share of the rows used as test rows. The random choice is the same in every run."""
    columns: dict[str, str | tuple[str, ...]] = Field(min_length=1)
    """Modality name -> column name. Several numeric columns form one vector or one set of attributes."""
    label: str | None = None
    """Column with the class of each row, for ``pairing = "class"`` and the linear probe. It is never an input."""
    licence: str
    """Licence of the data. It is shown on the model card and applies to the weights too."""

    @model_validator(mode="after")
    def _one_source_of_test_rows(self) -> "Source":
        ways = [name for name in ("test", "split", "held_out") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(
                "the test rows come from exactly one of test (a separate file), split (a column) and held_out (a share); "
                f"received {' and '.join(ways) or 'none'}"
            )
        return self


class Data(_Table):
    """Where rows come from, and how modalities of different sources are combined into rows."""

    folder: Path = Path("data")
    """Folder of the data, relative to the working directory. ``--data`` and ``CONCORD_DATA`` override it."""
    pairing: Literal["row", "class"]
    """row: the rows of a single source. class: each row of the first source with random rows of the others of its class."""
    random_offset: tuple[str, ...] = ()
    """Text modalities that start at a random position within their length, sampled in every epoch."""
    average_texts: tuple[str, ...] = ()
    """Text modalities with a frozen encoder whose rows have several texts. Training takes the mean of the features of a random
    number of a row's texts, sampled in every epoch, from one to all. Others: of one text."""
    random_flip: tuple[str, ...] = ()
    """Image modalities that are mirrored left to right in half of the rows, sampled in every epoch."""
    random_shift: dict[str, PositiveInt] = Field(default={})
    """Image modalities that are shifted by up to this many pixels in each direction, and audio modalities that are shifted in
    time by up to this many frames, sampled in every epoch."""
    random_contrast: dict[str, PositiveFloat] = Field(default={})
    """Audio modalities whose decibels below the loudest value are multiplied by a factor from exp(-x) to exp(x), sampled in
    every epoch. The level of the background noise then depends less on the speaker."""
    word_dropout: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(default={})
    """Text modalities with the autoregressive likelihood, and the share of their tokens that the decoder does not see when it
    predicts the next ones, sampled in every epoch (Bowman et al. 2016). Higher: the decoder relies more on z."""
    other_texts: tuple[str, ...] = ()
    """Text modalities with the autoregressive likelihood whose decoder predicts another text of the row than the encoder reads,
    sampled in every epoch. z then holds what the texts of a row share, and not the wording of one. Rows with a single text
    predict that."""
    rows: Literal["all", "complete"] = "all"
    """Training rows. all: every row, with the modalities it has. complete: rows with all modalities. The test split always has
    all rows."""
    subset_balance: float = Field(default=0.0, ge=0, le=1)
    """How often training sees rows by their subset of modalities, with ``pairing = "row"``. 0: every row once in each epoch. 1:
    every subset equally often, so rows of rare subsets are repeated. Between: in proportion to the number of its rows to the
    power of 1 - ``subset_balance``. An epoch has the same length."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of the label numbers. None: the names in the sources."""
    rows_per_epoch: PositiveInt | None = None
    """Training rows per epoch, sampled in every epoch. None: all rows."""
    bad_values: Literal["fail", "absent"] = "fail"
    """Treatment of unreadable values. fail: the run stops before training. absent: they count as absent, with a warning."""
    max_vocabulary: PositiveInt = 2000
    """Largest vocabulary of a text modality. The most frequent words, or subwords, are kept."""
    memory_mb: PositiveInt = 4096
    """Parsed values of one modality above this size are kept in a memory-mapped file in ``TMPDIR``."""
    cache: Path | None = None
    """Folder where parsed columns are kept for later runs on the same file. Relative to the working directory.
    ``CONCORD_CACHE`` overrides it. None: only frozen encoders and their features are kept, in runs/cache."""
    shards: bool = False
    """Under torchrun, whether each process reads and parses every n-th row group of the Parquet file of training rows only.
    Its part of each batch then comes from these rows, so another number of processes trains on other batches. false: each
    process reads all rows, and the result is that of a single process."""
    sources: tuple[Source, ...] = Field(min_length=1)

    @property
    def max_bytes(self) -> int:
        """``memory_mb`` in bytes."""
        return self.memory_mb << 20


class Network(_Table):
    """Sizes of encoders and decoders."""

    latent: PositiveInt = 32
    """Dimensions of z, and of the embedding."""
    features: PositiveInt = 256
    """Outputs of the network that reads one modality."""
    width: PositiveInt = 32
    """Channels of the first convolution of an image network. Deeper ones have a multiple."""
    blocks: NonNegativeInt = 0
    """Residual blocks at each resolution of image encoders and decoders, two convolutions each. More: a lower error
    of pictures if there are many rows, and longer training."""
    hidden: PositiveInt = 512
    """Units of the hidden layers of fully connected networks."""
    encoders: Literal["deep", "shallow"] = "deep"
    """Layers of the encoders. deep: numbers, attributes, classes and characters pass two layers, and the fusion has two hidden
    layers. shallow: one layer and a linear fusion, which overfit less: for features of frozen networks, and for few rows."""
    fusion: Literal["set", "product"] = "set"
    """Fusion of the aligned encoder of ``concord``. set: one network for every subset. product: a product of experts."""


class Objective(_Table):
    """The training objective."""

    beta: PositiveFloat = 1.0
    """Weight of the KL term of the ELBO."""
    weights: WeightRule = "size"
    """Likelihood weights of modalities without ``weight``. size: the largest array size over the size of this modality, where a
    word or a class counts as the logarithm of the number of choices; a single number then counts as much as all pixels.
    information: the square root of the same ratio of nats that can be known of a value; images, texts, classes and numbers
    then count less if they carry less information."""


class Stage(_Table):
    """Settings that every stage of training has."""

    epochs: PositiveInt
    """Passes over the training rows, or over ``data.rows_per_epoch`` of them. 0 leaves a stage out, where it is allowed."""
    batch_size: PositiveInt = 256
    """Rows of one optimiser step, in all processes together."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate: linear warm-up, then cosine decay to zero."""
    weight_decay: float = Field(default=0, ge=0)
    """Decoupled weight decay (Loshchilov & Hutter 2019). With few rows it reduces overfitting."""
    accumulate: PositiveInt = 1
    """Micro-batches per batch and process, computed one after the other, for batches that exceed the memory."""


class Joint(Stage):
    """Stage 1: the joint VAE."""

    epochs: PositiveInt = 10


class Refiner(Stage):
    """Stage 2: the refiner of the joint posterior, together with the VAE."""

    epochs: PositiveInt = 2
    steps: NonNegativeInt = 4
    """Refinement steps in this stage and of the teacher in the next stage. 0: the teacher is the joint posterior without
    refinement. The decoders then train on two samples of it, so they get the same number of updates."""
    samples: int = Field(default=2, ge=2, multiple_of=2)
    """Noise samples per step in training, in antithetic pairs."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the rows of each batch that this stage and ``align`` refine, chosen at random. Below 1, only they train the
    refiner and the aligned encoder, and all other rows train at their joint posterior. Steps then take less time, and the terms
    of the loss vary more around the same mean."""
    serving_samples: int = Field(default=4, ge=2, multiple_of=2)
    """Noise samples per step in the bundle, in antithetic pairs. Requests have few rows, so more samples are affordable."""


Divergence = Literal["forward", "reverse", "both", "none"]


class Contrast(Stage):
    """Stage 3: contrastive learning of the aligned encoder alone, on rows with at least two modalities.

    ``align`` continues with its weights, and with the same loss if ``align.contrast_weight`` is set. Model ``contrastive`` uses
    these settings too.
    """

    epochs: NonNegativeInt = 0
    batch_size: PositiveInt = 512
    """As in every stage. All rows of a batch are negatives of each other, so more rows make the task harder."""
    temperature: PositiveFloat = 0.1
    """Divides the cosine similarity of embeddings. Lower: nearer rows matter more."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Share of the inputs of vectors and attributes, and of the features of every modality, that are dropped in this loss."""
    prediction: float = Field(default=0.0, ge=0)
    """Weight of predicting the classes, attributes and numbers of a row from the embedding of each other modality, relative to
    contrastive learning. It trains the aligned encoder and the decoders of these modalities. Concord only."""
    multimodal_weight: float = Field(default=0.0, ge=0)
    """Weight of the embedding of several modalities, relative to those of single ones: it has to find, and to predict, the
    modality that it lacks. Classes and numbers are then predicted from each other, too. 0: only ``align`` trains embeddings of
    several modalities. Concord only."""


class Align(Stage):
    """Stage 4: the encoder of every subset, trained on the refined joint posterior, together with VAE and joint encoder."""

    epochs: PositiveInt = 5
    reconstruction: float = Field(default=0.2, ge=0)
    """Weight of reconstructing all modalities from the posterior of a random subset, relative to the joint ELBO."""
    reconstruction_teaches: Literal["all", "encoder"] = "all"
    """Networks that the reconstruction term trains. all: decoders and aligned encoder; samples become more coherent and more
    blurred. encoder: the aligned encoder only."""
    multimodal_weight: float = Field(default=0.1, gt=0)
    """Weight w_S of the alignment of a subset of several modalities; that of a single modality is 1. Low: the encoders learn
    what each modality says about the class. High: they learn details that only several modalities together determine."""
    jmvae_weight: float = Field(default=0.1, ge=0)
    """Weight of the JMVAE term, sum_m KL(q(z | X) || q(z | x_m)) (Suzuki et al. 2017, equation 6). It trains both encoders and
    keeps the joint posterior close to the unimodal ones. 0: only the aligned encoder is trained."""
    divergence: Divergence = "forward"
    """Alignment of the student (a subset's posterior) with the teacher (the refined joint posterior). forward: KL(teacher ||
    student), mass-covering. reverse: KL(student || teacher), mode-seeking. both: their mean. none: no teacher; the posterior of
    a random subset is trained on the ELBO of all modalities. Set ``jmvae_weight`` to 0 with none."""
    contrast_weight: float = Field(default=0.0, ge=0)
    """Weight of contrastive learning, on separate batches (``[contrast]``), relative to the alignment. 0: none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of vectors and attributes, and of the features of every modality, that the student does not see."""

    @model_validator(mode="before")
    @classmethod
    def _accept_deprecated_keys(cls, values: Any) -> Any:
        return rename_keys({"align": values}, "configuration")["align"]

    @model_validator(mode="after")
    def _students_have_a_loss(self) -> "Align":
        if self.divergence == "none" and not self.reconstruction:
            raise ValueError('divergence = "none" trains students by reconstruction only: set reconstruction above 0')
        return self


class Refresh(Stage):
    """Stage 5: the refiner only, with all other networks fixed. It starts from the aligned posteriors of all subsets, as
    requests do. The refiner of stage 2 was trained with earlier decoders: the longer stage 4, the more stage 5 improves it."""

    epochs: NonNegativeInt = 0
    steps: PositiveInt | None = None
    """Refinement steps of every batch. None: ``refiner.steps``."""


class Flow(Stage):
    """Stage 6: a normalising flow that transforms samples, with all other networks fixed.

    It is trained on samples of the refined joint posterior, conditioned on the posterior of every subset. A Gaussian of few
    modalities is either broad or coherent. A flow can be both.
    """

    epochs: NonNegativeInt = 0
    couplings: PositiveInt = 8
    """Affine coupling layers."""
    spread: float = Field(default=1.0, gt=0, le=1)
    """Standard deviation of the base noise at sampling. Training uses 1. Smaller values make samples more coherent and less
    diverse, like a lower temperature."""
    prior: bool = False
    """Whether the flow also learns how z of all training rows together are distributed, given N(0, I) as the posterior.
    Evaluation then takes samples of the prior from it."""


class Validation(_Table):
    """Early stopping. Off by default: the learning rate decays to zero, so with many rows the last weights are the best."""

    rows: NonNegativeInt = 0
    """Training rows that are held out of training, the same in every run. After each epoch every stage measures its objective
    on them, and it ends with the weights of its best epoch. 0: no validation. The statistics of preprocessing include these
    rows."""
    patience: PositiveInt | None = None
    """Epochs without a better objective after which a stage ends early. None: every stage runs all its epochs."""

    @model_validator(mode="after")
    def _patience_needs_rows(self) -> "Validation":
        if self.patience is not None and not self.rows:
            raise ValueError("patience needs held-out rows: set validation.rows, for example to a tenth of the training rows")
        return self


class GallerySettings(_Table):
    """Training examples of one modality that ``export`` puts into the bundle. They have no influence on training.

    The bundle then contains training data: everyone who can send requests, or who has the bundle, can see it.
    """

    ids: str | None = None
    """Column of the data source with the id of each row: texts or integers. None: the number of the row in the file."""
    values: bool = False
    """Whether the bundle also has the values: thumbnails of pictures, or texts. false: ids only."""
    side: int = Field(default=64, ge=16, le=256)
    """Height and width in pixels of a thumbnail, which is cut out of the centre of the picture."""
    rows: int = Field(default=10_000, ge=1, le=MAX_ROWS)
    """Largest number of rows, sampled from the training rows that have the modality."""


STAGES = ("joint", "refiner", "contrast", "align", "refresh", "flow")
"""Tables of the configuration, in the order of training."""
Model = Literal["concord", "jmvae", "mvae", "mmvae", "mopoe", "mvtcae", "jnf", "contrastive"]
DEFAULT_MODEL: Model = "concord"


class Config(_Table):
    """A complete run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the model: lower-case letters, digits, - and _."""
    version: str = Field(default="1", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    """Version of the bundle: letters, digits, ., - and _."""
    model: Model = DEFAULT_MODEL
    """Concord, or a baseline with the same networks for each modality, likelihoods, beta, epochs and seed."""
    seed: NonNegativeInt = 0
    """Seed of all random numbers of training."""
    threads: PositiveInt | None = None
    """Threads of PyTorch. None: the environment variable ``OMP_NUM_THREADS``, or else the number of available cores. Another
    number of threads changes rounding."""
    device: str = Field(default="auto", pattern=DEVICES)
    """auto, cpu, cuda, cuda:N or mps. auto: the first GPU if PyTorch finds one, else the CPU. ``--device`` overrides it. A run
    may continue on another device; the numbers then differ by rounding."""
    precision: Literal["bfloat16", "float32"] = "float32"
    """Number format of matrix products and convolutions. Weights and sums are always float32. bfloat16 has no effect on a
    device that would emulate it."""
    modalities: tuple[Modality, ...] = Field(min_length=2, max_length=MAX_MODALITIES)
    data: Data
    network: Network = Network()
    objective: Objective = Objective()
    joint: Joint = Joint()
    refiner: Refiner = Refiner()
    contrast: Contrast = Contrast()
    align: Align = Align()
    refresh: Refresh = Refresh()
    flow: Flow = Flow()
    validation: Validation = Validation()
    gallery: dict[str, GallerySettings] = Field(default={})
    """Training examples in the bundle, by modality. Left out: none."""

    def override(
        self,
        *,
        seed: int | None = None,
        epochs: int | None = None,
        rows_per_epoch: int | None = None,
        device: str | None = None,
    ) -> "Config":
        """Return the configuration with some values replaced, as if they were in the file.

        Args:
            seed: replaces ``seed``.
            epochs: replaces ``epochs`` in every stage that the configuration does not leave out.
            rows_per_epoch: replaces ``data.rows_per_epoch``.
            device: replaces ``device``.
        """
        changes: dict[str, Any] = {} if seed is None else {"seed": seed}
        if device is not None:
            changes["device"] = device
        if rows_per_epoch is not None:
            changes["data"] = self.data.model_copy(update={"rows_per_epoch": rows_per_epoch})
        if epochs is not None:
            stages: dict[str, Stage] = {name: getattr(self, name) for name in STAGES}
            changes |= {name: stage.model_copy(update={"epochs": epochs}) for name, stage in stages.items() if stage.epochs}
        return self.model_copy(update=changes)

    @property
    def epochs(self) -> int:
        """Epochs of the stages that train encoders and decoders."""
        return self.joint.epochs + self.refiner.epochs + self.align.epochs

    @property
    def horizon(self) -> int:
        """Refinement steps of the last stage that trains the refiner, 0 if no stage does."""
        refresh_steps = self.refresh.steps if self.refresh.epochs else None
        return (refresh_steps or self.refiner.steps) if self.refiner.steps else 0

    @property
    def thread_count(self) -> int:
        """Threads of a single process, see ``threads_per_process``."""
        return self.threads_per_process(1)

    def threads_per_process(self, processes: int) -> int:
        """Return ``threads``, or else ``OMP_NUM_THREADS``, or else an equal share of the available cores.

        Args:
            processes: that train on this machine together.
        """
        return self.threads or _environment_threads(processes) or max(1, len(os.sched_getaffinity(0)) // processes)

    @property
    def sha256(self) -> str:
        """Hash of the settings that differ from their defaults and influence training.

        Files with the same meaning have the same hash, and a new option does not change the hash of files without it.
        ``version`` and ``gallery`` concern the bundle only, and a run may continue on another ``device`` or with other
        micro-batches (``accumulate``). Settings of Concord only are left out for baselines.
        """
        content = self.model_dump(
            mode="json", exclude_defaults=True, exclude={"version": True, "device": True, "gallery": True, "data": {"cache"}}
        )
        for stage in STAGES:
            content.get(stage, {}).pop("accumulate", None)
            if stage in content and not content[stage]:
                del content[stage]
        if self.model != DEFAULT_MODEL:
            for unused in {"contrast", "refresh", "flow"} - ({"contrast"} if self.model == "contrastive" else set()):
                content.pop(unused, None)
            for stage in {"refiner", "align"} & content.keys():
                shared = {name: value for name, value in content.pop(stage).items() if name in Stage.model_fields}
                content |= {stage: shared} if shared else {}
        # Hashed under the deprecated names: folders of runs and results files from before the renaming stay valid.
        for table, keys in RENAMED_KEYS.items():
            deprecated = {new: old for old, new in keys.items()}
            if table in content:
                content[table] = {deprecated.get(key, key): value for key, value in content[table].items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="after")
    def _tables_agree(self) -> "Config":
        names = [m.name for m in self.modalities]
        if len(set(names)) != len(names):
            raise ValueError(f"[[modalities]] has a duplicate name: {names}")
        columns = Counter(name for source in self.data.sources for name in source.columns)
        if unknown := set(columns) - set(names):
            raise ValueError(f"[[data.sources]] columns name {sorted(unknown)}, the modalities are {names}")
        if wrong := [name for name in names if columns[name] != 1]:
            counts = ", ".join(f"{name} has {columns[name]}" for name in wrong)
            raise ValueError(f"each modality needs exactly one column among [[data.sources]]: {counts}")
        images = [m.name for m in self.modalities if isinstance(m, ImageModality)]
        audio = [m.name for m in self.modalities if isinstance(m, AudioModality)]
        for key, title, allowed in (
            ("random_flip", "image", images),
            ("random_shift", "image and audio", images + audio),
            ("random_contrast", "audio", audio),
        ):
            if wrong := [name for name in getattr(self.data, key) if name not in allowed]:
                raise ValueError(f"data.{key} names {wrong}, the {title} modalities are {allowed}")
        if self.data.pairing == "row" and len(self.data.sources) > 1:
            raise ValueError(
                f'data.pairing = "row" takes the rows of one source, received {len(self.data.sources)}: '
                'join them into one file, or pair by "class"'
            )
        if self.data.pairing == "class" and self.data.subset_balance:
            raise ValueError('data.subset_balance takes pairing = "row": rows that are paired by class have no fixed subset')
        if self.data.shards and (self.data.pairing == "class" or self.contrast.epochs or self.align.contrast_weight):
            raise ValueError(
                'data.shards = true takes pairing = "row" and no contrastive learning, which compares all rows of a batch: set '
                "shards = false, or contrast.epochs and align.contrast_weight to 0"
            )
        if self.data.pairing == "class" and any(source.label is None for source in self.data.sources):
            raise ValueError('data.pairing = "class" needs a label column in every [[data.sources]]')
        return self

    @model_validator(mode="after")
    def _texts_agree(self) -> "Config":
        texts = [m.name for m in self.modalities if isinstance(m, TextModality) and m.likelihood != "autoregressive"]
        if wrong := [name for name in self.data.random_offset if name not in texts]:
            raise ValueError(f"data.random_offset names {wrong}, the texts that can be shifted are {texts}")
        sequences = [m.name for m in self.modalities if isinstance(m, TextModality) and m.likelihood == "autoregressive"]
        for key in ("word_dropout", "other_texts"):
            if wrong := [name for name in getattr(self.data, key) if name not in sequences]:
                raise ValueError(f"data.{key} names {wrong}, the autoregressive text modalities are {sequences}")
        encoded = [m.name for m in self.modalities if isinstance(m, EncodedModality) and m.kind == "text"]
        if wrong := [name for name in self.data.average_texts if name not in encoded]:
            raise ValueError(f"data.average_texts names {wrong}, the text modalities with an encoder are {encoded}")
        return self

    @model_validator(mode="after")
    def _galleries_have_modalities(self) -> "Config":
        names = [m.name for m in self.modalities]
        if unknown := sorted(set(self.gallery) - set(names)):
            raise ValueError(f"[gallery] names {unknown}, the modalities are {names}")
        allowed = [m.name for m in self.modalities if is_picture_file(m) or is_text(m)]
        if wrong := [name for name, gallery in self.gallery.items() if gallery.values and name not in allowed]:
            raise ValueError(f"[gallery] has values of {wrong}, which only pictures and texts can have: {allowed}")
        return self
