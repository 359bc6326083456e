"""Export of a bundle with random weights: ``python -m tests.benchmarks.untrained LATENT MODALITIES FOLDER``."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality
from concord.model.vae.export import export_bundle
from concord.model.vae.multimodal import MultimodalVAE
from concord.training import config_file
from concord.training.trainable import network_sizes
from tests.support.server import ROOT

# Images have a Gaussian likelihood. The gradient of a Laplace likelihood changes its sign where the mean equals the pixel. With
# random weights a rounding error there can fail the export's comparison of the graphs with PyTorch.
MODALITIES: tuple[Modality, ...] = (
    ImageModality(name="digit", channels=1, height=28, width=28, likelihood="bernoulli"),
    ImageModality(name="photo", channels=3, height=32, width=32, likelihood="gaussian"),
    TextModality(name="word", length=8, alphabet=" abcdefghijklmnopqrstuvwxyz"),
    VectorModality(name="sensor", size=16, mean=(0.0,) * 16, std=(1.0,) * 16),
    BinaryModality(name="attributes", attributes=tuple(f"a{number}" for number in range(40))),
    CategoricalModality(name="species", classes=tuple(f"c{number}" for number in range(10))),
    ImageModality(name="scan", channels=1, height=32, width=32, likelihood="gaussian"),
    TextModality(name="note", length=16, alphabet=" abcdefghijklmnopqrstuvwxyz"),
)
ROWS = 9


def main(latent: int, modalities: int, folder: Path) -> None:
    """Export a model with the network sizes of the digits configuration.

    Args:
        latent: size of z.
        modalities: number of modalities, the first ones of MODALITIES.
        folder: of the bundle.
    """
    torch.manual_seed(0)
    settings = config_file.read(ROOT / "training/configs/digits.toml")
    chosen = MODALITIES[:modalities]
    vae = MultimodalVAE(chosen, replace(network_sizes(settings.network), latent=latent), beta=10.0)
    provenance = {
        "created": "2026-01-01T00:00:00+00:00",
        "code_revision": "unknown",
        "config_sha256": "0" * 64,
        "seed": 0,
        "libraries": {},
        "data": [],
    }
    facts = {"name": "untrained", "version": "1", "provenance": provenance, "metrics": {}}
    examples = {m.name: _random_values(m) for m in chosen}
    export_bundle(vae, folder, facts=facts, samples=4, horizon=2, examples=examples, card="# untrained\n")


def _random_values(modality: Modality) -> torch.Tensor:
    shape = (ROWS, *modality.shape)
    if isinstance(modality, TextModality | CategoricalModality):
        return torch.randint(modality.categories, shape)
    return torch.randint(2, shape).float() if isinstance(modality, BinaryModality) else torch.rand(shape)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
