"""The generative half that every model here shares: p(z) prod_m p(x_m | z), and the ELBO of any Gaussian posterior under it."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from model.modality import Modality, resolve_weights
from model.vae.gaussian import Gaussian, kl, sample
from model.vae.likelihood import expectation, log_likelihood
from model.vae.networks import decoder, initialise
from model.vae.presence import of_present

Arrays = Mapping[str, Shaped[Tensor, "batch ..."]]


class Generative(nn.Module):
    """Decoders of z ~ N(0, I). A subclass brings its encoders, and calls ``build_decoders`` when their weights are drawn.

    Args:
        latent: size of z.
        beta: weight of the KL term (Higgins et al. 2017).
    """

    decoders: nn.ModuleDict

    def __init__(self, modalities: Sequence[Modality], *, latent: int, beta: float) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.latent = latent
        self.beta = beta
        self.weights = resolve_weights(modalities)

    def build_decoders(self, *, hidden: int, width: int) -> None:
        """A decoder for each modality, see ``networks.decoder``. Draws from torch's generator: the order of calls matters."""
        self.decoders = nn.ModuleDict({m.name: decoder(m, self.latent, hidden, width) for m in self.modalities})
        for part in self.decoders.values():
            initialise(part)

    def decode(self, name: str, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch ..."]:
        """Expectation of one modality, see ``likelihood.expectation``."""
        modality = next(m for m in self.modalities if m.name == name)
        return expectation(modality, self.decoders[name](z).float())

    def log_likelihoods(
        self, arrays: Arrays, z: Float[Tensor, "batch sample latent"]
    ) -> Float[Tensor, "batch sample modality"]:
        """log p(x_m | z) in nats, unweighted, of every modality, absent ones included."""
        return torch.stack([self._log_likelihood(m, arrays[m.name], z) for m in self.modalities], dim=-1)

    def evidences(
        self, arrays: Arrays, present: Bool[Tensor, "batch modality"], z: Float[Tensor, "batch sample latent"]
    ) -> Float[Tensor, "batch sample"]:
        """Sum over present m of w_m log p(x_m | z) of each sample, in weighted nats."""
        terms = [
            self.weights[m.name] * of_present(partial(self._log_likelihood, m), present[:, i], arrays[m.name], z)
            for i, m in enumerate(self.modalities)
        ]
        return torch.stack(terms, dim=-1).sum(-1)

    def _log_likelihood(
        self, modality: Modality, x: Shaped[Tensor, "batch ..."], z: Float[Tensor, "batch sample latent"]
    ) -> Float[Tensor, "batch sample"]:
        batch, samples = z.shape[:2]
        raw = self.decoders[modality.name](z.flatten(0, 1)).float()
        return log_likelihood(modality, raw, x.repeat_interleave(samples, dim=0)).view(batch, samples)

    def objective(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> Float[Tensor, " batch"]:
        """E_q[sum over present m of w_m log p(x_m | z)] - beta KL(q || anchor) of each row, in weighted nats, maximised.

        With the prior N(0, I) as anchor this is the (weighted) ELBO of the modalities present.
        """
        evidence = self.evidences(arrays, present, sample(posterior, noise)).mean(-1)
        return evidence - self.beta * kl(posterior, anchor)
