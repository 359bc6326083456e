"""Rows with missing modalities -> batches; pairing by row or by class."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from model.manifest import DataSource
from model.modality import Modality
from training.augmentation import draw_variations, varied
from training.config import Config, Data
from training.learning import learn
from training.sources import UNKNOWN, DataError, Split, Table, read_table

__all__ = ["Batch", "DataError", "Dataset", "load"]


@dataclass(frozen=True)
class Batch:
    """Rows as the networks take them."""

    arrays: dict[str, Shaped[Tensor, "batch ..."]]
    """By modality, (batch, *modality.shape): images in [0, 1] float32, texts int64; zeros where absent."""
    present: Bool[Tensor, "batch modality"]
    """In the order of the configuration's modalities; at least one true a row."""
    labels: Int64[Tensor, " batch"] | None
    """Class numbers, -1 where unknown. None: the data has no labels."""

    def __len__(self) -> int:
        return len(self.present)

    def take(self, rows: slice) -> "Batch":
        """Some of the rows."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Batch(arrays, self.present[rows], None if self.labels is None else self.labels[rows])


class Dataset:
    """The rows of one split, in memory. ``load`` makes it.

    Attributes:
        modalities: as configured, what the training rows tell filled in.
        class_names: in the order of the label numbers. None: the data names no classes.
        sources: what was read.
        columns: by modality, the values of its source.
        left_out: by file, the rows that hold no modality at all.
    """

    def __init__(self, tables: Sequence[Table], modalities: Sequence[Modality], data: Data, rows_per_epoch: int | None) -> None:
        self.modalities = tuple(modalities)
        self.class_names = tables[0].class_names
        self.sources: list[DataSource] = [table.facts for table in tables]
        self.left_out = {table.facts.file: table.left_out for table in tables}
        self._tables = tables
        self._rows_per_epoch = rows_per_epoch
        self._table_of = {name: index for index, table in enumerate(tables) for name in table.columns}
        self.columns = {name: column for table in tables for name, column in table.columns.items()}
        self._partners = [_Partners(tables[0], table) for table in tables[1:]] if data.pairing == "class" else []
        self._free = {name: _free_characters(self.columns[name].values) for name in data.random_offset}
        self._varied = {
            m.name: (m.name in data.random_flip, data.random_shift.get(m.name, 0))
            for m in self.modalities
            if m.name in data.random_flip or m.name in data.random_shift
        }
        self._several = [m.name for m in self.modalities if self.columns[m.name].starts is not None]
        if rows_per_epoch is not None and rows_per_epoch > len(self):
            raise DataError(f"{self.sources[0].file}: has {len(self)} rows, data.rows_per_epoch is {rows_per_epoch}. Lower it")

    def __len__(self) -> int:
        return len(self._tables[0])

    @property
    def has_labels(self) -> bool:
        """Whether some row's class is known."""
        labels = self._tables[0].labels
        return labels is not None and bool((labels != UNKNOWN).any())

    def steps_per_epoch(self, batch_size: int, *, shuffle: bool = True) -> int:
        """Batches of one epoch. Training (``shuffle``) drops a last, smaller batch unless it is the only one."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, received {batch_size}")
        rows = (self._rows_per_epoch or len(self)) if shuffle else len(self)
        return max(1, rows // batch_size) if shuffle else -(-rows // batch_size)

    def batches(self, epoch: int, batch_size: int, seed: int, start: int = 0, *, shuffle: bool = True) -> Iterator[Batch]:
        """The batches of one epoch from step ``start`` on.

        A pure function of its arguments: step k is the same batch whether or not the steps before it were taken, so that a
        resumed run goes on exactly. Each epoch draws anew the order (``shuffle``), the partners, the offsets of texts, one of
        several texts of a row, and how pictures are varied; without ``shuffle`` it is the first text, and the picture.

        Args:
            epoch, seed: 0 and above.
            start: first step; at or past the end nothing is left.
            shuffle: training: rows in random order, at most ``rows_per_epoch`` of them. Else every row once, in file order.
        """
        steps = self.steps_per_epoch(batch_size, shuffle=shuffle)
        rows = np.arange(len(self))
        if shuffle:
            rows = _generator(seed, epoch, 0).permutation(rows)[: self._rows_per_epoch]
        taken = self._taken(rows, epoch, seed)
        places = {name: taken[table] for name, table in self._table_of.items()}  # of each modality's values
        for stream, name in enumerate(self._several, start=len(taken) + len(self._free)):
            starts, generator = self._starts(name), _generator(seed, epoch, stream)
            begin, end = starts[places[name]], starts[places[name] + 1]
            places[name] = generator.integers(begin, end) if shuffle else begin
        offsets = {}
        for stream, (name, free) in enumerate(self._free.items(), start=len(taken)):
            offsets[name] = _generator(seed, epoch, stream).integers(0, free[places[name]] + 1)
        variations = {}
        first = len(taken) + len(self._free) + len(self._several)
        for stream, (name, (flip, shift)) in enumerate(self._varied.items() if shuffle else (), start=first):
            variations[name] = draw_variations(len(rows), _generator(seed, epoch, stream), flip=flip, shift=shift)
        for step in range(start, steps):
            part = slice(step * batch_size, (step + 1) * batch_size)
            yield self._batch(
                [rows[part] for rows in taken],
                {name: place[part] for name, place in places.items()},
                {name: offset[part] for name, offset in offsets.items()},
                {name: variation[part] for name, variation in variations.items()},
            )

    def subsets(self) -> dict[tuple[str, ...], int]:
        """How many rows have which modalities, the most frequent first. Partners of a class are those that evaluation takes."""
        names = [m.name for m in self.modalities]
        taken = self._taken(np.arange(len(self)), 0, 0)
        present = np.stack([self.columns[name].present[taken[self._table_of[name]]] for name in names], axis=1)
        masks, counts = np.unique(present, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {
            tuple(name for name, bit in zip(names, mask, strict=True) if bit): count
            for mask, count in zip(masks[order].tolist(), counts[order].tolist(), strict=True)
        }

    def _taken(self, rows: NDArray[np.int64], epoch: int, seed: int) -> list[NDArray[np.int64]]:
        """For each table the row that each of these rows of the first takes."""
        partners = enumerate(self._partners, start=1)
        return [rows, *(some.draw(rows, _generator(seed, epoch, stream)) for stream, some in partners)]

    def _starts(self, name: str) -> NDArray[np.int64]:
        starts = self.columns[name].starts
        assert starts is not None
        return starts

    def _batch(
        self,
        rows: list[NDArray[np.int64]],
        places: dict[str, NDArray[np.int64]],
        offsets: dict[str, NDArray[np.int64]],
        variations: dict[str, NDArray[np.int64]],
    ) -> Batch:
        arrays, present = {}, []
        for modality in self.modalities:
            column = self.columns[modality.name]
            values = column.values[places[modality.name]]
            here = column.present[rows[self._table_of[modality.name]]]
            if modality.name in offsets:
                values = _shift(values, offsets[modality.name])
            if modality.name in variations:
                values[here] = varied(values[here], variations[modality.name][here])
            if values.dtype == np.uint8:  # in NumPy: torch would wake its threads for a millisecond of work, and wait for them
                values = np.divide(values, np.float32(255), dtype=np.float32)
            arrays[modality.name] = torch.from_numpy(values)
            present.append(torch.from_numpy(here))
        labels = self._tables[0].labels
        return Batch(arrays, torch.stack(present, dim=1), None if labels is None else torch.from_numpy(labels[rows[0]]))


def load(config: Config, split: Split, folder: Path | None = None) -> Dataset:
    """Read one split of the configured sources.

    Args:
        folder: where paths start. None: the environment's ``CONCORD_DATA``, else the configuration's.

    Raises:
        DataError: anything that keeps the rows from being trained on; see ``sources.read_table``.
    """
    folder = folder or Path(os.environ.get("CONCORD_DATA") or config.data.folder)
    modalities, class_names = learn(config, folder)
    own = config.data
    tables = [
        read_table(source, split, modalities, folder, class_names, own.bad_values, own.rows, own.most_bytes)
        for source in own.sources
    ]
    found = Dataset(tables, list(modalities.values()), own, own.rows_per_epoch if split == "train" else None)
    if split == "train":
        _refuse_nothing_to_align(found)
    return found


def _refuse_nothing_to_align(data: Dataset) -> None:
    file = data.sources[0].file
    subsets = data.subsets()
    absent = [m.name for m in data.modalities if not any(m.name in subset for subset in subsets)]
    if absent:
        raise DataError(f"{file}: no training row holds {', '.join(absent)}: name another column, or leave the modality out")
    if not any(len(subset) > 1 for subset in subsets):
        raise DataError(
            f"{file}: no training row holds two modalities, so nothing tells which belong together. Join the rows that do, or "
            'pair them by a class they share: data.pairing = "class"'
        )


class _Partners:
    """Rows of another table that share the class of an anchor's row."""

    def __init__(self, anchors: Table, table: Table) -> None:
        assert anchors.labels is not None  # the configuration promises labels
        assert table.labels is not None
        files = (anchors.facts.file, table.facts.file)
        for file, labels in zip(files, (anchors.labels, table.labels), strict=True):
            if (unknown := np.flatnonzero(labels == UNKNOWN)).size:
                raise DataError(
                    f"{file}: row {unknown[0]} has no label. Pairing by class needs one in every row: remove the others"
                )
        if anchors.class_names and table.class_names and anchors.class_names != table.class_names:
            raise DataError(
                f"{files[0]} and {files[1]} name their classes differently: {anchors.class_names}, {table.class_names}. "
                "Bring the labels into one order, or name the classes in data.class_names"
            )
        self._classes = anchors.labels
        self._order = np.argsort(table.labels, kind="stable")
        self._counts = np.bincount(table.labels)
        self._starts = np.cumsum(self._counts) - self._counts
        lonely = np.setdiff1d(anchors.labels, table.labels)
        if lonely.size:
            words = [
                f"{label} ({anchors.class_names[label]})" if anchors.class_names else f"{label}" for label in lonely.tolist()
            ]
            raise DataError(
                f"{files[1]}: no row of class {', '.join(words)}, which {files[0]} has. Add some, or remove the class"
            )

    def draw(self, rows: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        """A row for each anchor row, uniformly among those of its class."""
        classes = self._classes[rows]
        return np.asarray(self._order[self._starts[classes] + generator.integers(0, self._counts[classes])])


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch, stream))


def _free_characters(tokens: Int64[np.ndarray, "row length"]) -> Int64[np.ndarray, " row"]:
    """Padding at the end of each text."""
    length = tokens.shape[1]
    used = np.where(tokens != 0, np.arange(1, length + 1), 0).max(axis=1)
    return np.asarray(length - used)


def _shift(tokens: Int64[np.ndarray, "row length"], offset: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, "row length"]:
    """Each text moved right by its offset; what leaves at the end is padding, and comes back as such at the beginning."""
    length = tokens.shape[1]
    return np.asarray(np.take_along_axis(tokens, (np.arange(length) - offset[:, None]) % length, axis=1))
