"""The training examples that a bundle carries if the configuration has a ``[gallery]``, see ``model.gallery``."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from numpy.typing import NDArray
from PIL import Image

from concord.model.bundle.manifest import DataSource
from concord.model.encoder import EncoderFiles
from concord.model.gallery import MAX_TEXTS, Gallery
from concord.model.modality import EncodedModality, ImageModality, Modality, is_text
from concord.model.vae.multimodal import MultimodalVAE
from concord.training.config import Config, GallerySettings
from concord.training.data.columns import Column, Rows, column_names, parse_column, read_names
from concord.training.data.dataset import data_folders
from concord.training.data.sources import complete_rows, open_rows, read_class_names
from concord.training.encoders.features import DEFAULT_CACHE, StoredFeatures
from concord.training.errors import DataError

BATCH_ROWS = 256
MAX_ID_CHARACTERS = 128
WEBP_QUALITY = 80


def read_galleries(
    config: Config,
    model: MultimodalVAE,
    modalities: Sequence[Modality],
    encoders: Sequence[EncoderFiles],
    sources: Sequence[DataSource],
    folder: Path | None,
) -> dict[str, Gallery]:
    """Return the gallery of each modality that the configuration names, from the training rows.

    Args:
        model: trained. It is moved to the CPU and set to evaluation mode.
        modalities: of the model, with the statistics of the training rows.
        encoders: frozen encoders.
        sources: that the model was trained on.
        folder: base folder of relative paths. None: as in training.

    Raises:
        DataError: the rows cannot be read, are not those of training, or have no ids.
    """
    base, cache = data_folders(config, folder)
    found = {}
    for modality in modalities:
        if (settings := config.gallery.get(modality.name)) is None:
            continue
        features = {}
        if isinstance(modality, EncodedModality):
            (files,) = (files for files in encoders if files.name == modality.encoder)
            options = (cache or DEFAULT_CACHE, config.device, config.thread_count, modality.name)
            features[modality.name] = StoredFeatures(files, *options)
        (source,) = (source for source in config.data.sources if modality.name in source.columns)
        rows = open_rows(source, "train", base, config.data.rows, features)
        _require_same_file(rows, sources)
        columns = column_names(source.columns[modality.name])
        found[modality.name] = _gallery(model, modalities, modality, rows, columns, settings)
    return found


def _require_same_file(rows: Rows, sources: Iterable[DataSource]) -> None:
    """Raise DataError if the file is not the one that the model was trained on."""
    digest = rows.table.sha256()
    if digest and digest not in {source.sha256 for source in sources if source.file == rows.file}:
        raise DataError(
            f"{rows.file}: the gallery takes the rows of training, and this file has another content (sha256 {digest[:12]}). "
            "Name the folder of the same data with --data, or remove [gallery]"
        )


def _gallery(
    model: MultimodalVAE,
    modalities: Sequence[Modality],
    modality: Modality,
    rows: Rows,
    columns: Sequence[str],
    settings: GallerySettings,
) -> Gallery:
    candidates = rows.numbers[np.concatenate([complete_rows(arrays) for arrays in rows.batches(columns)])]
    chosen = np.sort(np.random.default_rng(0).permutation(candidates)[: settings.rows])
    names = read_class_names(rows, columns[0])
    column = parse_column(replace(rows, numbers=chosen), columns, modality, names)
    kept = np.flatnonzero(column.present)
    if not len(kept):
        raise DataError(
            f"{rows.file}: no training row has {modality.name}, so there is no gallery: remove [gallery.{modality.name}]"
        )
    rows = replace(rows, numbers=chosen[kept])
    texts: list[list[str]] = []
    thumbnails: list[bytes] = []
    if settings.values and is_text(modality):
        texts = [found[:MAX_TEXTS] for found in read_names(rows, columns, modality, names)]
    elif settings.values:
        thumbnails = _thumbnails(rows, columns, modality, settings.side)
    mean = _means(model, modalities, modality, column, kept)
    return Gallery(mean, _ids(rows, settings.ids), texts, thumbnails, settings.side if thumbnails else 0)


def _means(
    model: MultimodalVAE, modalities: Sequence[Modality], modality: Modality, column: Column, rows: Int64[np.ndarray, " row"]
) -> Float32[np.ndarray, "row latent"]:
    """Return the means of q(z | x_m), of unit length."""
    model = model.cpu().eval()
    means = []
    for start in range(0, len(rows), BATCH_ROWS):
        values = _values(column, modality, rows[start : start + BATCH_ROWS])
        arrays = {m.name: torch.from_numpy(np.zeros((len(values), *m.shape), dtype=m.dtype)) for m in modalities}
        arrays[modality.name] = torch.from_numpy(values)
        present = torch.tensor([m.name == modality.name for m in modalities]).expand(len(values), -1)
        with torch.no_grad():
            means.append(model.aligned(arrays, present).mean.numpy())
    mean = np.concatenate(means)
    return np.asarray(mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.finfo(np.float32).tiny))


def _values(column: Column, modality: Modality, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, "row ..."]:
    """Return the network inputs of some rows. Of several texts it is the first, or the mean of the features of all."""
    if column.starts is None:
        values = column.values[rows]
    elif isinstance(modality, EncodedModality):
        bounds = zip(column.starts[rows], column.starts[rows + 1], strict=True)
        values = np.stack([column.values[start:end].mean(axis=0) for start, end in bounds])
    else:
        values = column.values[column.starts[rows]]
    return np.asarray(values / np.float32(255)) if values.dtype == np.uint8 else values


def _thumbnails(rows: Rows, columns: Sequence[str], modality: Modality, side: int) -> list[bytes]:
    """Return a WebP file of each row's picture."""
    channels = modality.channels if isinstance(modality, ImageModality) else 3
    background = modality.background if isinstance(modality, ImageModality) else "white"
    frame = ImageModality(name=modality.name, channels=channels, height=side, width=side, background=background)
    column = parse_column(replace(rows, encoders={}), columns, frame, None)
    return [_webp(pixels) for pixels in column.values]


def _webp(pixels: NDArray[np.uint8]) -> bytes:
    levels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    file = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(file, "webp", quality=WEBP_QUALITY)
    return file.getvalue()


def _ids(rows: Rows, column: str | None) -> list[str]:
    """Return the id of each row.

    Raises:
        DataError: there is no such column, or a row has no id.
    """
    if column is None:
        return [str(number) for number in rows.numbers]
    if column not in rows.table.column_names:
        raise DataError(f"{rows.file}: gallery: no column {column!r} for ids. Its columns are {rows.table.column_names}")
    ids = [value for (array,) in rows.batches([column]) for value in array.to_pylist()]
    for number, value in zip(rows.numbers, ids, strict=True):
        if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > MAX_ID_CHARACTERS:
            raise DataError(
                f"{rows.file}: row {number}, column {column!r}: received {value!r:.60} as an id; an id is a text of at most "
                f"{MAX_ID_CHARACTERS} characters or an integer. Correct it, or remove ids: the number of the row is the id then"
            )
    return [str(value) for value in ids]


def describe(galleries: Mapping[str, Gallery]) -> list[str]:
    """Return what the bundle contains of the training data, in words: one line for each gallery."""
    lines = []
    for name, gallery in galleries.items():
        held = "ids and texts" if gallery.texts else f"ids and thumbnails of {gallery.side} pixels" if gallery.side else "ids"
        lines.append(f"{name}: {held} of {len(gallery.ids):,} rows")
    return lines
