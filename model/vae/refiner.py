"""The refiner: one learned step of a posterior along the natural gradient of its objective.

Iterative amortised inference (Marino, Yue & Mandt 2018) learns lambda_{t+1} = f(lambda_t, gradient). Here f chooses a step
size for each latent variable. The direction is the natural gradient (Amari 1998): the Fisher information of a Gaussian is
1 / sigma^2 for the mean and 1/2 for the log variance. This has two effects. If the gradient is 0, so is the step, so steps
beyond the training horizon do not overshoot. And a refiner trained on complete rows also works for incomplete rows, because
the gradient contains the information about which modalities are present.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from concord.model.vae.gaussian import Gaussian, bounded

CODE_EXPONENT = 10.0  # p in ``gradient_code``
MAX_RATE = 1.5  # largest step size, in natural gradients
MAX_STEP = 2.0  # in standard deviations for the mean, in nats for the log variance


def gradient_code(gradient: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch two_latent"]:
    """Network input of order 1 for gradients of any magnitude: (log|g| / p, sign g) if |g| >= e^-p, else (-1, e^p g).

    Source: Andrychowicz et al. 2016, appendix A.
    """
    threshold = math.exp(-CODE_EXPONENT)
    magnitude = gradient.abs()
    large = magnitude >= threshold
    size = torch.where(large, torch.log(magnitude.clamp(min=1e-30)) / CODE_EXPONENT, -torch.ones_like(gradient))
    direction = torch.where(large, torch.sign(gradient), gradient / threshold)
    return torch.cat((size, direction), dim=-1)


class Refiner(nn.Module):
    """One refinement step: posterior and gradient -> next posterior.

    Args:
        latent: size of z.
        hidden: size of the hidden layers.
        beta: weight of the KL term in the objective. Gradients are divided by it, so that a step size of 1 is a Newton step on
            the KL term if the likelihood is constant.
    """

    def __init__(self, *, latent: int, hidden: int, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.rates = nn.Sequential(
            nn.Linear(6 * latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )
        last = self.rates[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -2.0)  # start with small steps of 1.5 * sigmoid(-2) = 0.18

    def forward(self, posterior: Gaussian, gradient: Gaussian) -> Gaussian:
        """The next posterior.

        Args:
            posterior: mean and log variance, each (batch, latent).
            gradient: gradient of each row's objective (a sum over the row's values, not a mean over the batch) with respect to
                the mean and the log variance.
        """
        deviation = (0.5 * posterior.log_var).exp()
        # Natural gradients: that of the mean in standard deviations.
        natural_mean = deviation * gradient.mean / self.beta
        natural_log_var = 2 * gradient.log_var / self.beta
        codes = (gradient_code(natural_mean), gradient_code(natural_log_var))
        inputs = torch.cat((posterior.mean, posterior.log_var, *codes), dim=-1)
        rate_mean, rate_log_var = (MAX_RATE * torch.sigmoid(self.rates(inputs).float())).chunk(2, dim=-1)
        return bounded(
            posterior.mean + deviation * _soft_clip(rate_mean * natural_mean),
            posterior.log_var + _soft_clip(rate_log_var * natural_log_var),
        )


def _soft_clip(step: Tensor) -> Tensor:
    return MAX_STEP * torch.tanh(step / MAX_STEP)
