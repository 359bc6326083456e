"""Our rivals against the library MultiVae, where it is installed (``peer`` says how): same weights, same noise, same loss."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.modality import ImageModality, TextModality
from tests.training.baselines.peer import wrap, wrap_rows
from training.baselines import MODELS
from training.baselines.jmvae import JMVAE
from training.data import Batch
from training.posteriors import posteriors

pytest.importorskip("pythae", reason="the library MultiVae is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library

ROWS = 16
MODALITIES = (
    ImageModality(name="digit", channels=1, height=8, width=8, likelihood="bernoulli"),
    ImageModality(name="photo", channels=3, height=8, width=8, likelihood="laplace", scale=0.75),
    TextModality(name="word", length=3, alphabet=" abc", weight=7.0),
)


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """``wrap`` has PyTorch check no arguments of distributions."""
    checked = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(checked)


@pytest.fixture(params=["mvtcae", "jmvae"])
def rival(request: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[request.param](MODALITIES, latent=6, features=17, hidden=25, width=8, beta=2.5)


def test_same_weights_and_noise_give_the_same_loss_and_slopes(rival: Any, make_rows: Any, monkeypatch: Any) -> None:
    batch = Batch(make_rows(MODALITIES, ROWS), torch.ones(ROWS, 3, dtype=torch.bool), None)
    noise = torch.randn(ROWS, 1, rival.latent, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(rival, "noise", lambda *_: noise)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda q, *_: q.loc + q.scale * noise[:, 0])
    ours, theirs = rival.loss(batch, torch.Generator())[0], wrap(rival)(wrap_rows(batch.arrays)).loss
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    slopes = [torch.autograd.grad(loss, list(rival.parameters()), materialize_grads=True) for loss in (ours, theirs)]
    one, other = (torch.cat([slope.flatten() for slope in parts]) for parts in slopes)
    assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("seen", [[0], [1, 2], [0, 1, 2]])
def test_posteriors_of_subsets_have_the_same_mean(rival: Any, make_rows: Any, seen: list[int]) -> None:
    if len(seen) == 2 and isinstance(rival, JMVAE):
        pytest.skip("the library multiplies JMVAE's experts without dividing the spare priors out")
    arrays, names = make_rows(MODALITIES, ROWS), [MODALITIES[index].name for index in seen]
    mask = torch.zeros(ROWS, 3, dtype=torch.bool)
    mask[:, seen] = True
    with torch.no_grad():
        (ours,) = posteriors(rival, arrays, [mask])
        theirs = wrap(rival).encode(wrap_rows(arrays), names, return_mean=True).z
    torch.testing.assert_close(theirs, ours.mean, rtol=1e-4, atol=1e-5)
