"""The refiner: one learned step of a posterior along the natural gradient of its objective.

Iterative amortised inference (Marino, Yue & Mandt 2018) learns lambda_{t+1} = f(lambda_t, gradient). Here f chooses a step
size for each latent variable and the direction is the natural gradient (Amari 1998; the Fisher information of a Gaussian is
1 / sigma^2 for the mean and 1/2 for the log variance). Two things follow. Where the gradient vanishes the step does too, so
steps beyond the training horizon do not overshoot. And what was learned from full rows carries over to rows that lack
modalities, since the gradient says what was observed.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.vae.gaussian import Gaussian, bounded

CODE_EXPONENT = 10.0  # p of the gradient code
MAX_RATE = 1.5
MAX_MOVE = 2.0  # in standard deviations for the mean, in nats for the log variance


def gradient_code(gradient: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch two_latent"]:
    """(log|g| / p, sign g) where |g| >= e^-p, else (-1, e^p g): magnitudes of any order become inputs of order one
    (Andrychowicz et al. 2016, appendix A)."""
    threshold = torch.exp(torch.tensor(-CODE_EXPONENT, dtype=gradient.dtype, device=gradient.device))
    magnitude = gradient.abs()
    large = magnitude >= threshold
    size = torch.where(large, torch.log(magnitude.clamp(min=1e-30)) / CODE_EXPONENT, -torch.ones_like(gradient))
    direction = torch.where(large, torch.sign(gradient), gradient / threshold)
    return torch.cat((size, direction), dim=-1)


class Refiner(nn.Module):
    """lambda_t, gradient -> lambda_{t+1}.

    Args:
        beta: weight of the KL term in the objective. The natural gradient divided by it has unit curvature in the KL,
            which makes a rate of one a Newton step where the likelihood is flat.
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
        nn.init.constant_(last.bias, -2.0)  # begin with small steps: staying is never wrong

    def forward(self, posterior: Gaussian, gradient: Gaussian) -> Gaussian:
        """The next posterior.

        Args:
            gradient: of each row's own objective (a sum over its values, never a mean over the batch) with respect to
                the mean and the log variance.
        """
        deviation = (0.5 * posterior.log_var).exp()
        move_mean = deviation * gradient.mean / self.beta
        move_log_var = 2 * gradient.log_var / self.beta
        seen = torch.cat((posterior.mean, posterior.log_var, gradient_code(move_mean), gradient_code(move_log_var)), dim=-1)
        rate_mean, rate_log_var = (MAX_RATE * torch.sigmoid(self.rates(seen).float())).chunk(2, dim=-1)
        return bounded(
            posterior.mean + deviation * _limited(rate_mean * move_mean),
            posterior.log_var + _limited(rate_log_var * move_log_var),
        )


def _limited(move: Tensor) -> Tensor:
    return MAX_MOVE * torch.tanh(move / MAX_MOVE)
