"""The multimodal VAE: encoders, decoders, refiner and optional flow."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from concord.model.modality import Modality
from concord.model.vae import gaussian
from concord.model.vae.flow import Flow
from concord.model.vae.gaussian import Gaussian
from concord.model.vae.generative import Arrays, Generative
from concord.model.vae.networks import NetworkSizes
from concord.model.vae.posterior import ENCODERS, Fusion, SetEncoder
from concord.model.vae.refiner import Refiner


class MultimodalVAE(Generative):
    """Joint encoder, aligned encoder, refiner, one decoder for each modality, and an optional flow.

    Args:
        modalities: what the encoders read and the decoders generate.
        sizes: of encoders and decoders. Refiner and flow have ``hidden`` units in their hidden layers, too.
        beta: weight of the KL term (Higgins et al. 2017).
        fusion: kind of aligned encoder. ``set``: one network for all subsets. ``product``: a product of experts.
        couplings: number of couplings of the flow that transforms samples. 0: no flow, samples are Gaussian.
        spread: standard deviation of the base noise of the flow, in (0, 1]. Training uses 1. Smaller values concentrate the
            samples where the density is high (reduced temperature: Kingma & Dhariwal 2018, section 6).
    """

    def __init__(
        self,
        modalities: Sequence[Modality],
        sizes: NetworkSizes,
        *,
        beta: float,
        fusion: Fusion = "set",
        couplings: int = 0,
        spread: float = 1.0,
    ) -> None:
        super().__init__(modalities, latent=sizes.latent, beta=beta)
        self.joint = SetEncoder(modalities, sizes)
        self.aligned = ENCODERS[fusion](modalities, sizes)
        self.refiner = Refiner(latent=sizes.latent, hidden=sizes.hidden, beta=beta)
        self.build_decoders(sizes)
        self.flow = Flow(latent=sizes.latent, hidden=sizes.hidden, couplings=couplings) if couplings else None
        self.spread = spread

    def sample(self, posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
        """Return samples of an aligned or refined posterior, transformed by the flow if the model has one."""
        samples: Tensor = gaussian.sample(posterior, noise) if self.flow is None else self.flow(posterior, self.spread * noise)
        return samples

    def gradient(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> tuple[Gaussian, Float[Tensor, " batch"]]:
        """Return the gradient of each row's ``objective`` with respect to its posterior, and the objective (batch,).

        The gradient is a pair of tensors (batch, latent): with respect to the mean and with respect to the log variance.
        Arguments as ``objective``.
        """

        def objective_at(mean: Tensor, log_var: Tensor) -> Tensor:
            return self.objective(arrays, present, Gaussian(mean, log_var), anchor, noise)

        objective, vjp = torch.func.vjp(objective_at, posterior.mean, posterior.log_var)  # type: ignore[misc]  # two without aux
        mean, log_var = vjp(torch.ones_like(objective))
        return Gaussian(mean, log_var), objective

    def refine_step(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> tuple[Gaussian, Float[Tensor, " batch"]]:
        """Return the posterior after one step of the refiner, and the objective (batch,) before the step.

        Arguments as ``objective``.
        """
        gradient, objective = self.gradient(arrays, present, posterior, anchor, noise)
        return self.refiner(posterior, gradient), objective
