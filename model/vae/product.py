"""Products of Gaussian experts (Hinton 2002), in log space."""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from model.vae.gaussian import Gaussian, bounded

ABSENT = -100.0  # log precision of an expert that is not there: nothing beside any other, and still a number

Prior = Literal["inside", "outside", "divided"]


def product(experts: Gaussian, present: Bool[Tensor, "batch modality"], prior: Prior) -> Gaussian:
    """prod_{m present} q_m(z), normalised; N(0, I) where nothing is present.

    Args:
        experts: mean and log variance, each (modality, batch, latent).
        prior: ``inside``: N(0, I) is one more expert (Wu & Goodman 2018, section 2.2). ``outside``: it takes no part (Sutter et
            al. 2021, equation 10; Hwang et al. 2021). ``divided``: prod q_m / p^(|S| - 1), the posterior of the subset where
            experts are exact; there experts wider than the prior could leave less precision than the prior's own, and it is
            clamped at 1.
    """
    precision = torch.where(present.T.unsqueeze(-1), -experts.log_var, ABSENT)
    total = torch.logsumexp(precision, dim=0)
    if prior == "inside":
        total = torch.logaddexp(total, torch.zeros_like(total))
    elif prior == "divided":
        spare = present.sum(1, keepdim=True) - 1
        rest = (total.exp() - spare).clamp(min=1).log()  # no overflow: log variances are bounded
        total = torch.where(spare > 0, rest, total)
    mean = (torch.exp(precision - total) * experts.mean).sum(0)
    some = present.any(1, keepdim=True)
    return bounded(torch.where(some, mean, 0.0), torch.where(some, -total, 0.0))
