"""MVTCAE and JMVAE compared with the library MultiVae, if installed (see ``multivae_parity``): same weights and noise."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from concord.model.modality import ImageModality, TextModality
from concord.model.vae.networks import NetworkSizes
from concord.training.baselines.jmvae import JMVAE
from concord.training.data.dataset import Batch
from concord.training.models import MODELS
from tests.tools.multivae_parity import wrap_model, wrap_rows

pytest.importorskip("pythae", reason="the library MultiVae is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library

ROWS = 16
SIZES = NetworkSizes(latent=6, features=17, hidden=25, width=8)
MODALITIES = (
    ImageModality(name="digit", channels=1, height=8, width=8, likelihood="bernoulli"),
    ImageModality(name="photo", channels=3, height=8, width=8, likelihood="laplace", scale=0.75),
    TextModality(name="word", length=3, alphabet=" abc", weight=7.0),
)


@pytest.fixture(autouse=True)
def _restore_validation() -> Iterator[None]:
    """Restore the argument checks of distributions, which ``wrap_model`` disables."""
    validate = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(validate)


@pytest.fixture(params=["mvtcae", "jmvae"])
def model(request: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param](MODALITIES, SIZES, beta=2.5)


def test_loss_and_gradients_equal_those_of_the_library(model: Any, make_rows: Any, monkeypatch: Any) -> None:
    batch = Batch(make_rows(MODALITIES, ROWS), torch.ones(ROWS, 3, dtype=torch.bool), None)
    noise = torch.randn(ROWS, 1, model.latent, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(model, "noise", lambda *_: noise)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda q, *_: q.loc + q.scale * noise[:, 0])
    loss, expected = model.loss(batch, torch.Generator())[0], wrap_model(model)(wrap_rows(batch.arrays)).loss
    torch.testing.assert_close(expected, loss, rtol=1e-5, atol=0)
    parts = [torch.autograd.grad(value, list(model.parameters()), materialize_grads=True) for value in (loss, expected)]
    gradient, expected_gradient = (torch.cat([part.flatten() for part in gradients]) for gradients in parts)
    assert (gradient - expected_gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("subset", [[0], [1, 2], [0, 1, 2]])
def test_posterior_mean_equals_that_of_the_library(model: Any, make_rows: Any, subset: list[int]) -> None:
    if len(subset) == 2 and isinstance(model, JMVAE):
        pytest.skip("the library does not divide the product of JMVAE's experts by the surplus priors")
    arrays, names = make_rows(MODALITIES, ROWS), [MODALITIES[index].name for index in subset]
    mask = torch.zeros(ROWS, 3, dtype=torch.bool)
    mask[:, subset] = True
    with torch.no_grad():
        (posterior,) = model.posteriors(arrays, [mask])
        expected = wrap_model(model).encode(wrap_rows(arrays), names, return_mean=True).z
    torch.testing.assert_close(expected, posterior.mean, rtol=1e-4, atol=1e-5)
