"""The interface of trainable models: where Concord and the baselines differ."""

import itertools
from typing import Any, get_args

import pytest
import torch

from concord.model.vae.gaussian import Gaussian, standard_like
from concord.model.vae.multimodal import MultimodalVAE
from concord.model.vae.networks import NetworkSizes
from concord.training import config
from concord.training.concord import Concord
from concord.training.config import DEFAULT_MODEL, Config
from concord.training.data.dataset import Batch
from concord.training.models import MODELS
from concord.training.posteriors import GaussianPosterior
from concord.training.trainable import TrainableModel, network_sizes

ROWS = 3
BASELINES = [name for name in MODELS if name != DEFAULT_MODEL]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: config.Model, modalities: Any, settings: Config) -> TrainableModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name].from_config(modalities, settings).requires_grad_(False)


@pytest.fixture
def batch(tiny_modalities: Any, make_rows: Any) -> Batch:
    return Batch(make_rows(tiny_modalities, ROWS), torch.ones(ROWS, 4, dtype=torch.bool), None)


def test_models_has_a_class_for_every_name_of_the_configuration() -> None:
    assert set(MODELS) == set(get_args(config.Model))


def test_concord_has_parameters_in_the_order_of_its_networks(tiny_modalities: Any, make_config: Any) -> None:
    """Checkpoints and the order of random numbers depend on it."""
    settings = make_config(flow={"epochs": 1, "couplings": 2, "spread": 0.5}, network={"fusion": "product"})
    model = make("concord", tiny_modalities, settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = MultimodalVAE(
            tiny_modalities,
            network_sizes(settings.network),
            beta=settings.objective.beta,
            fusion="product",
            couplings=2,
            spread=0.5,
        )
    assert isinstance(model, Concord)
    assert model.spread == 0.5
    assert list(model.state_dict()) == list(vae.state_dict())
    assert all(torch.equal(weight, vae.state_dict()[name]) for name, weight in model.state_dict().items())


def test_network_sizes_are_those_of_the_configuration() -> None:
    network = config.Network(latent=1, features=2, hidden=3, width=4, blocks=5, encoders="shallow")
    assert network_sizes(network) == NetworkSizes(latent=1, features=2, hidden=3, width=4, blocks=5, shallow=True)
    assert not network_sizes(config.Network(encoders="deep")).shallow


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_neither_refines_nor_exports(name: config.Model, tiny_modalities: Any, make_config: Any, batch: Batch) -> None:
    model = make(name, tiny_modalities, make_config())
    assert not model.refines
    assert not model.exportable
    assert model.joint_posterior(batch.arrays, batch.present) is None
    with pytest.raises(TypeError, match="cannot be exported"):
        model.bundle_model()
    start, generator = Gaussian(torch.zeros(ROWS, 4), torch.ones(ROWS, 4)), seeded()
    anchor = standard_like(start)
    assert model.refinement_path(batch, start, anchor, 3, 2, generator) == [start]
    assert torch.equal(generator.get_state(), seeded().get_state()), "no noise is sampled"
    noise = torch.randn(ROWS, 2, 4, generator=generator)
    posterior, objective = model.refine_step(batch.arrays, batch.present, start, anchor, noise)
    assert posterior is start
    assert torch.equal(objective, model.objective(batch.arrays, batch.present, start, anchor, noise))
    expected = start.mean.unsqueeze(1) + (start.log_var / 2).exp().unsqueeze(1) * noise
    torch.testing.assert_close(model.sample(start, noise), expected)


def test_concord_refines_and_exports(tiny_vae: Concord, batch: Batch) -> None:
    assert tiny_vae.refines
    assert tiny_vae.exportable
    assert tiny_vae.bundle_model() is tiny_vae
    joint = tiny_vae.joint_posterior(batch.arrays, batch.present)
    torch.testing.assert_close(joint.mean, tiny_vae.joint(batch.arrays, batch.present).mean)
    (q,) = tiny_vae.posteriors(batch.arrays, [batch.present])
    assert isinstance(q, GaussianPosterior)
    anchor = standard_like(q.gaussian)
    path = tiny_vae.refinement_path(batch, q.gaussian, anchor, 3, 2, seeded())
    assert len(path) == 4
    half = torch.randn(ROWS, 1, tiny_vae.latent, generator=seeded())
    noise = torch.cat((half, -half), dim=1)
    for before, after in itertools.pairwise(path):
        expected, _ = tiny_vae.refine_step(batch.arrays, batch.present, before, anchor, noise)
        torch.testing.assert_close(after.mean, expected.mean)
        torch.testing.assert_close(after.log_var, expected.log_var)
