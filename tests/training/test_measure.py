"""Figures of models whose posteriors are no Gaussians, and of refinement as the service does it."""

from typing import Any

import pytest
import torch

from model.vae.gaussian import standard_like
from model.vae.multimodal import MultimodalVAE
from training import config, data, fit, measure
from training.baselines import jnf
from training.data import Batch
from training.measure import measure as measured
from training.measure import refined_path
from training.metrics.judge import WordJudge
from training.objectives import named_subsets
from training.progress import Progress


@pytest.mark.parametrize("model", ["mmvae", "jnf"])
def test_what_cannot_be_said_is_null(make_config: Any, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Of untrained models: a mixture has no gap of its family, a product of flows no density."""
    monkeypatch.setattr(measure, "LIKELIHOOD_SAMPLES", 16)
    monkeypatch.setattr(jnf, "MOVES", 2)  # what chains reach has a test of its own
    settings = make_config(photo=True, model=model)
    test = data.load(settings, "test")
    word = {m.name: WordJudge(m, test.class_names) for m in test.modalities if m.name == "word"}
    monkeypatch.setattr(measure, "adam_limit", lambda *_: pytest.fail("no limit") if model == "mmvae" else _[2])
    figures = measured(settings, fit.build(settings, test), test, word, 30, Progress())
    assert figures["rows"] == 30
    assert figures["gap_closed"] is None
    assert (figures["gap"] is None) == (model == "mmvae")
    conditional = figures["log_likelihood"]["conditional"]
    assert {source for source, value in conditional.items() if value is None} == (
        {"digit+photo", "digit+word", "photo+word"} if model == "jnf" else set()
    )
    assert figures["coherence"]["cross"].keys() == {"digit", "photo", "digit+photo"}  # the judged word is no target of itself
    assert "refined" not in figures


def test_subsets_by_name() -> None:
    assert list(named_subsets(["a", "b", "c"])) == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]


def test_the_path_of_refinement_climbs(tiny_vae: MultimodalVAE, make_rows: Any, make_config: Any) -> None:
    batch = Batch(make_rows(tiny_vae.modalities, 6), torch.ones(6, 4).bool(), None)
    settings: config.Config = make_config(refiner={"serving_samples": 4})
    start = tiny_vae.aligned(batch.arrays, batch.present)
    prior = standard_like(start)
    path = refined_path(settings, tiny_vae, batch, start, prior, 2, torch.Generator().manual_seed(0))
    assert len(path) == 3
    expected = start
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(6, 2, tiny_vae.latent, generator=generator)
    noise = torch.stack((half, -half), 2).flatten(1, 2)
    for found in path:
        torch.testing.assert_close(found.mean, expected.mean)
        expected, _ = tiny_vae.refine_step(batch.arrays, batch.present, expected, prior, noise)
