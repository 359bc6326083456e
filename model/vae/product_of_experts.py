"""Products of Gaussian experts (Hinton 2002), in log space."""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from concord.model.vae.gaussian import Gaussian, bounded

ABSENT = -100.0  # log precision of an absent expert: negligible, and finite so that gradients are not NaN

Prior = Literal["inside", "outside", "divided"]


def product(experts: Gaussian, present: Bool[Tensor, "batch modality"], prior: Prior) -> Gaussian:
    """Normalised product of the present experts, prod_m q_m(z). Rows without any modality get N(0, I).

    Args:
        experts: mean and log variance, each (modality, batch, latent).
        present: mask (batch, modality).
        prior: use of the prior p(z) = N(0, I):

            - ``inside``: the prior is one more expert (Wu & Goodman 2018, section 2.2).
            - ``outside``: the prior is not a factor (Sutter et al. 2021, equation 10; Hwang et al. 2021).
            - ``divided``: prod_m q_m / p^(|S| - 1), the exact posterior of the subset S if the experts are exact. Experts wider
              than the prior could make the precision smaller than the prior's, or negative, so it is at least 1.

    Returns:
        mean and log variance, each (batch, latent).
    """
    precision = torch.where(present.T.unsqueeze(-1), -experts.log_var, ABSENT)
    total = torch.logsumexp(precision, dim=0)
    if prior == "inside":
        total = torch.logaddexp(total, torch.zeros_like(total))
    elif prior == "divided":
        surplus = present.sum(1, keepdim=True) - 1  # priors contained in the product beyond the first
        divided = (total.exp() - surplus).clamp(min=1).log()  # exp does not overflow: log variances are bounded
        total = torch.where(surplus > 0, divided, total)
    mean = (torch.exp(precision - total) * experts.mean).sum(0)
    any_present = present.any(1, keepdim=True)
    return bounded(torch.where(any_present, mean, 0.0), torch.where(any_present, -total, 0.0))
