"""The generative model p(z) prod_m p(x_m | z) that all models share, and the ELBO of a Gaussian posterior under it."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor, nn

from concord.model.modality import Modality, TextModality, resolve_weights
from concord.model.token_sampling import sample_tokens
from concord.model.vae.gaussian import Gaussian, kl, sample
from concord.model.vae.likelihood import expectation, log_likelihood
from concord.model.vae.masked import is_tracing, run_present
from concord.model.vae.networks import ImageDecoder, ModalityModules, NetworkSizes, WordsDecoder, decoder, initialise
from concord.model.vae.sequence_decoder import SequenceDecoder

Arrays = Mapping[str, Shaped[Tensor, "batch ..."]]


def context_name(modality: str) -> str:
    """Name of the tokens that an autoregressive decoder sees in place of those of a text. Without them it sees the text."""
    return f"{modality} context"  # no modality has a space in its name


def target_name(modality: str) -> str:
    """Name of the texts that the decoder of a text predicts, if they are others than those that the encoder reads."""
    return f"{modality} target"


class Generative(nn.Module):
    """Decoders of z ~ N(0, I). A subclass adds its encoders and calls ``build_decoders``.

    Args:
        modalities: what the decoders generate.
        latent: size of z.
        beta: weight of the KL term (Higgins et al. 2017).
    """

    decoders: ModalityModules

    def __init__(self, modalities: Sequence[Modality], *, latent: int, beta: float) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.latent = latent
        self.beta = beta
        self.weights = resolve_weights(modalities)

    def build_decoders(self, sizes: NetworkSizes) -> None:
        """Create one decoder for each modality, see ``networks.decoder``.

        The weights are sampled from torch's global generator, so they depend on the order of initialisations.
        """
        self.decoders = ModalityModules({m.name: decoder(m, sizes) for m in self.modalities})
        for network in self.decoders.values():
            initialise(network)

    def decode(self, name: str, z: Float[Tensor, "batch latent"]) -> Shaped[Tensor, "batch ..."]:
        """Return the expected value of the modality ``name`` given z, see ``likelihood.expectation``.

        Of a text with the autoregressive likelihood: token ids (batch, length), each the most likely one.
        """
        modality = self._modality(name)
        if isinstance(self.decoders[name], SequenceDecoder):
            return self.sample_text(name, z, torch.zeros(len(z), *modality.shape), temperature=0.0)
        return expectation(modality, self.decoders[name](z).float())

    def sample_text(
        self,
        name: str,
        z: Float[Tensor, "batch latent"],
        noise: Float[Tensor, "batch length"],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Int64[Tensor, "batch length"]:
        """Return token ids of one text for each z, from a text modality with the autoregressive likelihood.

        Args:
            noise, temperature, top_p: as ``token_sampling.sample_tokens``, one temperature and top-p for all rows.
        """
        network, modality = self.decoders[name], self._modality(name)
        assert isinstance(network, SequenceDecoder)
        assert isinstance(modality, TextModality)
        state = z.new_zeros(len(z), *network.state_shape)

        def next_token(previous: NDArray[np.int64], position: int) -> NDArray[np.float32]:
            nonlocal state
            token = torch.from_numpy(previous).to(z.device)
            scores, state = network.step(z, token, torch.full_like(token, position), state)
            return scores.float().cpu().numpy()

        options = (np.full(len(z), value, np.float32) for value in (temperature, top_p))
        with torch.no_grad():
            return torch.from_numpy(sample_tokens(modality, next_token, noise.cpu().numpy(), *options)).to(z.device)

    def _modality(self, name: str) -> Modality:
        return next(m for m in self.modalities if m.name == name)

    def log_likelihoods(
        self, arrays: Arrays, z: Float[Tensor, "batch sample latent"], chosen: Bool[Tensor, "batch modality"] | None = None
    ) -> Float[Tensor, "batch sample modality"]:
        """Return log p(x_m | z) of every modality in nats, without weights. Entries of absent modalities are meaningless.

        Args:
            chosen: the modalities of each row that are computed; the other entries are zero. None: all.
        """
        chosen = torch.ones(len(z), len(self.modalities), dtype=torch.bool, device=z.device) if chosen is None else chosen
        terms = [
            run_present(partial(self._log_likelihood, m), chosen[:, i], arrays[m.name], z)
            for i, m in enumerate(self.modalities)
        ]
        return torch.stack(terms, dim=-1)

    def text_log_likelihood(
        self, name: str, tokens: Int64[Tensor, "batch length"], z: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, " batch"]:
        """Return log p(tokens | z) of the text modality ``name`` in nats, without weight."""
        return self._log_likelihood(self._modality(name), tokens, z.unsqueeze(1))[:, 0]

    def weighted_log_likelihood(
        self, arrays: Arrays, present: Bool[Tensor, "batch modality"], z: Float[Tensor, "batch sample latent"]
    ) -> Float[Tensor, "batch sample"]:
        """Return sum_m w_m log p(x_m | z) over the present modalities, for each sample, in weighted nats."""
        terms = []
        for i, m in enumerate(self.modalities):
            context = [arrays[name] for name in (context_name(m.name),) if name in arrays]
            x = arrays.get(target_name(m.name), arrays[m.name])
            log_likelihood = run_present(partial(self._log_likelihood, m), present[:, i], x, z, *context)
            terms.append(self.weights[m.name] * log_likelihood)
        return torch.stack(terms, dim=-1).sum(-1)

    def _log_likelihood(
        self,
        modality: Modality,
        x: Shaped[Tensor, "batch ..."],
        z: Float[Tensor, "batch sample latent"],
        context: Int64[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch sample"]:
        batch, samples = z.shape[:2]
        flat, x = z.flatten(0, 1), x.repeat_interleave(samples, dim=0)
        network = self.decoders[modality.name]
        if isinstance(network, SequenceDecoder):
            seen = None if context is None else context.repeat_interleave(samples, dim=0)
            return network.token_log_likelihoods(flat, x, seen).sum(1).view(batch, samples)
        if isinstance(network, WordsDecoder) and modality.likelihood == "categorical" and not is_tracing(z):
            return network.log_likelihood(flat, x).view(batch, samples)
        log_scale = network.log_scale if isinstance(network, ImageDecoder) else None
        return log_likelihood(modality, network(flat).float(), x, log_scale).view(batch, samples)

    def objective(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> Float[Tensor, " batch"]:
        """Return E_q[sum_m w_m log p(x_m | z)] - beta KL(q || anchor) over the present modalities, to be maximised.

        With the prior N(0, I) as anchor, this is the weighted ELBO of the present modalities.

        Args:
            arrays: (batch, *shape) by modality. Values of absent modalities have no effect.
            present: mask of the modalities that each row has.
            posterior: q, mean and log variance each (batch, latent).
            anchor: second argument of the KL term, in the shape of q.
            noise: standard normal samples that estimate the expectation.

        Returns:
            the objective of each row (batch,), in weighted nats.
        """
        expected_log_likelihood = self.weighted_log_likelihood(arrays, present, sample(posterior, noise)).mean(-1)
        return expected_log_likelihood - self.beta * kl(posterior, anchor)
