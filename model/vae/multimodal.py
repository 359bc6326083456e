"""The multimodal VAE: the generative half, its posteriors and one refinement step."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.modality import Modality
from model.vae.flow import Flow
from model.vae.gaussian import Gaussian, sample
from model.vae.generative import Arrays, Generative
from model.vae.posterior import ENCODERS, Fusion, SetEncoder
from model.vae.refiner import Refiner


class MultimodalVAE(Generative):
    """Joint encoder, refiner, aligned encoder, a decoder for each modality and, on demand, a flow to draw samples through.

    Args:
        latent: size of z.
        features, width: of the encoders, see ``SetEncoder``.
        hidden: of the fusion, the refiner and the decoders.
        beta: weight of the KL term (Higgins et al. 2017).
        fusion: of the aligned encoder: one network for every subset, or the product of an expert for each modality.
        couplings: of the flow that samples are drawn through. 0: no flow, samples are those of the Gaussian posterior.
        spread: standard deviation of the noise that the flow begins with, in (0, 1]. It learns with 1; below, its samples keep
            to where the density is high (Kingma & Dhariwal 2018, section 6: reduced temperature).
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        *,
        latent: int,
        features: int,
        hidden: int,
        width: int,
        beta: float,
        fusion: Fusion = "set",
        couplings: int = 0,
        spread: float = 1.0,
    ) -> None:
        super().__init__(modalities, latent=latent, beta=beta)
        self.joint = SetEncoder(modalities, latent=latent, features=features, hidden=hidden, width=width)
        self.aligned = ENCODERS[fusion](modalities, latent=latent, features=features, hidden=hidden, width=width)
        self.refiner = Refiner(latent=latent, hidden=hidden, beta=beta)
        self.build_decoders(hidden=hidden, width=width)
        self.flow = Flow(latent=latent, hidden=hidden, couplings=couplings) if couplings else None
        self.spread = spread

    def draw(self, posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
        """Samples of an aligned or refined posterior, through the flow where there is one."""
        drawn: Tensor = sample(posterior, noise) if self.flow is None else self.flow(posterior, self.spread * noise)
        return drawn

    def gradient(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> tuple[Gaussian, Float[Tensor, " batch"]]:
        """Gradient of each row's objective with respect to its own posterior, and the objective."""

        def of(mean: Tensor, log_var: Tensor) -> Tensor:
            return self.objective(arrays, present, Gaussian(mean, log_var), anchor, noise)

        objective, pullback = torch.func.vjp(of, posterior.mean, posterior.log_var)  # type: ignore[misc]  # two without aux
        mean, log_var = pullback(torch.ones_like(objective))
        return Gaussian(mean, log_var), objective

    def refine_step(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> tuple[Gaussian, Float[Tensor, " batch"]]:
        """One step of the refiner, and the objective at the posterior that came in."""
        gradient, objective = self.gradient(arrays, present, posterior, anchor, noise)
        return self.refiner(posterior, gradient), objective
