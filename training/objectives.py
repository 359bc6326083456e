"""The terms that the stages add up: pure functions giving a number for each row, in (weighted) nats."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.vae.gaussian import Gaussian, kl, sample, standard_like
from model.vae.multimodal import MultimodalVAE
from training.config import Divergence
from training.data import Batch


class Refined(NamedTuple):
    """A refined posterior and how it came about."""

    posterior: Gaussian
    """lambda_T, cut from the graph."""
    loss: Float[Tensor, " batch"]
    """Has the gradient of -sum_t ELBO(lambda_t) for the refiner, its value means nothing. Zero without ``judges``."""


def elbos(
    vae: MultimodalVAE,
    batch: Batch,
    posteriors: list[Gaussian],
    noise: Float[Tensor, "batch posterior latent"],
    anchor: Gaussian | None = None,
) -> list[Float[Tensor, " batch"]]:
    """The ELBO of each posterior, one sample each, in one pass through the decoders; ``anchor`` as in ``refine``."""
    z = torch.cat([sample(q, noise[:, i : i + 1]) for i, q in enumerate(posteriors)], dim=1)
    evidence = vae.evidences(batch.arrays, batch.present, z)
    return [evidence[:, i] - vae.beta * kl(q, standard_like(q) if anchor is None else anchor) for i, q in enumerate(posteriors)]


def refine(
    vae: MultimodalVAE,
    batch: Batch,
    start: Gaussian,
    noise: Float[Tensor, "batch sample latent"],
    steps: int,
    judges: Float[Tensor, "step batch sample latent"] | None = None,
    anchor: Gaussian | None = None,
) -> Refined:
    """Refine ``start`` with the modalities present (Marino, Yue & Mandt 2018, algorithm 1), as the service does.

    Args:
        noise: of the gradients that the refiner sees, the same at every step.
        judges: fresh noise for each step; the refiner learns when it is given. Judged by the noise that it climbs, a refiner
            learns to fit that noise: the ELBO rises on it and falls on any other.
        anchor: what the KL term holds to. None: the prior, and the objective is the ELBO.

    Each lambda_t is detached before the next step, so that the refiner learns each step for itself. Its parameters get the
    gradient of the ELBO at lambda_{t+1} by the chain rule, without another pass through the decoders.
    """
    posterior = start.detach()
    anchor = standard_like(posterior) if anchor is None else anchor.detach()
    loss = torch.zeros(len(posterior.mean))
    for step in range(steps):
        with torch.no_grad():
            gradient, _ = vae.gradient(batch.arrays, batch.present, posterior, anchor, noise)
        with torch.set_grad_enabled(judges is not None):
            after = vae.refiner(posterior, gradient)
        posterior = after.detach()
        if judges is not None:
            with torch.no_grad():
                slope, _ = vae.gradient(batch.arrays, batch.present, posterior, anchor, judges[step])
            loss = loss - (after.mean * slope.mean + after.log_var * slope.log_var).sum(-1)
    return Refined(posterior, loss)


def alignment(
    vae: MultimodalVAE,
    batch: Batch,
    teacher: Gaussian,
    subsets: Bool[Tensor, "subset modality"],
    divergence: Divergence = "forward",
) -> tuple[Float[Tensor, "subset batch"], list[Gaussian]]:
    """The divergence between the teacher and q(z | x_S) for every subset, in nats, and the students q.

    ``forward``: KL(teacher || student). The student covers all that the teacher allows, and where it lacks evidence matches the
    teacher's moments on average. ``reverse``: KL(student || teacher). ``both``: their mean, half of Jeffreys' divergence. A row
    contributes where it has some of the subset's modalities; the term is zero elsewhere.
    """
    teacher = teacher.detach()
    features = vae.aligned.features(batch.arrays, batch.present)
    divergences, students = [], []
    for subset in subsets:
        seen = batch.present & subset
        student = vae.aligned.fuse(features, seen)
        apart = _apart(teacher, student, divergence)
        divergences.append(torch.where(seen.any(1), apart, torch.zeros_like(apart)))
        students.append(student)
    return torch.stack(divergences), students


def _apart(teacher: Gaussian, student: Gaussian, divergence: Divergence) -> Float[Tensor, " batch"]:
    match divergence:
        case "reverse":
            return kl(student, teacher)
        case "both":
            return (kl(teacher, student) + kl(student, teacher)) / 2
        case _:
            return kl(teacher, student)


def every_subset(modalities: int) -> Bool[Tensor, "subset modality"]:
    """All non-empty subsets as masks: single modalities first, all modalities last."""
    masks = [[bool(code >> m & 1) for m in range(modalities)] for code in range(1, 2**modalities)]
    return torch.tensor(sorted(masks, key=lambda mask: (sum(mask), [not bit for bit in mask])))


def named_subsets(names: Sequence[str]) -> dict[str, Bool[Tensor, " modality"]]:
    """``every_subset`` by the names of its modalities, joined by +."""
    masks = every_subset(len(names))
    return {"+".join(name for name, bit in zip(names, mask.tolist(), strict=True) if bit): mask for mask in masks}
