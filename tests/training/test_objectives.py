"""The terms of training, compared with plain autograd and closed forms."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from concord.model.vae.gaussian import Gaussian, antithetic, standard_like
from concord.model.vae.multimodal import MultimodalVAE
from concord.training.data.dataset import Batch
from concord.training.objectives import alignment_divergences, contrastive_loss, elbos, every_subset, prediction_loss, refine

ROWS, STEPS, SAMPLES = 5, 3, 4


@pytest.fixture
def vae(tiny_vae: MultimodalVAE, make_vae: Any) -> MultimodalVAE:
    """A model with trainable weights, for one test only."""
    return make_vae(tiny_vae.modalities).requires_grad_(True)


@pytest.fixture
def batch(tiny_vae: MultimodalVAE, make_rows: Any) -> Batch:
    """Complete and incomplete rows."""
    present = torch.tensor(
        [[True] * 4, [True, False, False, True], [False, True, False, False], [False] * 3 + [True], [True] * 4]
    )
    return Batch(make_rows(tiny_vae.modalities, ROWS), present, None)


def random_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start_posterior() -> Gaussian:
    return Gaussian(0.5 * random_normal(ROWS, 6, seed=1), 0.5 * random_normal(ROWS, 6, seed=2))


NOISE = antithetic(random_normal(ROWS, SAMPLES // 2, 6, seed=3))
EVALUATION_NOISE = torch.stack([antithetic(random_normal(ROWS, SAMPLES // 2, 6, seed=10 + step)) for step in range(STEPS)])


def unrolled(vae: MultimodalVAE, batch: Batch) -> tuple[Tensor, list[Gaussian]]:
    """Return -sum_t ELBO(lambda_t), with every lambda_t detached before its step, by plain autograd; and the lambdas."""
    posterior, prior = start_posterior(), standard_like(start_posterior())
    total, path = torch.zeros(()), [start_posterior()]
    for evaluation_noise in EVALUATION_NOISE:
        leaf = Gaussian(*(t.detach().requires_grad_() for t in posterior))
        objective = vae.objective(batch.arrays, batch.present, leaf, prior, NOISE)
        gradient = Gaussian(*torch.autograd.grad(objective.sum(), leaf))
        refined = vae.refiner(posterior, gradient)
        total = total - vae.objective(batch.arrays, batch.present, refined, prior, evaluation_noise).sum()
        posterior = refined.detach()
        path.append(posterior)
    return total, path


def trained_parts(vae: MultimodalVAE) -> set[str]:
    return {name.partition(".")[0] for name, p in vae.named_parameters() if p.grad is not None}


def test_refiner_loss_has_the_gradient_of_the_elbos(vae: MultimodalVAE, batch: Batch) -> None:
    result = refine(vae, batch, start_posterior(), NOISE, STEPS, EVALUATION_NOISE)
    total, _ = unrolled(vae, batch)
    parameters = list(vae.refiner.parameters())
    gradients = torch.autograd.grad(result.refiner_loss.sum(), parameters)
    expected = torch.autograd.grad(total, parameters)
    assert max(g.abs().max() for g in expected) > 1
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


def test_refiner_loss_trains_the_refiner_only(vae: MultimodalVAE, batch: Batch) -> None:
    joint = vae.joint(batch.arrays, batch.present)
    refine(vae, batch, joint, NOISE, STEPS, EVALUATION_NOISE).refiner_loss.sum().backward()
    assert trained_parts(vae) == {"refiner"}


def test_refine_returns_the_last_posterior_detached(vae: MultimodalVAE, batch: Batch) -> None:
    result = refine(vae, batch, start_posterior(), NOISE, STEPS, EVALUATION_NOISE)
    _, path = unrolled(vae, batch)
    torch.testing.assert_close(result.posterior.mean, path[-1].mean)
    torch.testing.assert_close(result.posterior.log_var, path[-1].log_var)
    assert not result.posterior.mean.requires_grad


def test_refine_without_evaluation_noise_trains_nothing(vae: MultimodalVAE, batch: Batch) -> None:
    training, plain = (refine(vae, batch, start_posterior(), NOISE, STEPS, noise) for noise in (EVALUATION_NOISE, None))
    assert torch.equal(plain.posterior.mean, training.posterior.mean)
    assert torch.equal(plain.refiner_loss, torch.zeros(ROWS))
    assert not plain.refiner_loss.requires_grad


def test_elbos_are_objectives_with_the_prior_as_anchor(vae: MultimodalVAE, batch: Batch) -> None:
    posteriors = [start_posterior(), Gaussian(random_normal(ROWS, 6, seed=5), random_normal(ROWS, 6, seed=6))]
    noise = random_normal(ROWS, 2, 6, seed=7)
    for i, elbo in enumerate(elbos(vae, batch, posteriors, noise)):
        q = posteriors[i]
        expected = vae.objective(batch.arrays, batch.present, q, standard_like(q), noise[:, i : i + 1])
        torch.testing.assert_close(elbo, expected)


def test_forward_divergence_is_the_kl_from_teacher_to_student(vae: MultimodalVAE, batch: Batch) -> None:
    teacher, subsets = start_posterior(), every_subset(4)
    divergences, students = alignment_divergences(vae, batch, teacher, subsets)
    assert divergences.shape == (15, ROWS)
    for subset, divergence, student in zip(subsets, divergences, students, strict=True):
        present = batch.present & subset
        expected = vae.aligned(batch.arrays, present)
        torch.testing.assert_close(student.mean, expected.mean)
        p, q = (Independent(Normal(g.mean, (g.log_var / 2).exp()), 1) for g in (teacher, expected))
        torch.testing.assert_close(divergence, torch.where(present.any(1), kl_divergence(p, q), torch.zeros(ROWS)))


def test_reverse_divergence_is_the_kl_from_student_to_teacher_and_both_is_the_mean(vae: MultimodalVAE, batch: Batch) -> None:
    teacher, subsets = start_posterior(), every_subset(4)
    forward, _ = alignment_divergences(vae, batch, teacher, subsets)
    divergences, students = alignment_divergences(vae, batch, teacher, subsets, "reverse")
    for subset, divergence, student in zip(subsets, divergences, students, strict=True):
        q, p = (Independent(Normal(g.mean, (g.log_var / 2).exp()), 1) for g in (student, teacher))
        has_subset = (batch.present & subset).any(1)
        torch.testing.assert_close(divergence, torch.where(has_subset, kl_divergence(q, p), torch.zeros(ROWS)))
    both, _ = alignment_divergences(vae, batch, teacher, subsets, "both")
    torch.testing.assert_close(both, (forward + divergences) / 2)


def test_rows_without_the_subset_have_no_divergence_and_no_gradient(vae: MultimodalVAE, batch: Batch) -> None:
    image_only = torch.tensor([[True, False, False, False]])
    (divergence,), _ = alignment_divergences(vae, batch, start_posterior(), image_only)
    lacking = ~batch.present[:, 0]
    assert lacking.any()
    assert torch.all(divergence[lacking] == 0)
    assert torch.all(divergence[~lacking] > 0)
    gradients = torch.autograd.grad(divergence[lacking].sum(), list(vae.aligned.parameters()), allow_unused=True)
    assert all(gradient is None or torch.all(gradient == 0) for gradient in gradients)


def test_alignment_does_not_train_the_teacher(vae: MultimodalVAE, batch: Batch) -> None:
    teacher = vae.joint(batch.arrays, batch.present)
    divergences, _ = alignment_divergences(vae, batch, teacher, every_subset(4))
    divergences.sum().backward()
    assert trained_parts(vae) == {"aligned"}


@pytest.mark.parametrize("modalities", range(1, 9))
def test_every_subset_is_listed_once_by_size(modalities: int) -> None:
    subsets = every_subset(modalities)
    rows = [tuple(row) for row in subsets.tolist()]
    assert set(rows) == set(itertools.product([True, False], repeat=modalities)) - {(False,) * modalities}
    assert len(rows) == 2**modalities - 1
    assert torch.equal(subsets[:modalities], torch.eye(modalities, dtype=torch.bool))
    assert rows[-1] == (True,) * modalities
    sizes = subsets.sum(1).tolist()
    assert sizes == sorted(sizes)


TEMPERATURE = 0.1


def contrast(embeddings: Tensor, present: Tensor | None = None, groups: Tensor | None = None) -> float:
    present = torch.ones(embeddings.shape[1::-1], dtype=torch.bool) if present is None else present
    return float(contrastive_loss(embeddings, present, TEMPERATURE, groups))


def test_contrastive_loss_of_perfectly_aligned_embeddings_is_that_of_orthogonal_negatives() -> None:
    """Lengths have no effect."""
    aligned = torch.stack([torch.eye(8), 3 * torch.eye(8)])
    assert contrast(aligned) == pytest.approx(math.log(1 + 7 * math.exp(-1 / TEMPERATURE)), rel=1e-3)


def test_contrastive_loss_of_equal_embeddings_is_that_of_a_guess() -> None:
    assert contrast(torch.ones(3, 8, 5)) == pytest.approx(math.log(8))


def test_contrastive_loss_of_independent_embeddings_is_above_that_of_a_guess() -> None:
    assert contrast(random_normal(2, 64, 16, seed=1)) > math.log(64)


def test_contrastive_loss_is_the_mean_cross_entropy_of_both_directions() -> None:
    embeddings = random_normal(2, 6, 4, seed=2)
    one, other = (part / part.norm(dim=1, keepdim=True) for part in embeddings)
    probabilities = (one @ other.T / TEMPERATURE).exp()
    own = probabilities.diagonal()
    expected = -(own / probabilities.sum(1)).log().mean() / 2 - (own / probabilities.sum(0)).log().mean() / 2
    assert contrast(embeddings) == pytest.approx(float(expected), rel=1e-5)


def test_contrastive_loss_takes_negatives_from_rows_that_lack_the_query() -> None:
    embeddings = torch.stack([torch.eye(4), torch.eye(4)])
    partial = torch.tensor([[True, True], [True, True], [False, True], [False, True]])
    one, other = (math.log(1 + count * math.exp(-1 / TEMPERATURE)) for count in (3, 1))
    assert contrast(embeddings, partial) == pytest.approx((one + other) / 2, rel=1e-3)


def test_contrastive_loss_weighs_pairs_by_the_square_root_of_their_rows() -> None:
    """Of nine rows with all embeddings equal, four have the third modality: a guess of nine, or of four."""
    present = torch.ones(9, 3, dtype=torch.bool)
    present[4:, 2] = False
    guesses = [(3.0, math.log(9)), (3.0, math.log(9))]  # rows without the third modality are negatives where it is the query
    guesses += [(2.0, math.log(size)) for size in (9, 4, 9, 4)]
    expected = sum(weight * loss for weight, loss in guesses) / sum(weight for weight, _ in guesses)
    assert contrast(torch.ones(3, 9, 5), present) == pytest.approx(expected)


def test_contrastive_loss_ignores_absent_modalities() -> None:
    embeddings = random_normal(3, 6, 4, seed=3)
    present = torch.ones(6, 3, dtype=torch.bool)
    present[:3, 1], present[5] = False, torch.tensor([True, False, False])
    filled = embeddings.clone()
    filled[~present.T] = math.nan
    leaf = filled.requires_grad_()
    loss = contrastive_loss(leaf, present, TEMPERATURE)
    assert loss.item() == pytest.approx(contrast(embeddings, present))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.isfinite().all()
    assert not gradient[~present.T].any()


def test_contrastive_loss_without_pairs_is_zero() -> None:
    leaf = random_normal(2, 3, 4, seed=4).requires_grad_()
    present = torch.tensor([[True, False]] * 3)
    loss = contrastive_loss(leaf, present, TEMPERATURE)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()


def test_rows_of_the_same_group_are_no_negatives() -> None:
    """Two rows of a group have the same embedding. As negatives they would make it a guess."""
    embeddings = torch.eye(4).repeat_interleave(2, dim=0).repeat(2, 1, 1)
    groups, distinct = torch.arange(4).repeat_interleave(2), torch.arange(8)
    six = 6 * math.exp(-1 / TEMPERATURE)
    assert contrast(embeddings, groups=groups.expand(2, -1)) == pytest.approx(math.log(1 + six), rel=1e-3)
    one_of_them = contrast(embeddings, groups=torch.stack([groups, distinct]))
    assert one_of_them == pytest.approx(math.log(1 + six), rel=1e-3), "the query's group, or the gallery's"
    assert contrast(embeddings, groups=distinct.expand(2, -1)) == contrast(embeddings)
    assert contrast(embeddings) == pytest.approx(math.log(2 + six), rel=1e-3)


def test_prediction_loss_is_the_mean_over_pairs_of_a_target_and_a_source(tiny_vae: MultimodalVAE, make_rows: Any) -> None:
    names = [m.name for m in tiny_vae.modalities]
    arrays = make_rows(tiny_vae.modalities, 3)
    present = torch.ones(3, len(names), dtype=torch.bool)
    embeddings = random_normal(3, len(names), tiny_vae.latent, seed=5)
    targets = [i for i, m in enumerate(tiny_vae.modalities) if m.kind in ("vector", "binary", "categorical")]
    assert targets
    terms = []
    sources = [0, targets[-1]]
    for target, source in itertools.product(targets, sources):
        if source != target:
            nats = tiny_vae.log_likelihoods(arrays, embeddings[:, source : source + 1])[:, 0, target]
            terms.append(-nats / math.prod(tiny_vae.modalities[target].shape))
    expected = torch.stack(terms).mean(0)
    from_sources = ~torch.eye(len(names), dtype=torch.bool) & torch.tensor([m in sources for m in range(len(names))])
    loss = prediction_loss(tiny_vae, Batch(arrays, present, None), embeddings, present, from_sources)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    present[1], present[1, targets[0]] = False, True
    embeddings[1] = math.nan
    loss = prediction_loss(tiny_vae, Batch(arrays, present, None), embeddings, present, from_sources)
    torch.testing.assert_close(loss, torch.tensor([expected[0], 0.0, expected[2]]), rtol=1e-4, atol=1e-5)
