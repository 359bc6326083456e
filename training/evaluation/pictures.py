"""Metrics of the pictures that a model generates: sharpness, and the Fréchet distance of EfficientNet-Lite0's features."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from concord.model.encoder import ImagePreprocessing
from concord.model.modality import ImageModality
from concord.training.config import Config
from concord.training.data.dataset import Dataset
from concord.training.encoders.features import DEFAULT_CACHE
from concord.training.encoders.find import find_encoder
from concord.training.encoders.packages import PACKAGES
from concord.training.evaluation.metrics.frechet import frechet_distance
from concord.training.objectives import every_subset, figure_name
from concord.training.trainable import TrainableModel

if TYPE_CHECKING:
    from concord.model.runtime.frozen import FrozenEncoder

PICTURE_ROWS = 1000
"""Test rows whose pictures are generated, at most."""
NETWORK = "efficientnet-lite0"
_BATCH_ROWS = 50


def picture_network(config: Config) -> "FrozenEncoder | None":
    """Return EfficientNet-Lite0 on the CPU. None: its packages are not installed."""
    if not PACKAGES[NETWORK].is_installed:
        return None
    from concord.model.runtime.device import Device  # noqa: PLC0415 - needs ONNX Runtime
    from concord.model.runtime.frozen import open_files  # noqa: PLC0415

    cache = Path(os.environ.get("CONCORD_CACHE") or config.data.cache or DEFAULT_CACHE)
    return open_files(find_encoder(NETWORK, "image", cache), Device(), config.thread_count)


def evaluate_pictures(model: TrainableModel, train: Dataset, test: Dataset, network: "FrozenEncoder | None") -> dict[str, Any]:
    """Return ``pictures``: {image modality: {source: metrics}}, for images of 1 or 3 channels.

    Sources are every single modality, the picture itself among them, all others (``others``), and ``prior``: samples of the
    prior instead of a posterior. A picture is the expected value of one sample of z. The first ``PICTURE_ROWS`` test rows that
    have the picture, and the source: ``rows``, their number; ``sharpness``, the mean absolute difference of adjacent pixels of
    generated pictures, divided by that of the real pictures of the same rows; ``error``, only from the picture itself, the mean
    absolute difference to it.

    With a network, ``frechet_efficientnet``: the Fréchet distance between its features of generated and of real pictures of the
    same rows. It is larger with fewer rows; the source ``training`` is the distance of as many training pictures, the lowest
    that a model can reach. It is not FID, which has another network: do not compare them.

    Args:
        network: of pictures. Grey pictures become coloured ones with three equal channels.
    """
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    found: dict[str, Any] = {}
    for target, modality in enumerate(model.modalities):
        if not isinstance(modality, ImageModality) or not modality.in_files:
            continue
        sources = dict(zip(names, singles, strict=True))
        if len(names) > 2:
            sources[figure_name("others", names)] = ~singles[target]
        with torch.no_grad():
            real, by_source = _generate(model, test, modality.name, target, sources)
        if len(real) < 2:
            continue
        real_features = None if network is None else picture_features(network, real)
        metrics = {}
        for source, (generated, rows) in by_source.items():
            if len(rows) < 2:
                continue
            metrics[source] = {"rows": len(rows), "sharpness": _edges(generated) / max(_edges(real[rows]), 1e-9)}
            if source == modality.name:
                metrics[source]["error"] = (generated - real[rows]).abs().mean().item()
            if network is not None and real_features is not None:
                distance = frechet_distance(picture_features(network, generated), real_features[rows.numpy()])
                metrics[source]["frechet_efficientnet"] = distance
        if network is not None and real_features is not None:
            others = _real_pictures(train, modality.name, target, len(real))
            if len(others) == len(real):
                distance = frechet_distance(picture_features(network, others), real_features)
                metrics[figure_name("training", names)] = {"rows": len(real), "frechet_efficientnet": distance}
        if metrics:
            found[modality.name] = metrics
    return {"pictures": found} if found else {}


def _generate(
    model: TrainableModel, test: Dataset, name: str, target: int, sources: dict[str, Tensor]
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Return the real pictures and, by source, the generated ones and the numbers of the real pictures that they stand for."""
    generator = torch.Generator().manual_seed(0)
    prior = figure_name("prior", sources)
    real: list[Tensor] = []
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {source: [] for source in (*sources, prior)}
    count = 0
    for batch in test.batches(0, min(_BATCH_ROWS, len(test)), 0, shuffle=True):
        rows = batch.take(batch.present[:, target])
        rows = rows.take(slice(0, PICTURE_ROWS - count))
        if not len(rows):
            continue
        real.append(rows.arrays[name].cpu())
        numbers = torch.arange(count, count + len(rows), device="cpu")
        masks = [rows.present & mask for mask in sources.values()]
        for source, mask, q in zip(sources, masks, model.posteriors(rows.arrays, masks), strict=True):
            chosen = mask.any(1)
            z = q.sample(1, generator)[chosen, 0]
            parts[source].append((model.decode(name, z).cpu(), numbers[chosen.cpu()]))
        z = model.sample_prior(torch.randn(len(rows), model.latent, generator=generator).to(rows.arrays[name].device))
        parts[prior].append((model.decode(name, z).cpu(), numbers))
        count += len(rows)
        if count == PICTURE_ROWS:
            break
    generated = {s: (torch.cat([g for g, _ in found]), torch.cat([n for _, n in found])) for s, found in parts.items() if found}
    return torch.cat(real) if real else torch.zeros(0), generated


def _real_pictures(data: Dataset, name: str, target: int, count: int) -> Tensor:
    """Return up to ``count`` pictures."""
    found: list[Tensor] = []
    for batch in data.batches(0, min(_BATCH_ROWS, len(data)), 0, shuffle=True):
        found.append(batch.arrays[name][batch.present[:, target]].cpu())
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def _edges(pictures: Float[Tensor, "row channel height width"]) -> float:
    """Return the mean absolute difference of adjacent pixels, horizontally plus vertically."""
    return sum(pictures.diff(dim=axis).abs().mean().item() for axis in (2, 3))


def picture_features(
    network: "FrozenEncoder", pictures: Float[Tensor, "row channel height width"]
) -> Float32[np.ndarray, "row feature"]:
    """Return the features of pictures of 1 or 3 channels in [0, 1], resized to the network's input."""
    preprocessing = network.description.preprocessing
    assert isinstance(preprocessing, ImagePreprocessing)
    size = (preprocessing.height, preprocessing.width)
    parts = []
    for part in torch.split(pictures, _BATCH_ROWS):
        resized = torch.nn.functional.interpolate(part.float(), size, mode="bilinear", antialias=True)
        levels = (255 * resized.clamp(0, 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)
        parts.append(network.features(list(levels.numpy())))
    return np.concatenate(parts)
