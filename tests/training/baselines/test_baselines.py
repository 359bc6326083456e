"""The objective of each baseline compared with its formula in torch.distributions, and the properties of its posteriors."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from concord.model.modality import VectorModality
from concord.model.vae.gaussian import Gaussian, standard_like
from concord.model.vae.networks import NetworkSizes
from concord.training.baselines import jmvae, mvtcae
from concord.training.baselines.contrastive import Contrastive
from concord.training.baselines.jnf import JNF, MEAN_SAMPLES, ProductOfFlows
from concord.training.config import DEFAULT_MODEL
from concord.training.data.dataset import Batch
from concord.training.models import MODELS
from concord.training.objectives import every_subset
from concord.training.posteriors import MixturePosterior

ROWS, LATENT = 6, 6
BETA = 2.0
SIZES = NetworkSizes(latent=LATENT, features=9, hidden=11, width=4)
BASELINES = [name for name in MODELS if name != DEFAULT_MODEL]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, modalities: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name](modalities, SIZES, beta=BETA)


@pytest.fixture(params=BASELINES)
def model(request: Any, tiny_modalities: Any) -> Any:
    return make(request.param, tiny_modalities)


@pytest.fixture
def batch(tiny_modalities: Any, make_rows: Any) -> Batch:
    """Complete and incomplete rows."""
    present = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    return Batch(make_rows(tiny_modalities, ROWS), present, None)


def losses(model: Any) -> list[Any]:
    if isinstance(model, Contrastive):
        return [model.loss, model.decoder_loss]
    return [model.joint_loss, model.flow_loss] if isinstance(model, JNF) else [model.loss]


def normal(q: Gaussian) -> Independent:
    return Independent(Normal(q.mean, (q.log_var / 2).exp()), 1)


def normal_at(q: Gaussian, *index: Any) -> Independent:
    return normal(Gaussian(q.mean[index], q.log_var[index]))


def prior() -> Independent:
    return Independent(Normal(torch.zeros(LATENT), torch.ones(LATENT)), 1)


def weighted_log_likelihood(model: Any, batch: Batch, row: int, z: Tensor) -> Tensor:
    """Return sum_m w_m log p(x_m | z) over the modalities of a row, for z of shape (latent,)."""
    arrays = {name: array[row : row + 1] for name, array in batch.arrays.items()}
    return model.weighted_log_likelihood(arrays, batch.present[row : row + 1], z.view(1, 1, -1))[0, 0]


def test_loss_is_finite_depends_on_the_seed_only_and_has_gradients(model: Any, batch: Batch) -> None:
    for loss in losses(model):
        (first, figures), (again, _), (other, _) = (loss(batch, seeded(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert all(figure.ndim == 0 and figure.isfinite() for figure in figures.values())
        gradients = torch.autograd.grad(first, list(model.parameters()), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
        assert any(bool(g.any()) for g in gradients if g is not None)


def test_values_of_absent_modalities_have_no_effect(model: Any, batch: Batch) -> None:
    filled = {
        name: torch.where(batch.present[:, i].view(-1, *[1] * (a.ndim - 1)), a, torch.ones_like(a))
        for i, (name, a) in enumerate(batch.arrays.items())
    }
    for loss in losses(model):
        torch.testing.assert_close(loss(Batch(filled, batch.present, None), seeded())[0], loss(batch, seeded())[0])
    mask = batch.present & every_subset(4)[1]
    with torch.no_grad():
        for posterior, expected in zip(*(model.posteriors(a, [mask]) for a in (filled, batch.arrays)), strict=True):
            torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-5, rtol=1e-5)


def test_posterior_samples_have_the_mean_of_the_posterior(model: Any, batch: Batch) -> None:
    masks = [batch.present & every_subset(4)[0], batch.present & every_subset(4)[-1]]
    if isinstance(model, JNF):
        masks[1] = torch.ones(ROWS, 4).bool()  # without Hamiltonian chains, which another test covers
    for mask, q in zip(masks, model.posteriors(batch.arrays, masks), strict=True):
        z = q.sample(900, seeded())
        assert z.shape == (ROWS, 900, LATENT)
        count = MEAN_SAMPLES if isinstance(q, ProductOfFlows) else 900  # the mean of flows is estimated from samples too
        assert torch.all((z.mean(1) - q.mean).abs() < 6 * z.std(1) / count**0.5)
        assert mask.shape == (ROWS, 4)


def test_row_without_modalities_has_the_prior(model: Any, batch: Batch) -> None:
    with torch.no_grad():
        (q,) = model.posteriors(batch.arrays, [torch.zeros(ROWS, 4).bool()])
        z = q.sample(3000, seeded())
    assert z.mean((0, 1)).abs().max() < 0.05
    assert (z.var(1) - 1).abs().max() < 0.2


def test_mvae_loss_sums_the_elbos_of_its_subsets(tiny_modalities: Any, make_rows: Any) -> None:
    """With two modalities the subsets are not random: both, and each single one."""
    model = make("mvae", tiny_modalities[:2])
    arrays = make_rows(tiny_modalities[:2], ROWS)
    everything = Batch(arrays, torch.ones(ROWS, 2).bool(), None)
    loss, figures = model.loss(everything, seeded())
    experts, generator, expected = model.experts(arrays), seeded(), torch.zeros(())
    for subset in ([0, 1], [0], [1]):
        noise = torch.randn(ROWS, 1, LATENT, generator=generator)[:, 0]
        precision = 1 + sum((-experts.log_var[m]).exp() for m in subset)
        mean = sum(experts.mean[m] * (-experts.log_var[m]).exp() for m in subset) / precision
        q = Independent(Normal(mean, precision**-0.5), 1)
        z = mean + precision**-0.5 * noise
        likelihoods = model.log_likelihoods(arrays, z.unsqueeze(1))[:, 0]
        reconstruction = sum(likelihoods[:, m] * model.weights[tiny_modalities[m].name] for m in subset)
        expected = expected - (reconstruction - BETA * kl_divergence(q, prior())).mean()
    torch.testing.assert_close(loss, expected)
    assert figures.keys() == {"elbo"}


def test_mmvae_loss_is_the_stratified_elbo(tiny_modalities: Any, batch: Batch) -> None:
    model = make("mmvae", tiny_modalities)
    loss, _ = model.loss(batch, seeded())
    experts = model.experts(batch.arrays)
    noise = torch.randn(ROWS, 4, LATENT, generator=seeded())
    total = torch.zeros(())
    for row in range(ROWS):
        present = [m for m in range(4) if batch.present[row, m]]
        mixture = MixtureSameFamily(Categorical(logits=torch.zeros(len(present))), normal_at(experts, present, row))
        for m in present:
            z = experts.mean[m, row] + (experts.log_var[m, row] / 2).exp() * noise[row, m]
            ratio = prior().log_prob(z) - mixture.log_prob(z)
            term = weighted_log_likelihood(model, batch, row, z) + BETA * ratio
            total = total - term / len(present) / ROWS
    torch.testing.assert_close(loss, total)


def test_mopoe_loss_bounds_the_kl_by_the_mean_kl_of_the_components(tiny_modalities: Any, batch: Batch) -> None:
    model = make("mopoe", tiny_modalities)
    (mixture,) = model.posteriors(batch.arrays, [batch.present])
    assert isinstance(mixture, MixturePosterior)
    loss, _ = model.loss(batch, seeded())
    z = mixture.sample(1, seeded())[:, 0]
    experts, total = model.experts(batch.arrays), torch.zeros(())
    for row in range(ROWS):
        present = [m for m in range(4) if batch.present[row, m]]
        subsets = [s for n in range(1, 5) for s in itertools.combinations(present, n)]
        divergences = []
        for subset in subsets:
            precision = sum((-experts.log_var[m, row]).exp() for m in subset)
            mean = sum(experts.mean[m, row] * (-experts.log_var[m, row]).exp() for m in subset) / precision
            divergences.append(kl_divergence(Independent(Normal(mean, precision**-0.5), 1), prior()))
        assert int(mixture.active[:, row].sum()) == len(subsets)
        reconstruction = weighted_log_likelihood(model, batch, row, z[row])
        total = total - (reconstruction - BETA * torch.stack(divergences).mean()) / ROWS
        many = mixture.sample(4000, seeded(1))
        mixture_kl = (mixture.log_density(many)[row] - prior().log_prob(many[row])).mean()
        assert mixture_kl < torch.stack(divergences).mean() + 0.1
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("name", ["mmvae", "mopoe"])
def test_mixture_loss_of_one_modality_is_the_elbo_of_a_vae(name: str, tiny_modalities: Any, make_rows: Any) -> None:
    """Exactly for MoPoE, on average for MMVAE, whose KL is estimated from samples."""
    model = make(name, tiny_modalities[:1])
    arrays, rows = make_rows(tiny_modalities[:1], 2), 800
    arrays = {key: array[:1].expand(rows, *array.shape[1:]) for key, array in arrays.items()}
    batch = Batch(arrays, torch.ones(rows, 1).bool(), None)
    q = Gaussian(*(part[0] for part in model.experts(arrays)))
    with torch.no_grad():
        elbo = -model.loss(batch, seeded())[0]
        noise = torch.randn(rows, 1, LATENT, generator=seeded(1))
        elbos = model.objective(arrays, batch.present, q, standard_like(q), noise)
    assert (elbo - elbos.mean()).abs() < 6 * elbos.std() / rows**0.5 + 0.3
    if name == "mopoe":
        mixture = model.posteriors(arrays, [batch.present])[0]
        torch.testing.assert_close(mixture.mean, q.mean)
        z = mixture.sample(1, seeded())
        expected = model.weighted_log_likelihood(arrays, batch.present, z)[:, 0] - BETA * kl_divergence(normal(q), prior())
        torch.testing.assert_close(elbo, expected.mean())


def test_mvtcae_loss_of_two_gaussians_matches_the_closed_form(make_rows: Any) -> None:
    modalities = [VectorModality(name=name, size=3, mean=(0.0,) * 3, std=(1.0,) * 3) for name in "ab"]
    model = make("mvtcae", modalities)
    batch = Batch(make_rows(modalities, ROWS), torch.ones(ROWS, 2).bool(), None)
    loss, figures = model.loss(batch, seeded())
    experts = model.experts(batch.arrays)
    precision = (-experts.log_var).exp()
    mean, variance = (precision * experts.mean).sum(0) / precision.sum(0), 1 / precision.sum(0)
    q = Independent(Normal(mean, variance.sqrt()), 1)
    z = mean + variance.sqrt() * torch.randn(ROWS, 1, LATENT, generator=seeded())[:, 0]
    reconstruction = torch.stack([weighted_log_likelihood(model, batch, row, z[row]) for row in range(ROWS)])
    alpha = mvtcae.ALPHA
    to_experts = sum(kl_divergence(q, normal_at(experts, m)) for m in range(2))
    to_prior = kl_divergence(q, prior())
    bound = (2 - alpha) / 2 * reconstruction - BETA * ((1 - alpha) * to_prior + alpha / 2 * to_experts)
    torch.testing.assert_close(loss, -bound.mean())
    torch.testing.assert_close(figures["elbo"], (reconstruction - BETA * to_prior).mean())


def test_jmvae_loss_aligns_experts_with_the_joint_posterior(tiny_modalities: Any, batch: Batch) -> None:
    model = make("jmvae", tiny_modalities)
    loss, figures = model.loss(batch, seeded())
    joint, experts = model.joint(batch.arrays, batch.present), model.experts(batch.arrays)
    align = torch.zeros(())
    for row, m in zip(*batch.present.nonzero(as_tuple=True), strict=True):
        align = align + kl_divergence(normal_at(joint, row), normal_at(experts, m, row)) / ROWS
    noise = torch.randn(ROWS, 1, LATENT, generator=seeded())
    elbo = model.objective(batch.arrays, batch.present, joint, standard_like(joint), noise).mean()
    torch.testing.assert_close(loss, jmvae.ALPHA * BETA * align - elbo)
    torch.testing.assert_close(figures["align"], align)
    (q,) = model.posteriors(batch.arrays, [batch.present])
    complete = batch.present.all(1)
    torch.testing.assert_close(q.mean[complete], joint.mean[complete])
    unimodal = batch.present[:, 1] & (batch.present.sum(1) == 1)
    torch.testing.assert_close(q.mean[unimodal], experts.mean[1, unimodal])


def test_jnf_stages_train_the_vae_then_the_flows_only(tiny_modalities: Any, batch: Batch) -> None:
    model = make("jnf", tiny_modalities)
    for loss, parts in ((model.joint_loss, {"joint", "decoders"}), (model.flow_loss, {"trunks", "_flows"})):
        model.zero_grad()
        loss(batch, seeded())[0].backward()
        trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert trained == parts


def test_jnf_flow_loss_is_the_negative_log_density_of_joint_samples(tiny_modalities: Any, batch: Batch) -> None:
    model = make("jnf", tiny_modalities)
    loss, _ = model.flow_loss(batch, seeded())
    q = model.joint(batch.arrays, batch.present)
    z = q.mean + (q.log_var / 2).exp() * torch.randn(ROWS, 1, LATENT, generator=seeded())[:, 0]
    total = torch.zeros(())
    singles = [batch.present & subset for subset in every_subset(4)[:4]]
    for mask, unimodal in zip(singles, model.posteriors(batch.arrays, singles), strict=True):
        # Couplings are initialised as the identity: an untrained flow is its base Gaussian.
        density = unimodal.log_density(z.unsqueeze(1))[:, 0]
        total = total - torch.where(mask.any(1), density, 0.0).sum() / ROWS
    torch.testing.assert_close(loss, total)


def test_jnf_samples_come_from_the_product_of_its_flows(tiny_modalities: Any, batch: Batch) -> None:
    """Untrained flows are Gaussians, whose product has a closed form."""
    model = make("jnf", tiny_modalities)
    with torch.no_grad():
        mask = torch.tensor([True, True, False, False]).expand(ROWS, 4)
        (q,) = model.posteriors(batch.arrays, [mask])
        z = q.sample(300, seeded())
        mean, log_var = zip(
            *(model.flows[n].base(model.trunks[n](batch.arrays[n])).chunk(2, -1) for n in ("image", "text")), strict=True
        )
        precision = [(-v).exp() for v in log_var]
        total = (precision[0] + precision[1] - 1).clamp(min=1e-3)
        expected = (precision[0] * mean[0] + precision[1] * mean[1]) / total
    proper = total > 0.5
    assert proper.float().mean() > 0.5
    assert ((z.mean(1) - expected).abs()[proper] < 0.4).float().mean() > 0.95
    with pytest.raises(NotImplementedError, match="up to a factor"):
        q.log_density(z)


def test_stages_have_the_epochs_and_batch_size_of_concord(model: Any, make_config: Any) -> None:
    settings = make_config(joint={"epochs": 3}, refiner={"epochs": 2}, align={"epochs": 4})
    plan = model.stages(settings)
    assert sum(stage.settings.epochs for stage in plan) == 9
    assert {stage.settings.batch_size for stage in plan} == {settings.joint.batch_size}
