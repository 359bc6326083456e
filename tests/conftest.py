"""A tiny model of every kind of modality, and the bundle it exports to: made once, shared by all tests, changed by none.

Array shapes in annotations are checked through the whole run, so the hook comes before anything of ours is imported. What
needs seconds to import is imported by the fixtures that need it: most tests of the service do not.
"""
# ruff: noqa: E402, PLC0415

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts the cores: tests share them
install_import_hook(["model", "training"], "beartype.beartype")

import hypothesis
import pytest

from model import bundle
from model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality

hypothesis.settings.register_profile("shared", deadline=None)  # a busy machine is no defect of what is tested
hypothesis.settings.load_profile("shared")

if TYPE_CHECKING:
    from torch import Tensor

    from model.vae.multimodal import MultimodalVAE

MakeVAE = Callable[..., "MultimodalVAE"]
MakeRows = Callable[..., dict[str, "Tensor"]]


@pytest.fixture(scope="session")
def tiny_modalities() -> tuple[Modality, ...]:
    """One of each kind."""
    return (
        ImageModality(name="image", channels=1, height=8, width=8),
        TextModality(name="text", length=3, alphabet=" abc"),
        VectorModality(name="vector", size=5, mean=(0.0,) * 5, std=(1.0,) * 5),
        BinaryModality(name="binary", attributes=("red", "round")),
    )


@pytest.fixture(scope="session")
def make_vae() -> MakeVAE:
    """An untrained model of given modalities. What begins at zero holds numbers too, so that every weight counts."""
    import torch

    from model.vae.multimodal import MultimodalVAE

    def make_vae(modalities: Sequence[Modality], *, width: int = 8, beta: float = 2.0, **options: Any) -> MultimodalVAE:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = MultimodalVAE(modalities, latent=6, features=17, hidden=25, width=width, beta=beta, **options)
            for name, weight in vae.named_parameters():
                if name == "refiner.rates.4.weight" or name.endswith(".absent") or ".outer." in name:
                    torch.nn.init.normal_(weight, std=0.2)
        return vae.eval().requires_grad_(False)

    return make_vae


@pytest.fixture(scope="session")
def make_rows() -> MakeRows:
    """Random complete rows, by modality (rows, *shape)."""
    import torch
    from torch import Tensor

    def make_rows(modalities: Sequence[Modality], rows: int, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        arrays = {}
        for modality in modalities:
            shape = (rows, *modality.shape)
            if isinstance(modality, TextModality | CategoricalModality):
                arrays[modality.name] = torch.randint(modality.categories, shape, generator=generator)
            elif isinstance(modality, BinaryModality):
                arrays[modality.name] = torch.randint(2, shape, generator=generator).float()
            elif isinstance(modality, VectorModality):
                arrays[modality.name] = torch.randn(shape, generator=generator)
            else:
                arrays[modality.name] = torch.rand(shape, generator=generator)
        return arrays

    return make_rows


@pytest.fixture(scope="session")
def tiny_vae(tiny_modalities: tuple[Modality, ...], make_vae: MakeVAE) -> "MultimodalVAE":
    return make_vae(tiny_modalities)


@pytest.fixture(scope="session")
def tiny_facts() -> dict[str, Any]:
    """What a manifest holds beside what the model itself says."""
    provenance = {
        "created": "2026-01-01T00:00:00+00:00",
        "code_revision": "unknown",
        "config_sha256": "0" * 64,
        "seed": 0,
        "libraries": {},
        "data": [],
    }
    return {"name": "tiny", "version": "1", "provenance": provenance, "metrics": {}}


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_vae: "MultimodalVAE", make_rows: MakeRows, tiny_facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> bundle.Bundle:
    """``tiny_vae`` on disk, with two noise samples. Copy it before changing anything."""
    from model.vae.export import export_bundle

    path = tmp_path_factory.mktemp("bundles") / "tiny"
    examples = make_rows(tiny_vae.modalities, 15)
    return export_bundle(tiny_vae, path, facts=tiny_facts, samples=2, horizon=3, examples=examples, card="# tiny\n")
