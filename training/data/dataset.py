"""Batches of rows with missing modalities, paired by row or by class."""

import os
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from concord.model.bundle.manifest import DataSource
from concord.model.codec import check_installed
from concord.model.encoder import EncoderFiles
from concord.model.modality import EncodedModality, ImageModality, Modality, TextModality
from concord.model.token_sampling import text_lengths
from concord.model.vae.generative import context_name, target_name
from concord.training.config import Config, Data
from concord.training.data.augmentation import augment, change_contrast, sample_contrasts, sample_variations
from concord.training.data.columns import Column, absence
from concord.training.data.preprocessing import fit_preprocessing
from concord.training.data.sources import UNKNOWN, Shard, Split, Table, open_table, read_table
from concord.training.distributed import ProcessGroup
from concord.training.encoders.features import DEFAULT_CACHE, open_features
from concord.training.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """Rows as network inputs."""

    arrays: dict[str, Shaped[Tensor, "batch ..."]]
    """By modality, (batch, *modality.shape): images and spectrograms float32 in [0, 1], texts int64; zeros where absent. In
    training also the words that decoders see and predict, see ``generative.context_name`` and ``target_name``."""
    present: Bool[Tensor, "batch modality"]
    """Which modalities each row has, in the order of the configuration. Every row has at least one."""
    labels: Int64[Tensor, " batch"] | None
    """Class numbers, -1 where unknown. None: the data has no labels."""

    def __len__(self) -> int:
        return len(self.present)

    def to(self, device: torch.device) -> "Batch":
        """Return the rows on a device. The copy to a GPU is asynchronous, from pinned memory."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        arrays = {name: move(array) for name, array in self.arrays.items()}
        return Batch(arrays, move(self.present), None if self.labels is None else move(self.labels))

    def take(self, rows: slice | Tensor) -> "Batch":
        """Return some of the rows: a slice, a boolean mask or row indices."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Batch(arrays, self.present[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class DatasetShard:
    """The place of a data set among those of all processes."""

    rank: int
    size: int
    smallest: int
    """Fewest rows of a process. Every process takes this number of rows in each epoch."""


