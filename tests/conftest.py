"""Fixtures for all tests: a tiny model with four kinds of modalities, and its bundle. Tests must not change them.

The import hook checks the array shapes in annotations during the whole run, so it is installed before any of our packages is
imported. Libraries that need seconds to import are imported inside the fixtures that use them.
"""
# ruff: noqa: E402, PLC0415

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch is imported
install_import_hook(["concord.model", "concord.training"], "beartype.beartype")

import hypothesis
import pytest
from filelock import FileLock

from concord.model import bundle
from concord.model.modality import BinaryModality, CategoricalModality, ImageModality, Modality, TextModality, VectorModality

hypothesis.settings.register_profile("shared", deadline=None)  # a slow machine must not fail a test
hypothesis.settings.load_profile("shared")

if TYPE_CHECKING:
    from torch import Tensor

    from concord.model.vae.multimodal import MultimodalVAE

MakeVAE = Callable[..., "MultimodalVAE"]
MakeRows = Callable[..., dict[str, "Tensor"]]
MadeOnce = Callable[[str, Callable[[Path], Any]], Path]
SLOW_FIXTURES = {"tiny_bundle", "sentence_bundle", "traced_step"}
"""Fixtures that trace a model, which takes seconds. Tests that use them are marked as slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # else the last worker has a long file when the others are done


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Function that returns the path of a name, which one of the workers has made with the given function."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def made_once(name: str, make: Callable[[Path], Any]) -> Path:
        path = shared / name
        with FileLock(f"{path}.lock"):
            if not (made := Path(f"{path}.made")).exists():
                make(path)
                made.touch()
        return path

    return made_once


@pytest.fixture(scope="session")
def tiny_modalities() -> tuple[Modality, ...]:
    """An image, a text, a vector and a binary modality."""
    return (
        ImageModality(name="image", channels=1, height=8, width=8),
        TextModality(name="text", length=3, alphabet=" abc"),
        VectorModality(name="vector", size=5, mean=(0.0,) * 5, std=(1.0,) * 5),
        BinaryModality(name="binary", attributes=("red", "round")),
    )


@pytest.fixture(scope="session")
def make_vae() -> MakeVAE:
    """Function that makes an untrained model. Weights initialised to zero are random here, so that all weights matter."""
    import torch

    from concord.model.vae.multimodal import MultimodalVAE
    from concord.model.vae.networks import NetworkSizes

    def make_vae(
        modalities: Sequence[Modality],
        *,
        kind: type[MultimodalVAE] = MultimodalVAE,
        width: int = 8,
        blocks: int = 0,
        beta: float = 2.0,
        **options: Any,
    ) -> MultimodalVAE:
        sizes = NetworkSizes(latent=6, features=17, hidden=25, width=width, blocks=blocks)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = kind(modalities, sizes, beta=beta, **options)
            for name, weight in vae.named_parameters():
                if name == "refiner.rates.4.weight" or name.endswith(".absent") or ".outer." in name:
                    torch.nn.init.normal_(weight, std=0.2)
        return vae.eval().requires_grad_(False)

    return make_vae


@pytest.fixture(scope="session")
def make_rows() -> MakeRows:
    """Function that makes random complete rows: (rows, *shape) by modality."""
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
    """Fields of a manifest that do not follow from the model."""
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
    tiny_vae: "MultimodalVAE", make_rows: MakeRows, tiny_facts: dict[str, Any], made_once: MadeOnce
) -> bundle.Bundle:
    """``tiny_vae`` as a bundle on disk, with two noise samples. Copy it before you change it."""

    def export(path: Path) -> None:
        from concord.model.vae.export import export_bundle

        examples = make_rows(tiny_vae.modalities, 15)
        export_bundle(tiny_vae, path, facts=tiny_facts, samples=2, horizon=3, examples=examples, card="# tiny\n")

    return bundle.read(made_once("tiny", export))


@pytest.fixture(scope="session")
def sentence_modalities() -> tuple[Modality, ...]:
    """An image, and two texts with the autoregressive likelihood: one of words, one of characters."""
    words = ("a", "red", "blue", "bird", "with")
    return (
        ImageModality(name="image", channels=1, height=8, width=8),
        TextModality(name="caption", length=7, unit="word", vocabulary=words, likelihood="autoregressive"),
        TextModality(name="code", length=5, alphabet=" xyz", likelihood="autoregressive"),
    )


@pytest.fixture(scope="session")
def sentence_vae(sentence_modalities: tuple[Modality, ...], make_vae: MakeVAE) -> "MultimodalVAE":
    return make_vae(sentence_modalities)


@pytest.fixture(scope="session")
def sentence_rows(sentence_modalities: tuple[Modality, ...], make_rows: MakeRows) -> dict[str, "Tensor"]:
    """Complete rows, with captions of each length."""
    import torch

    arrays = make_rows(sentence_modalities, 14)
    lengths = 1 + torch.arange(14).unsqueeze(1) % 7
    arrays["caption"] = torch.where(torch.arange(7) < lengths, arrays["caption"].clamp(min=1), 0)
    return arrays


@pytest.fixture(scope="session")
def sentence_bundle(
    sentence_vae: "MultimodalVAE",
    sentence_rows: dict[str, "Tensor"],
    tiny_facts: dict[str, Any],
    made_once: MadeOnce,
) -> bundle.Bundle:
    """``sentence_vae`` as a bundle on disk, with two noise samples."""

    def export(path: Path) -> None:
        from concord.model.vae.export import export_bundle

        facts = {**tiny_facts, "name": "sentences"}
        export_bundle(sentence_vae, path, facts=facts, samples=2, horizon=3, examples=sentence_rows, card="# sentences\n")

    return bundle.read(made_once("sentences", export))
