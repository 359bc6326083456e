"""Each rival's objective against its formula written out with torch.distributions, and what its posteriors promise."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from model.modality import VectorModality
from model.vae.gaussian import Gaussian, standard_like
from training import baselines
from training.baselines import MODELS, jmvae, mvtcae
from training.baselines.jnf import JNF, MEAN_SAMPLES, ProductOfFlows
from training.data import Batch
from training.objectives import every_subset
from training.posteriors import MixturePosterior, posteriors

ROWS, LATENT = 6, 6
SIZES = {"latent": LATENT, "features": 9, "hidden": 11, "width": 4, "beta": 2.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, modalities: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name](modalities, **SIZES)


@pytest.fixture(params=MODELS)
def rival(request: Any, tiny_modalities: Any) -> Any:
    return make(request.param, tiny_modalities)


@pytest.fixture
def batch(tiny_modalities: Any, make_rows: Any) -> Batch:
    """Complete and incomplete rows."""
    present = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    return Batch(make_rows(tiny_modalities, ROWS), present, None)


def losses(rival: Any) -> list[Any]:
    return [rival.joint_loss, rival.flow_loss] if isinstance(rival, JNF) else [rival.loss]


def normal(q: Gaussian) -> Independent:
    return Independent(Normal(q.mean, (q.log_var / 2).exp()), 1)


def of_row(q: Gaussian, *index: Any) -> Independent:
    return normal(Gaussian(q.mean[index], q.log_var[index]))


def prior() -> Independent:
    return Independent(Normal(torch.zeros(LATENT), torch.ones(LATENT)), 1)


def weighted(rival: Any, batch: Batch, row: int, z: Tensor) -> Tensor:
    """sum_m w_m log p(x_m | z) of what a row has, z (latent,)."""
    one = {name: array[row : row + 1] for name, array in batch.arrays.items()}
    return rival.evidences(one, batch.present[row : row + 1], z.view(1, 1, -1))[0, 0]


def test_losses_are_numbers_that_depend_on_the_seed_and_teach(rival: Any, batch: Batch) -> None:
    for loss in losses(rival):
        (first, figures), (again, _), (other, _) = (loss(batch, seeded(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert all(figure.ndim == 0 and figure.isfinite() for figure in figures.values())
        slopes = torch.autograd.grad(first, list(rival.parameters()), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in slopes if g is not None)
        assert any(bool(g.any()) for g in slopes if g is not None)


def test_what_is_absent_changes_nothing(rival: Any, batch: Batch) -> None:
    filled = {
        name: torch.where(batch.present[:, i].view(-1, *[1] * (a.ndim - 1)), a, torch.ones_like(a))
        for i, (name, a) in enumerate(batch.arrays.items())
    }
    for loss in losses(rival):
        torch.testing.assert_close(loss(Batch(filled, batch.present, None), seeded())[0], loss(batch, seeded())[0])
    seen = batch.present & every_subset(4)[1]
    with torch.no_grad():
        for one, other in zip(*(posteriors(rival, a, [seen]) for a in (filled, batch.arrays)), strict=True):
            torch.testing.assert_close(one.mean, other.mean, atol=1e-5, rtol=1e-5)


def test_posteriors_of_every_subset(rival: Any, batch: Batch) -> None:
    """Right shapes, and means that the samples have."""
    masks = [batch.present & every_subset(4)[0], batch.present & every_subset(4)[-1]]
    if isinstance(rival, JNF):
        masks[1] = torch.ones(ROWS, 4).bool()  # no chains: they have a test of their own
    for seen, q in zip(masks, posteriors(rival, batch.arrays, masks), strict=True):
        z = q.sample(900, seeded())
        assert z.shape == (ROWS, 900, LATENT)
        fewest = MEAN_SAMPLES if isinstance(q, ProductOfFlows) else 900  # a flow's mean is a sample's too
        assert torch.all((z.mean(1) - q.mean).abs() < 6 * z.std(1) / fewest**0.5)
        assert seen.shape == (ROWS, 4)


def test_a_row_without_any_of_the_subset_has_the_prior(rival: Any, batch: Batch) -> None:
    with torch.no_grad():
        (q,) = posteriors(rival, batch.arrays, [torch.zeros(ROWS, 4).bool()])
        z = q.sample(3000, seeded())
    assert z.mean((0, 1)).abs().max() < 0.05
    assert (z.var(1) - 1).abs().max() < 0.2


def test_mvae_sums_the_elbos_of_its_subsets(tiny_modalities: Any, make_rows: Any) -> None:
    """With two modalities nothing is left to chance: both, and each alone."""
    rival = make("mvae", tiny_modalities[:2])
    arrays = make_rows(tiny_modalities[:2], ROWS)
    everything = Batch(arrays, torch.ones(ROWS, 2).bool(), None)
    loss, figures = rival.loss(everything, seeded())
    experts, generator, expected = rival.experts(arrays), seeded(), torch.zeros(())
    for subset in ([0, 1], [0], [1]):
        noise = torch.randn(ROWS, 1, LATENT, generator=generator)[:, 0]
        precision = 1 + sum((-experts.log_var[m]).exp() for m in subset)
        mean = sum(experts.mean[m] * (-experts.log_var[m]).exp() for m in subset) / precision
        q = Independent(Normal(mean, precision**-0.5), 1)
        z = mean + precision**-0.5 * noise
        likelihoods = rival.log_likelihoods(arrays, z.unsqueeze(1))[:, 0]
        evidence = sum(likelihoods[:, m] * rival.weights[tiny_modalities[m].name] for m in subset)
        expected = expected - (evidence - 2 * kl_divergence(q, prior())).mean()
    torch.testing.assert_close(loss, expected)
    assert figures.keys() == {"elbo"}


def test_mmvae_is_stratified(tiny_modalities: Any, batch: Batch) -> None:
    rival = make("mmvae", tiny_modalities)
    loss, _ = rival.loss(batch, seeded())
    experts = rival.experts(batch.arrays)
    noise = torch.randn(ROWS, 4, LATENT, generator=seeded())
    total = torch.zeros(())
    for row in range(ROWS):
        among = [m for m in range(4) if batch.present[row, m]]
        mixture = MixtureSameFamily(Categorical(logits=torch.zeros(len(among))), of_row(experts, among, row))
        for m in among:
            z = experts.mean[m, row] + (experts.log_var[m, row] / 2).exp() * noise[row, m]
            ratio = prior().log_prob(z) - mixture.log_prob(z)
            total = total - (weighted(rival, batch, row, z) + 2 * ratio) / len(among) / ROWS
    torch.testing.assert_close(loss, total)


def test_mopoe_bounds_its_kl_by_that_of_the_components(tiny_modalities: Any, batch: Batch) -> None:
    rival = make("mopoe", tiny_modalities)
    (mixture,) = posteriors(rival, batch.arrays, [batch.present])
    assert isinstance(mixture, MixturePosterior)
    loss, _ = rival.loss(batch, seeded())
    z = mixture.sample(1, seeded())[:, 0]
    experts, total = rival.experts(batch.arrays), torch.zeros(())
    for row in range(ROWS):
        here = [m for m in range(4) if batch.present[row, m]]
        subsets = [s for n in range(1, 5) for s in itertools.combinations(here, n)]
        divergences = []
        for subset in subsets:
            precision = sum((-experts.log_var[m, row]).exp() for m in subset)
            mean = sum(experts.mean[m, row] * (-experts.log_var[m, row]).exp() for m in subset) / precision
            divergences.append(kl_divergence(Independent(Normal(mean, precision**-0.5), 1), prior()))
        assert int(mixture.among[:, row].sum()) == len(subsets)
        total = total - (weighted(rival, batch, row, z[row]) - 2 * torch.stack(divergences).mean()) / ROWS
        many = mixture.sample(4000, seeded(1))
        of_mixture = (mixture.log_density(many)[row] - prior().log_prob(many[row])).mean()
        assert of_mixture < torch.stack(divergences).mean() + 0.1
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("name", ["mmvae", "mopoe"])
def test_mixtures_of_one_modality_are_a_plain_vae(name: str, tiny_modalities: Any, make_rows: Any) -> None:
    """Exactly for MoPoE; on average for MMVAE, whose KL is sampled."""
    rival = make(name, tiny_modalities[:1])
    arrays, rows = make_rows(tiny_modalities[:1], 2), 800
    arrays = {key: array[:1].expand(rows, *array.shape[1:]) for key, array in arrays.items()}
    batch = Batch(arrays, torch.ones(rows, 1).bool(), None)
    q = Gaussian(*(part[0] for part in rival.experts(arrays)))
    with torch.no_grad():
        found = -rival.loss(batch, seeded())[0]
        noise = torch.randn(rows, 1, LATENT, generator=seeded(1))
        each = rival.objective(arrays, batch.present, q, standard_like(q), noise)
    assert (found - each.mean()).abs() < 6 * each.std() / rows**0.5 + 0.3
    if name == "mopoe":
        mixture = rival.posteriors(arrays, [batch.present])[0]
        torch.testing.assert_close(mixture.mean, q.mean)
        z = mixture.sample(1, seeded())
        expected = rival.evidences(arrays, batch.present, z)[:, 0] - 2 * kl_divergence(normal(q), prior())
        torch.testing.assert_close(found, expected.mean())


def test_mvtcae_of_two_gaussians(make_rows: Any) -> None:
    """Its KL terms against the closed form, its evidence left as it is."""
    modalities = [VectorModality(name=name, size=3, mean=(0.0,) * 3, std=(1.0,) * 3) for name in "ab"]
    rival = make("mvtcae", modalities)
    batch = Batch(make_rows(modalities, ROWS), torch.ones(ROWS, 2).bool(), None)
    loss, figures = rival.loss(batch, seeded())
    experts = rival.experts(batch.arrays)
    precision = (-experts.log_var).exp()
    mean, variance = (precision * experts.mean).sum(0) / precision.sum(0), 1 / precision.sum(0)
    q = Independent(Normal(mean, variance.sqrt()), 1)
    z = mean + variance.sqrt() * torch.randn(ROWS, 1, LATENT, generator=seeded())[:, 0]
    evidence = torch.stack([weighted(rival, batch, row, z[row]) for row in range(ROWS)])
    alpha = mvtcae.ALPHA
    to_experts = sum(kl_divergence(q, of_row(experts, m)) for m in range(2))
    bound = (2 - alpha) / 2 * evidence - 2 * ((1 - alpha) * kl_divergence(q, prior()) + alpha / 2 * to_experts)
    torch.testing.assert_close(loss, -bound.mean())
    torch.testing.assert_close(figures["elbo"], (evidence - 2 * kl_divergence(q, prior())).mean())


def test_jmvae_draws_experts_to_the_joint_posterior(tiny_modalities: Any, batch: Batch) -> None:
    rival = make("jmvae", tiny_modalities)
    loss, figures = rival.loss(batch, seeded())
    joint, experts = rival.joint(batch.arrays, batch.present), rival.experts(batch.arrays)
    align = torch.zeros(())
    for row, m in zip(*batch.present.nonzero(as_tuple=True), strict=True):
        align = align + kl_divergence(of_row(joint, row), of_row(experts, m, row)) / ROWS
    noise = torch.randn(ROWS, 1, LATENT, generator=seeded())
    elbo = rival.objective(batch.arrays, batch.present, joint, standard_like(joint), noise).mean()
    torch.testing.assert_close(loss, jmvae.ALPHA * 2 * align - elbo)
    torch.testing.assert_close(figures["align"], align)
    (q,) = posteriors(rival, batch.arrays, [batch.present])
    complete = batch.present.all(1)
    torch.testing.assert_close(q.mean[complete], joint.mean[complete])
    alone = batch.present[:, 1] & (batch.present.sum(1) == 1)
    torch.testing.assert_close(q.mean[alone], experts.mean[1, alone])


def test_jnf_freezes_the_vae_under_its_flows(tiny_modalities: Any, batch: Batch) -> None:
    rival = make("jnf", tiny_modalities)
    for loss, parts in ((rival.joint_loss, {"joint", "decoders"}), (rival.flow_loss, {"trunks", "_flows"})):
        rival.zero_grad()
        loss(batch, seeded())[0].backward()
        taught = {n.partition(".")[0] for n, p in rival.named_parameters() if p.grad is not None and p.grad.any()}
        assert taught == parts


def test_jnf_flows_learn_the_likelihood_of_joint_samples(tiny_modalities: Any, batch: Batch) -> None:
    rival = make("jnf", tiny_modalities)
    loss, _ = rival.flow_loss(batch, seeded())
    q = rival.joint(batch.arrays, batch.present)
    z = q.mean + (q.log_var / 2).exp() * torch.randn(ROWS, 1, LATENT, generator=seeded())[:, 0]
    total = torch.zeros(())
    singles = [batch.present & subset for subset in every_subset(4)[:4]]
    for seen, alone in zip(singles, posteriors(rival, batch.arrays, singles), strict=True):
        # Couplings begin as the identity: an untrained flow is the Gaussian of its base.
        density = alone.log_density(z.unsqueeze(1))[:, 0]
        total = total - torch.where(seen.any(1), density, 0.0).sum() / ROWS
    torch.testing.assert_close(loss, total)


def test_jnf_samples_the_product_of_its_flows(tiny_modalities: Any, batch: Batch) -> None:
    """Untrained flows are Gaussians, whose product is known."""
    rival = make("jnf", tiny_modalities)
    with torch.no_grad():
        seen = torch.tensor([True, True, False, False]).expand(ROWS, 4)
        (q,) = posteriors(rival, batch.arrays, [seen])
        z = q.sample(300, seeded())
        mean, log_var = zip(
            *(rival.flows[n].base(rival.trunks[n](batch.arrays[n])).chunk(2, -1) for n in ("image", "text")), strict=True
        )
        precision = [(-v).exp() for v in log_var]
        total = (precision[0] + precision[1] - 1).clamp(min=1e-3)
        expected = (precision[0] * mean[0] + precision[1] * mean[1]) / total
    proper = total > 0.5
    assert proper.float().mean() > 0.5
    assert ((z.mean(1) - expected).abs()[proper] < 0.4).float().mean() > 0.95
    with pytest.raises(NotImplementedError, match="up to a factor"):
        q.log_density(z)


def test_equal_budgets(rival: Any, make_config: Any) -> None:
    settings = make_config(joint={"epochs": 3}, refiner={"epochs": 2}, align={"epochs": 4})
    plan = baselines.stages(rival, settings)
    assert sum(stage.settings.epochs for stage in plan) == 9
    assert {stage.settings.batch_size for stage in plan} == {settings.joint.batch_size}