class Dataset:
    """The parsed rows of one split. ``load`` creates it.

    Attributes:
        modalities: the configured modalities, completed by ``fit_preprocessing``.
        class_names: in the order of the label numbers. None: the classes have no names.
        sources: file, hash, row count and licence of each source.
        columns: parsed values by modality.
        empty_rows: row numbers without any modality, by file.
        notes: what the user should know of how the sources were read.
        encoders: files of the frozen encoders.
        device: of the batches, see ``to``.
        fitted: result of ``fit_preprocessing``.
        shard: set if these rows are those of one of several processes. A batch is then this process's part of a batch.
    """

    def __init__(self, tables: Sequence[Table], modalities: Sequence[Modality], data: Data, rows_per_epoch: int | None) -> None:
        self.modalities = tuple(modalities)
        self.class_names = tables[0].class_names
        self.sources: list[DataSource] = [table.source for table in tables]
        self.empty_rows = {table.source.file: table.empty_rows for table in tables}
        self.notes = [note for table in tables for note in table.notes]
        self._tables = tables
        self._rows = np.arange(len(tables[0]))
        self.device = torch.device("cpu")
        self.encoders: tuple[EncoderFiles, ...] = ()
        self.shard: DatasetShard | None = None
        self.fitted: tuple[dict[str, Modality], tuple[str, ...] | None] = ({m.name: m for m in modalities}, None)
        self._rows_per_epoch = rows_per_epoch
        self._table_index = {name: index for index, table in enumerate(tables) for name in table.columns}
        self.columns = {name: column for table in tables for name, column in table.columns.items()}
        self._class_pairings = [_ClassPairing(tables[0], table) for table in tables[1:]] if data.pairing == "class" else []
        self._padding = {name: _trailing_padding(self.columns[name].values) for name in data.random_offset}
        self._augmented = {
            m.name: (m.name in data.random_flip, data.random_shift.get(m.name, 0), isinstance(m, ImageModality))
            for m in self.modalities
            if m.name in data.random_flip or m.name in data.random_shift
        }
        self._contrasts = {m.name: data.random_contrast[m.name] for m in self.modalities if m.name in data.random_contrast}
        self._encoded = {m.name for m in self.modalities if isinstance(m, EncodedModality)}
        self._word_dropout = data.word_dropout
        self._other_texts = data.other_texts
        self._averaged = set(data.average_texts)
        self._balance = 0.0
        self._multiple_texts = [m.name for m in self.modalities if self.columns[m.name].starts is not None]
        if rows_per_epoch is not None and rows_per_epoch > len(self):
            raise DataError(
                f"{self.sources[0].file}: data.rows_per_epoch is {rows_per_epoch}, but the file has {len(self)} rows. "
                f"Set it to at most {len(self)}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def to(self, device: torch.device) -> "Dataset":
        """Return a data set of the same rows whose batches are on a device."""
        moved = copy(self)
        moved.device = device
        return moved

    @property
    def has_labels(self) -> bool:
        """Whether at least one row has a known class."""
        labels = self._tables[0].labels
        return labels is not None and bool((labels != UNKNOWN).any())

    def steps_per_epoch(self, batch_size: int, *, shuffle: bool = True) -> int:
        """Return the number of batches of one epoch.

        Training (``shuffle``) drops a smaller last batch unless it is the only one.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, received {batch_size}")
        rows = min(self._rows_per_epoch or len(self), len(self)) if shuffle else len(self)
        if shuffle and self.shard:
            rows, batch_size = min(rows, self.shard.smallest), batch_size // self.shard.size
        return max(1, rows // batch_size) if shuffle else -(-rows // batch_size)

    def batches(
        self, epoch: int, batch_size: int, seed: int, start: int = 0, *, shuffle: bool = True, average: bool | None = None
    ) -> Iterator[Batch]:
        """Iterate over the batches of one epoch, from step ``start`` on.

        A pure function of its arguments: step k gives the same batch whether or not earlier steps were read. A resumed run
        therefore continues exactly. Each epoch samples the order, the partner rows, the offsets of texts, one of the texts of a
        row (with ``average_texts``, several), the words that decoders do not see, the other text that they predict, and the
        augmentation of images and spectrograms. Without ``shuffle``, rows take their first text, or with a frozen encoder the
        mean of the features of all, and nothing is augmented or hidden.

        Args:
            epoch, seed: 0 and above.
            start: first step. At or past the end, no batch is returned.
            shuffle: True (training): rows in random order, at most ``rows_per_epoch``. False: every row once, in file order.
            average: whether rows have the mean of the features of their texts. None: without ``shuffle``.
        """
        average = not shuffle if average is None else average
        steps = self.steps_per_epoch(batch_size, shuffle=shuffle)
        rows = self._rows
        if shuffle:
            rows = self._shuffled(_generator(seed, epoch, 0))[: self._rows_per_epoch]
        if shuffle and self.shard:
            rows, batch_size = rows[: self.shard.smallest], batch_size // self.shard.size
        table_rows = self._pair(rows, epoch, seed)
        indices = {name: table_rows[table] for name, table in self._table_index.items()}  # into the values of each modality
        chosen = {}
        for stream, name in enumerate(self._multiple_texts, start=len(table_rows) + len(self._padding)):
            starts, generator = self._starts(name), _generator(seed, epoch, stream)
            begin, end = starts[indices[name]], starts[indices[name] + 1]
            if average and name in self._encoded:
                indices[name], chosen[name] = begin, _Texts(end - begin, end - begin, begin * 0)
            elif shuffle and name in self._averaged:
                size = end - begin
                indices[name], chosen[name] = begin, _Texts(size, generator.integers(size) + 1, generator.integers(size))
            else:
                indices[name] = generator.integers(begin, end) if shuffle else begin
        offsets = {}
        for stream, (name, padding) in enumerate(self._padding.items(), start=len(table_rows)):
            offsets[name] = _generator(seed, epoch, stream).integers(0, padding[indices[name]] + 1)
        variations = {}
        first = len(table_rows) + len(self._padding) + len(self._multiple_texts)
        for stream, (name, (flip, shift, vertical)) in enumerate(self._augmented.items() if shuffle else (), start=first):
            generator = _generator(seed, epoch, stream)
            variations[name] = sample_variations(len(rows), generator, flip=flip, shift=shift, vertical=vertical)
        first += len(self._augmented)
        contrasts = {}
        for stream, (name, strength) in enumerate(self._contrasts.items() if shuffle else (), start=first):
            contrasts[name] = sample_contrasts(len(rows), _generator(seed, epoch, stream), strength)
        hidden = {}
        first += len(self._contrasts)
        for stream, (name, rate) in enumerate(self._word_dropout.items() if shuffle else (), start=first):
            shape = (len(rows), self.columns[name].values.shape[1])
            hidden[name] = _generator(seed, epoch, stream).random(shape, dtype=np.float32) < rate
        first += len(self._word_dropout)
        others = self._sample_others(indices, table_rows, (seed, epoch, first)) if shuffle else {}
        for step in range(start, steps):
            part = slice(step * batch_size, (step + 1) * batch_size)
            batch = self._batch(
                [rows[part] for rows in table_rows],
                {name: index[part] for name, index in indices.items()},
                {name: texts.take(part) for name, texts in chosen.items()},
                {name: offset[part] for name, offset in offsets.items()},
                {name: variation[part] for name, variation in variations.items()},
                {name: factors[part] for name, factors in contrasts.items()},
                {name: words[part] for name, words in hidden.items()},
                {name: index[part] for name, index in others.items()},
            )
            yield batch.to(self.device)

    def for_evaluation(self) -> "Dataset":
        """Return a data set of the same rows with their own texts, no hidden words, and no limit of rows per epoch."""
        view = copy(self)
        view._rows_per_epoch = None
        view._other_texts = ()
        view._word_dropout = {}  # metrics shuffle test rows too, and their likelihoods are those of whole texts
        return view

    def hold_out(self, count: int) -> tuple["Dataset", "Dataset"]:
        """Return views of all but ``count`` rows, and of these rows. The random choice is the same in every run.

        With shards, each process holds out its part of them. With pairing by class, the same share of each class of the other
        tables is held out, and at least one row. A class with a single row is in both views.

        Raises:
            ConfigError: fewer than ``count`` rows would be left.
        """
        size = self.shard.size if self.shard else 1
        count = -(-count // size)
        if 2 * count > (self.shard.smallest if self.shard else len(self)):
            raise ConfigError(
                f"{count * size} rows are to be held out, but there are {self.sources[0].rows} training rows. Hold out at most "
                "half (validation.rows, or --held-out)"
            )
        order = np.random.default_rng(0).permutation(len(self))
        kept, held_out = copy(self), copy(self)
        kept._rows, held_out._rows = self._rows[np.sort(order[count:])], self._rows[np.sort(order[:count])]
        if self.shard:
            kept.shard = replace(self.shard, smallest=self.shard.smallest - count)
        splits = [pairing.split(count / len(self)) for pairing in self._class_pairings]
        kept._class_pairings, held_out._class_pairings = [one for one, _ in splits], [other for _, other in splits]
        return kept, held_out

    def sample(self, count: int) -> "Dataset":
        """Return a view of ``count`` random rows, or of all if there are fewer. The choice is the same in every run."""
        view = copy(self)
        view._rows = self._rows[np.sort(np.random.default_rng(0).permutation(len(self))[:count])]
        return view

    def with_pairs(self) -> "Dataset":
        """Return a view of the rows that have at least two modalities.

        With pairing by class it has all rows: their partners, and so their modalities, differ from epoch to epoch.
        """
        if self._class_pairings:
            return self
        view = copy(self)
        present = np.stack([column.present[self._rows] for column in self.columns.values()])
        view._rows = self._rows[present.sum(axis=0) > 1]
        return view

    def _sample_others(
        self, chosen: dict[str, NDArray[np.int64]], table_rows: list[NDArray[np.int64]], first: tuple[int, int, int]
    ) -> dict[str, NDArray[np.int64]]:
        """Return the indices of the texts that decoders predict in place of the chosen ones, see ``Data.other_texts``.

        Args:
            first: seed, epoch and the first stream of random numbers.
        """
        others = {}
        for stream, name in enumerate(self._other_texts):
            if name in self._multiple_texts:
                starts, rows = self._starts(name), table_rows[self._table_index[name]]
                begin, size = starts[rows], starts[rows + 1] - starts[rows]
                step = 1 + _generator(first[0], first[1], first[2] + stream).integers(0, np.maximum(size - 1, 1))
                others[name] = np.asarray(begin + (chosen[name] - begin + step) % size)
        return others

    def texts(self, name: str) -> list[Int64[np.ndarray, "text length"]]:
        """Return the tokens of all texts of each row, in the order of ``batches`` without ``shuffle``. Zeros where absent.

        With pairing by class, the partner rows are those of epoch 0 and seed 0.
        """
        rows, column = self._pair(self._rows, 0, 0)[self._table_index[name]], self.columns[name]
        if column.starts is None:
            return list(column.values[rows][:, np.newaxis])
        return [column.values[column.starts[row] : column.starts[row + 1]] for row in rows]

    def first_shuffled(self, count: int) -> NDArray[np.int64]:
        """Return the numbers of the rows of the first batch of this size in epoch 0 with seed 0, see ``batches``."""
        return self._shuffled(_generator(0, 0, 0))[:count]

    def pictures(
        self, name: str, rows: Int64[np.ndarray, " row"], side: int
    ) -> tuple[Float32[np.ndarray, "row feature"], UInt8[np.ndarray, "row 3 {side} {side}"]] | None:
        """Return features and pictures of a modality with a frozen encoder, read from the file again.

        Args:
            rows: numbers of rows that have the modality, see ``first_shuffled``.
            side: height and width of the pictures.

        Returns:
            None if the rows are paired with those of other tables.
        """
        read_as = self._tables[0].read_as
        if len(self._tables) > 1 or read_as is None:
            return None
        rows = np.sort(rows)
        pictures = read_as(name, rows, ImageModality(name=name, channels=3, height=side, width=side))
        return self.columns[name].values[rows], pictures.values

    def balanced(self, balance: float) -> "Dataset":
        """Return a view that samples rows by their subset of modalities in training, see ``Data.subset_balance``."""
        view = copy(self)
        view._balance = balance
        return view

    def _shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return the rows of an epoch in random order: each once, or as often as ``balanced`` says."""
        if not self._balance:
            return generator.permutation(self._rows)
        present = np.stack([column.present[self._rows] for column in self.columns.values()], axis=1)
        _, subset, counts = np.unique(present, axis=0, return_inverse=True, return_counts=True)
        shares = counts ** (1 - self._balance) / np.sum(counts ** (1 - self._balance))
        bounds = np.rint(np.concatenate(([0.0], np.cumsum(shares))) * len(self._rows)).astype(np.int64)
        parts = []
        for number, wanted in enumerate(np.diff(bounds)):
            own = self._rows[subset == number]
            parts += [own] * (wanted // len(own)) + [generator.permutation(own)[: wanted % len(own)]]
        return generator.permutation(np.concatenate(parts))

    def subsets(self) -> dict[tuple[str, ...], int]:
        """Return the number of rows with each subset of modalities, the most frequent subset first.

        With pairing by class, the partner rows are those of evaluation (epoch 0, seed 0).
        """
        names = [m.name for m in self.modalities]
        table_rows = self._pair(self._rows, 0, 0)
        present = np.stack([self.columns[name].present[table_rows[self._table_index[name]]] for name in names], axis=1)
        masks, counts = np.unique(present, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {
            tuple(name for name, bit in zip(names, mask, strict=True) if bit): count
            for mask, count in zip(masks[order].tolist(), counts[order].tolist(), strict=True)
        }

    def _pair(self, rows: NDArray[np.int64], epoch: int, seed: int) -> list[NDArray[np.int64]]:
        """Return, for each table, the row that is paired with each of the given rows of the first table."""
        pairings = enumerate(self._class_pairings, start=1)
        return [rows, *(pairing.sample(rows, _generator(seed, epoch, stream)) for stream, pairing in pairings)]

    def _starts(self, name: str) -> NDArray[np.int64]:
        starts = self.columns[name].starts
        assert starts is not None
        return starts

    def _batch(
        self,
        table_rows: list[NDArray[np.int64]],
        indices: dict[str, NDArray[np.int64]],
        chosen: dict[str, "_Texts"],
        offsets: dict[str, NDArray[np.int64]],
        variations: dict[str, NDArray[np.int64]],
        contrasts: dict[str, NDArray[np.float32]],
        hidden: dict[str, NDArray[np.bool_]],
        others: dict[str, NDArray[np.int64]],
    ) -> Batch:
        arrays, masks = {}, []
        for modality in self.modalities:
            column = self.columns[modality.name]
            if modality.name in chosen:
                values = chosen[modality.name].means(column.values, indices[modality.name])
            else:
                values = column.values[indices[modality.name]]
            present = column.present[table_rows[self._table_index[modality.name]]]
            if modality.name in offsets:
                values = _shift(values, offsets[modality.name])
            if modality.name in variations:
                values[present] = augment(values[present], variations[modality.name][present])
            if modality.name in contrasts:
                values[present] = change_contrast(values[present], contrasts[modality.name][present])
            if values.dtype == np.uint8:  # NumPy, because torch would start its thread pool for a millisecond of work
                values = np.divide(values, np.float32(255), dtype=np.float32)
            arrays[modality.name] = torch.from_numpy(values)
            masks.append(torch.from_numpy(present))
            if modality.name in others:
                values = column.values[others[modality.name]]
                arrays[target_name(modality.name)] = torch.from_numpy(values)
            if modality.name in hidden and isinstance(modality, TextModality):
                seen = np.where(hidden[modality.name], modality.categories, values)
                arrays[context_name(modality.name)] = torch.from_numpy(seen)
        labels = self._tables[0].labels
        return Batch(arrays, torch.stack(masks, dim=1), None if labels is None else torch.from_numpy(labels[table_rows[0]]))


def load(config: Config, split: Split, folder: Path | None = None, training: Dataset | None = None) -> Dataset:
    """Read one split of the configured sources.

    Args:
        folder: base folder of relative paths. None: the environment variable ``CONCORD_DATA``, or else the configuration's.
        training: the training rows, whose statistics are used. None: they are computed.

    Raises:
        DataError: the rows cannot be used for training, see ``sources.read_table``; or a package that a modality needs is not
            installed.
    """
    folder, cache = data_folders(config, folder)
    data, encoders = config.data, open_features(config, cache or DEFAULT_CACHE)
    modalities, class_names = fitted = training.fitted if training else fit_preprocessing(config, folder, encoders)
    tables = [
        read_table(source, split, modalities, folder, class_names, data.bad_values, data.rows, data.max_bytes, cache, encoders)
        for source in data.sources
    ]
    loaded = Dataset(tables, list(modalities.values()), data, data.rows_per_epoch if split == "train" else None)
    loaded.encoders = tuple({features.files.name: features.files for features in encoders.values()}.values())
    loaded.notes += [note for features in encoders.values() for note in features.notes]
    loaded.fitted = fitted
    if split == "train":
        _require_pairs(loaded, loaded.subsets())
        _require_several_texts(loaded, data.average_texts)
    return loaded if split == "train" else loaded.for_evaluation()


def load_both(config: Config, folder: Path | None, held_out: int | None = None) -> tuple[Dataset, Dataset]:
    """Read the training and the test rows.

    Args:
        held_out: the test rows are so many training rows instead, see ``Dataset.hold_out``. They are not trained on.

    Raises:
        ConfigError: fewer than ``held_out`` rows would be left.
        DataError: see ``load``.
    """
    train = load(config, "train", folder)
    if held_out is None:
        return train, load(config, "test", folder, train)
    kept, test = train.hold_out(held_out)
    return kept, test.for_evaluation()


def data_folders(config: Config, folder: Path | None) -> tuple[Path, Path | None]:
    """Return the base folder of relative paths, and the folder of the cache. Check that the packages of audio are installed."""
    try:
        check_installed(config.modalities)
    except ImportError as error:
        raise DataError(str(error)) from error
    cache = Path(os.environ["CONCORD_CACHE"]) if os.environ.get("CONCORD_CACHE") else config.data.cache
    return folder or Path(os.environ.get("CONCORD_DATA") or config.data.folder), cache


def load_shard(config: Config, folder: Path | None, group: ProcessGroup) -> Dataset:
    """Read the training rows of one of several processes, see ``Data.shards``. All processes call this at the same time.

    Only rank zero reads what concerns all rows: the statistics of preprocessing, and the hash of the file.

    Raises:
        DataError: in every process, if one of them cannot use its rows.
    """
    folder, cache = data_folders(config, folder)
    data, source = config.data, config.data.sources[0]

    def prepare() -> tuple[tuple[dict[str, Modality], tuple[str, ...] | None], str | None]:
        encoders = open_features(config, cache or DEFAULT_CACHE)
        return fit_preprocessing(config, folder, encoders), open_table(source.train, folder).sha256()

    (modalities, class_names), digest = group.from_rank_zero(prepare)
    encoders = open_features(config, cache or DEFAULT_CACHE)  # with the features that rank zero has computed
    shard = Shard(group.rank, group.size, digest)
    loaded: list[Dataset] = []

    def read() -> tuple[int, set[tuple[str, ...]]]:
        table = read_table(
            source, "train", modalities, folder, class_names, data.bad_values, data.rows, data.max_bytes, cache, encoders, shard
        )
        own = Dataset(
            [table], list(modalities.values()), data, data.rows_per_epoch and max(1, data.rows_per_epoch // group.size)
        )
        loaded.append(own)
        return len(own), set(own.subsets())

    sizes, subsets = zip(*group.gather_results(read), strict=True)
    (own,) = loaded
    _require_pairs(own, set().union(*subsets))
    _require_several_texts(own, data.average_texts)
    own.shard = DatasetShard(group.rank, group.size, min(sizes))
    own.sources = [own.sources[0].model_copy(update={"rows": sum(sizes)})]
    return own


def _require_pairs(data: Dataset, subsets: Collection[tuple[str, ...]]) -> None:
    """Raise DataError unless every modality occurs in one of the rows' subsets and some have at least two modalities."""
    file = data.sources[0].file
    absent = [m.name for m in data.modalities if not any(m.name in subset for subset in subsets)]
    if absent:
        reasons = ". ".join(f"no training row has {name}; {_absence(data.columns[name])}" for name in absent)
        raise DataError(f"{file}: {reasons}. Name another column, or remove the modality")
    if not any(len(subset) > 1 for subset in subsets):
        raise DataError(
            f"{file}: no training row has two modalities, so there are no pairs to align. Join the rows that belong together, "
            'or pair rows by a shared class: data.pairing = "class"'
        )


def _require_several_texts(data: Dataset, averaged: Sequence[str]) -> None:
    """Raise DataError if a row of a modality of ``average_texts`` cannot have several texts."""
    if single := [name for name in averaged if data.columns[name].starts is None]:
        raise DataError(
            f"{data.sources[0].file}: data.average_texts names {single}, whose rows have one text each. It takes a column with "
            "a list of texts in each row: name such a column, or remove average_texts"
        )


def _absence(column: Column) -> str:
    nulls = len(column.present) - column.blank - len(column.errors)
    return absence(max(0, nulls), column.blank, column.errors[:3], len(column.errors))


class _ClassPairing:
    """Pairs the rows of an anchor table with random rows of the same class from another table."""

    def __init__(self, anchors: Table, table: Table) -> None:
        assert anchors.labels is not None  # the configuration requires label columns for this pairing
        assert table.labels is not None
        files = (anchors.source.file, table.source.file)
        for file, labels in zip(files, (anchors.labels, table.labels), strict=True):
            if (unknown := np.flatnonzero(labels == UNKNOWN)).size:
                raise DataError(
                    f"{file}: row {unknown[0]} has no label. Pairing by class needs a label in every row. Remove these rows"
                )
        if anchors.class_names and table.class_names and anchors.class_names != table.class_names:
            raise DataError(
                f"{files[0]} and {files[1]} have different class names: {anchors.class_names}, {table.class_names}. "
                "Use the same names in the same order, or set data.class_names"
            )
        self._classes = anchors.labels
        self._order = np.argsort(table.labels, kind="stable")
        self._counts = np.bincount(table.labels)
        self._starts = np.cumsum(self._counts) - self._counts
        missing = np.setdiff1d(anchors.labels, table.labels)
        if missing.size:
            classes = [
                f"{label} ({anchors.class_names[label]})" if anchors.class_names else f"{label}" for label in missing.tolist()
            ]
            raise DataError(
                f"{files[1]}: no row of class {', '.join(classes)}, but {files[0]} has some. Add rows, or remove the class"
            )

    def sample(self, rows: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """Return a random row of the same class for each anchor row, uniformly distributed."""
        classes = self._classes[rows]
        return np.asarray(self._order[self._starts[classes] + generator.integers(0, self._counts[classes])])

    def split(self, share: float) -> tuple["_ClassPairing", "_ClassPairing"]:
        """Return pairings with the rows that are kept and with those that are held out, see ``Dataset.hold_out``."""
        generator = np.random.default_rng(0)
        is_kept, is_held_out = np.ones(len(self._order), bool), np.zeros(len(self._order), bool)
        for start, count in zip(self._starts, self._counts, strict=True):
            chosen = start + generator.permutation(count)[: max(1, round(share * count))]
            is_held_out[chosen] = True
            is_kept[chosen] = count == 1
        return self._of(is_kept), self._of(is_held_out)

    def _of(self, is_chosen: NDArray[np.bool_]) -> "_ClassPairing":
        """Return a pairing with some of the rows, chosen in the order of ``_order``."""
        view = copy(self)
        view._order = self._order[is_chosen]
        labels = np.repeat(np.arange(len(self._counts)), self._counts)[is_chosen]
        view._counts = np.bincount(labels, minlength=len(self._counts))
        view._starts = np.cumsum(view._counts) - view._counts
        return view


class _Texts(NamedTuple):
    """Which of its texts each row takes: ``counts`` of ``sizes`` texts, from ``offsets`` on; the first follows the last."""

    sizes: Int64[np.ndarray, " row"]
    counts: Int64[np.ndarray, " row"]
    offsets: Int64[np.ndarray, " row"]

    def take(self, rows: slice) -> "_Texts":
        """Return those of some rows."""
        return _Texts(*(values[rows] for values in self))

    def means(
        self, values: Float32[np.ndarray, "text size"], first: Int64[np.ndarray, " row"]
    ) -> Float32[np.ndarray, "row size"]:
        """Return the mean of each row's values, whose texts begin at ``first``."""
        starts = np.cumsum(self.counts) - self.counts
        sizes, offsets, begins = (np.repeat(rows, self.counts) for rows in (self.sizes, self.offsets - starts, first))
        chosen = begins + (offsets + np.arange(len(begins))) % sizes
        return np.asarray(np.add.reduceat(values[chosen], starts, axis=0) / self.counts[:, None].astype(np.float32))


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch, stream))


def _trailing_padding(tokens: Int64[np.ndarray, "row length"]) -> Int64[np.ndarray, " row"]:
    """Return the number of padding tokens at the end of each text."""
    return np.asarray(tokens.shape[1] - text_lengths(tokens))


def _shift(tokens: Int64[np.ndarray, "row length"], offset: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, "row length"]:
    """Rotate each text to the right by its offset. The tokens that wrap around are padding."""
    length = tokens.shape[1]
    return np.asarray(np.take_along_axis(tokens, (np.arange(length) - offset[:, None]) % length, axis=1))
