"""The autoregressive decoder: one pass equals steps, tokens depend on earlier ones only, and z has an effect."""

import pytest
import torch

from concord.model.modality import TextModality
from concord.model.vae.networks import NetworkSizes, decoder, initialise
from concord.model.vae.sequence_decoder import SequenceDecoder

LATENT = 6
WORDS = TextModality(name="caption", length=9, unit="word", vocabulary=tuple("abcdefg"), likelihood="autoregressive")
CHARACTERS = TextModality(name="code", length=5, alphabet=" xyz", likelihood="autoregressive")


@pytest.fixture(params=[WORDS, CHARACTERS], ids=["words", "characters"])
def modality(request: pytest.FixtureRequest) -> TextModality:
    return request.param


@pytest.fixture
def network(modality: TextModality) -> SequenceDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = decoder(modality, NetworkSizes(latent=LATENT, features=17, hidden=25, width=8))
        initialise(network)
    assert isinstance(network, SequenceDecoder)
    return network.requires_grad_(False)


def texts(modality: TextModality) -> torch.Tensor:
    """One text of each length, from one token to the whole length."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, modality.categories, (modality.length, modality.length), generator=generator)
    return tokens.tril()


def latents(rows: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(rows, LATENT, generator=torch.Generator().manual_seed(seed))


def test_one_pass_equals_the_steps(modality: TextModality, network: SequenceDecoder) -> None:
    x, z = texts(modality), latents(modality.length)
    lengths = (x != 0).sum(1)
    state, previous = torch.zeros(len(x), *network.state_shape), torch.full((len(x),), network.end)
    terms = []
    for position in range(modality.length):
        scores, state = network.step(z, previous, torch.full((len(x),), position), state)
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(x)))
        target = torch.where(lengths == position, network.end, x[:, position])
        terms.append(torch.where(position <= lengths, scores.gather(1, target.unsqueeze(1))[:, 0], 0.0))
        previous = x[:, position]
    torch.testing.assert_close(network.token_log_likelihoods(z, x), torch.stack(terms, dim=1))
    torch.testing.assert_close(network.token_log_likelihoods(z, x).sum(1), torch.stack(terms).sum(0))


def test_a_token_depends_on_earlier_tokens_only(modality: TextModality, network: SequenceDecoder) -> None:
    x, z = texts(modality)[-1:].repeat(modality.length, 1), latents(1).repeat(modality.length, 1)
    changed = torch.where(torch.eye(modality.length, dtype=torch.bool), 1 + x % (modality.categories - 1), x)
    before, after = network.token_log_likelihoods(z, x), network.token_log_likelihoods(z, changed)
    for position in range(modality.length):
        torch.testing.assert_close(after[position, :position], before[position, :position])
        later = (after - before)[position, position + 1 :]
        assert position == modality.length - 1 or later.abs().min() > 1e-6


def test_padding_inside_a_text_is_a_token_of_it(network: SequenceDecoder, modality: TextModality) -> None:
    x = torch.tensor([[1, 0, 2] + [0] * (modality.length - 3)])
    terms = network.token_log_likelihoods(latents(1), x)[0]
    assert (terms[:4] < 0).all()
    assert (terms[4:] == 0).all()


def test_log_likelihood_depends_on_z_and_is_finite_for_filler_out_of_range(
    modality: TextModality, network: SequenceDecoder
) -> None:
    x, z = texts(modality), latents(modality.length).requires_grad_()
    (gradient,) = torch.autograd.grad(network.token_log_likelihoods(z, x).sum(1).sum(), z)
    assert (gradient.abs().amax(1) > 1e-3).all()
    filler = torch.full_like(x, 10**6)
    assert network.token_log_likelihoods(z, filler).sum(1).isfinite().all()
    assert network.token_log_likelihoods(z, -filler).sum(1).isfinite().all()
