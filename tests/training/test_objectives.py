"""The terms of training against straightforward autograd and closed forms."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from model.vae.gaussian import Gaussian, antithetic, standard_like
from model.vae.multimodal import MultimodalVAE
from training.data import Batch
from training.objectives import alignment, elbos, every_subset, refine

ROWS, STEPS, SAMPLES = 5, 3, 4


@pytest.fixture
def vae(tiny_vae: MultimodalVAE, make_vae: Any) -> MultimodalVAE:
    """One whose weights learn, for this test alone."""
    return make_vae(tiny_vae.modalities).requires_grad_(True)


@pytest.fixture
def batch(tiny_vae: MultimodalVAE, make_rows: Any) -> Batch:
    """Complete and incomplete rows."""
    present = torch.tensor(
        [[True] * 4, [True, False, False, True], [False, True, False, False], [False] * 3 + [True], [True] * 4]
    )
    return Batch(make_rows(tiny_vae.modalities, ROWS), present, None)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start() -> Gaussian:
    return Gaussian(0.5 * draw(ROWS, 6, seed=1), 0.5 * draw(ROWS, 6, seed=2))


NOISE = antithetic(draw(ROWS, SAMPLES // 2, 6, seed=3))
JUDGES = torch.stack([antithetic(draw(ROWS, SAMPLES // 2, 6, seed=10 + step)) for step in range(STEPS)])


def unrolled(vae: MultimodalVAE, batch: Batch) -> tuple[Tensor, list[Gaussian]]:
    """-sum_t ELBO(lambda_t) with every lambda_t cut from the graph before its step, by plain autograd; and the lambdas."""
    posterior, prior = start(), standard_like(start())
    total, seen = torch.zeros(()), [start()]
    for judge in JUDGES:
        leaf = Gaussian(*(t.detach().requires_grad_() for t in posterior))
        climbed = vae.objective(batch.arrays, batch.present, leaf, prior, NOISE)
        gradient = Gaussian(*torch.autograd.grad(climbed.sum(), leaf))
        after = vae.refiner(posterior, gradient)
        total = total - vae.objective(batch.arrays, batch.present, after, prior, judge).sum()
        posterior = after.detach()
        seen.append(posterior)
    return total, seen


def test_the_surrogate_has_the_gradient_of_the_elbos(vae: MultimodalVAE, batch: Batch) -> None:
    refined = refine(vae, batch, start(), NOISE, STEPS, JUDGES)
    total, _ = unrolled(vae, batch)
    parameters = list(vae.refiner.parameters())
    found = torch.autograd.grad(refined.loss.sum(), parameters)
    expected = torch.autograd.grad(total, parameters)
    assert max(g.abs().max() for g in expected) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_the_surrogate_teaches_the_refiner_alone(vae: MultimodalVAE, batch: Batch) -> None:
    joint = vae.joint(batch.arrays, batch.present)
    refine(vae, batch, joint, NOISE, STEPS, JUDGES).loss.sum().backward()
    taught = {name.partition(".")[0] for name, p in vae.named_parameters() if p.grad is not None}
    assert taught == {"refiner"}


def test_refinement_walks_where_it_says(vae: MultimodalVAE, batch: Batch) -> None:
    refined = refine(vae, batch, start(), NOISE, STEPS, JUDGES)
    _, seen = unrolled(vae, batch)
    torch.testing.assert_close(refined.posterior.mean, seen[-1].mean)
    torch.testing.assert_close(refined.posterior.log_var, seen[-1].log_var)
    assert not refined.posterior.mean.requires_grad


def test_without_judges_nothing_is_learned(vae: MultimodalVAE, batch: Batch) -> None:
    taught, plain = (refine(vae, batch, start(), NOISE, STEPS, judges) for judges in (JUDGES, None))
    assert torch.equal(plain.posterior.mean, taught.posterior.mean)
    assert torch.equal(plain.loss, torch.zeros(ROWS))
    assert not plain.loss.requires_grad


def test_elbos_are_objectives_against_the_prior(vae: MultimodalVAE, batch: Batch) -> None:
    posteriors = [start(), Gaussian(draw(ROWS, 6, seed=5), draw(ROWS, 6, seed=6))]
    noise = draw(ROWS, 2, 6, seed=7)
    for i, found in enumerate(elbos(vae, batch, posteriors, noise)):
        q = posteriors[i]
        expected = vae.objective(batch.arrays, batch.present, q, standard_like(q), noise[:, i : i + 1])
        torch.testing.assert_close(found, expected)


def test_alignment_is_the_kl_to_each_student(vae: MultimodalVAE, batch: Batch) -> None:
    teacher, subsets = start(), every_subset(4)
    divergences, students = alignment(vae, batch, teacher, subsets)
    assert divergences.shape == (15, ROWS)
    for subset, divergence, student in zip(subsets, divergences, students, strict=True):
        seen = batch.present & subset
        expected = vae.aligned(batch.arrays, seen)
        torch.testing.assert_close(student.mean, expected.mean)
        p, q = (Independent(Normal(g.mean, (g.log_var / 2).exp()), 1) for g in (teacher, expected))
        torch.testing.assert_close(divergence, torch.where(seen.any(1), kl_divergence(p, q), torch.zeros(ROWS)))


def test_alignment_goes_student_first_or_both_ways(vae: MultimodalVAE, batch: Batch) -> None:
    teacher, subsets = start(), every_subset(4)
    forward, _ = alignment(vae, batch, teacher, subsets)
    divergences, students = alignment(vae, batch, teacher, subsets, "reverse")
    for subset, divergence, student in zip(subsets, divergences, students, strict=True):
        q, p = (Independent(Normal(g.mean, (g.log_var / 2).exp()), 1) for g in (student, teacher))
        seen = (batch.present & subset).any(1)
        torch.testing.assert_close(divergence, torch.where(seen, kl_divergence(q, p), torch.zeros(ROWS)))
    both, _ = alignment(vae, batch, teacher, subsets, "both")
    torch.testing.assert_close(both, (forward + divergences) / 2)


def test_rows_without_the_subset_teach_nothing(vae: MultimodalVAE, batch: Batch) -> None:
    only_image = torch.tensor([[True, False, False, False]])
    (divergence,), _ = alignment(vae, batch, start(), only_image)
    lacking = ~batch.present[:, 0]
    assert lacking.any()
    assert torch.all(divergence[lacking] == 0)
    assert torch.all(divergence[~lacking] > 0)
    slopes = torch.autograd.grad(divergence[lacking].sum(), list(vae.aligned.parameters()), allow_unused=True)
    assert all(slope is None or torch.all(slope == 0) for slope in slopes)


def test_the_teacher_learns_nothing_from_its_students(vae: MultimodalVAE, batch: Batch) -> None:
    divergences, _ = alignment(vae, batch, vae.joint(batch.arrays, batch.present), every_subset(4))
    divergences.sum().backward()
    taught = {name.partition(".")[0] for name, p in vae.named_parameters() if p.grad is not None}
    assert taught == {"aligned"}


@pytest.mark.parametrize("modalities", range(1, 9))
def test_every_subset_once_singles_first_all_last(modalities: int) -> None:
    subsets = every_subset(modalities)
    rows = [tuple(row) for row in subsets.tolist()]
    assert set(rows) == set(itertools.product([True, False], repeat=modalities)) - {(False,) * modalities}
    assert len(rows) == 2**modalities - 1
    assert torch.equal(subsets[:modalities], torch.eye(modalities, dtype=torch.bool))
    assert rows[-1] == (True,) * modalities
    sizes = subsets.sum(1).tolist()
    assert sizes == sorted(sizes)
