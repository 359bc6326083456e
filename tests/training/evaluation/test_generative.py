"""Comparison metrics of models whose posteriors are not Gaussian."""

from typing import Any

import pytest
import torch

from concord.model.vae.gaussian import standard_like
from concord.training import fit
from concord.training.baselines import jnf
from concord.training.concord import Concord
from concord.training.data import dataset
from concord.training.data.dataset import Batch
from concord.training.evaluation import generative
from concord.training.evaluation.generative import evaluate_comparison
from concord.training.evaluation.metrics.frozen_classifier import WordClassifier
from concord.training.objectives import named_subsets
from concord.training.progress import Progress


@pytest.mark.parametrize("model", ["mmvae", "jnf"])
def test_evaluate_comparison_gives_none_for_undefined_metrics(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """A mixture has no gap to a Gaussian. The models are untrained."""
    monkeypatch.setattr(generative, "LIKELIHOOD_SAMPLES", 16)
    monkeypatch.setattr(jnf, "HMC_STEPS", 2)  # other tests check the chains
    settings = make_config(photo=True, model=model)
    test = dataset.load(settings, "test")
    word = {m.name: WordClassifier(m, test.class_names) for m in test.modalities if m.name == "word"}

    def adam_limit(*arguments: Any) -> Any:
        return pytest.fail("called for a mixture") if model == "mmvae" else arguments[2]

    monkeypatch.setattr(generative, "adam_limit", adam_limit)
    metrics = evaluate_comparison(settings, fit.build(settings, test.modalities), test, word, 30, Progress())
    assert metrics["rows"] == 30
    assert metrics["gap_closed"] is None
    assert (metrics["gap"] is None) == (model == "mmvae")
    assert metrics["coherence"]["cross"].keys() == {"digit", "photo", "digit+photo"}  # only the word has a classifier
    assert "refined" not in metrics
    assert metrics["log_likelihood"]["best"] > metrics["log_likelihood"]["joint"]
    fewer = evaluate_comparison(settings, fit.build(settings, test.modalities), test, word, 30, Progress(), bounds=False)
    assert metrics.keys() - fewer.keys() == {"gap", "gap_closed", "log_likelihood"}


def test_named_subsets_are_ordered_by_size() -> None:
    assert list(named_subsets(["a", "b", "c"])) == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]


def test_refinement_path_repeats_refine_step_with_fixed_antithetic_noise(tiny_vae: Concord, make_rows: Any) -> None:
    batch = Batch(make_rows(tiny_vae.modalities, 6), torch.ones(6, 4).bool(), None)
    start = tiny_vae.aligned(batch.arrays, batch.present)
    prior = standard_like(start)
    path = tiny_vae.refinement_path(batch, start, prior, 2, 4, torch.Generator().manual_seed(0))
    assert len(path) == 3
    expected = start
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(6, 2, tiny_vae.latent, generator=generator)
    noise = torch.stack((half, -half), 2).flatten(1, 2)
    for posterior in path:
        torch.testing.assert_close(posterior.mean, expected.mean)
        expected, _ = tiny_vae.refine_step(batch.arrays, batch.present, expected, prior, noise)
