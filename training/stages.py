"""The stages: what each of them minimises. Read with ``objectives``; ``fit`` runs them in this order."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.vae.gaussian import Gaussian, antithetic, kl, sample, served_anchor, standard_like
from model.vae.multimodal import MultimodalVAE
from training import config
from training.data import Batch
from training.objectives import Refined, alignment, elbos, every_subset, refine
from training.parallel import Noise
from training.posteriors import FlowPosterior

MAX_SUBSETS = 16  # a batch aligns at most so many; with more modalities, all single ones and a random choice of the others

Loss = Callable[[Batch, Noise], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    settings: config.Stage
    loss: Loss
    """Rows, their noise -> scalar to minimise, and the figures to log, each a scalar in nats: means over the
    rows, so that a batch may be shared."""


def stages(vae: MultimodalVAE, settings: config.Config) -> list[Stage]:
    """The stages of a configuration."""
    refiner, align = settings.refiner, settings.align
    again = refiner.model_copy(update={"steps": settings.horizon})
    found = [
        Stage("joint", settings.joint, lambda batch, noise: joint_loss(vae, batch, noise)),
        Stage("refiner", refiner, lambda batch, noise: refiner_loss(vae, batch, noise, refiner)),
        Stage("align", align, lambda batch, noise: align_loss(vae, batch, noise, refiner, align)),
    ]
    if settings.refresh.epochs and refiner.steps:
        found.append(Stage("refresh", settings.refresh, lambda batch, noise: refresh_loss(vae, batch, noise, again)))
    if settings.flow.epochs:
        found.append(Stage("flow", settings.flow, lambda batch, noise: flow_loss(vae, batch, noise, settings)))
    return found


def joint_loss(vae: MultimodalVAE, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
    """-ELBO of the joint encoder's posterior."""
    posterior = vae.joint(batch.arrays, batch.present)
    (elbo,) = elbos(vae, batch, [posterior], noise.normal(1, vae.latent))
    return -elbo.mean(), {"elbo": elbo.mean()}


def refiner_loss(vae: MultimodalVAE, batch: Batch, noise: Noise, settings: config.Refiner) -> tuple[Tensor, dict[str, Tensor]]:
    """The refiner learns its steps; encoder and decoders go on, the decoders at refined posteriors too."""
    loss, figures, _, refined = _joint_and_refined(vae, batch, noise, settings, learn=True)
    return loss + refined.loss.mean() / max(1, settings.steps), figures


def align_loss(
    vae: MultimodalVAE, batch: Batch, noise: Noise, refiner: config.Refiner, settings: config.Align
) -> tuple[Tensor, dict[str, Tensor]]:
    """The aligned encoder learns the refined posterior from every subset; all but the refiner goes on.

    Students that never reconstruct do not learn to generate (what CRMVAE found), hence the reconstruction term: decoders and
    aligned encoder also serve samples from the posterior of a random subset.
    """
    loss, figures, start, refined = _joint_and_refined(vae, batch, noise, refiner, learn=False)
    subsets = _some_subsets(vae, noise)
    divergences, students = alignment(vae, batch, refined.posterior, subsets, settings.divergence)
    if settings.divergence != "none":
        weights = torch.where(subsets.sum(1) > 1, settings.several, 1.0).unsqueeze(1)
        loss = loss + vae.beta * (weights * divergences).sum(0).mean()  # autocast would round a product of matrices
    figures["align"] = divergences.mean()
    if settings.pull:
        alone = students[: len(vae.modalities)]
        apart = torch.where(batch.present.T, torch.stack([kl(start, student) for student in alone]), 0.0)
        loss = loss + settings.pull * vae.beta * apart.sum(0).mean()
        figures["pull"] = apart.mean()
    if settings.reconstruction:
        # One student a row, drawn at random, costs a single pass through the decoders.
        choice = noise.choices(len(students))
        rows = torch.arange(len(choice))
        mean = torch.stack([s.mean for s in students])[choice, rows]
        log_var = torch.stack([s.log_var for s in students])[choice, rows]
        z = mean + (0.5 * log_var).exp() * noise.normal(1, vae.latent)[:, 0]
        evidence = _evidence(vae, batch, z, through=settings.reconstruction_teaches == "all")
        some = (batch.present & subsets[choice]).any(1)
        evidence = torch.where(some, evidence, torch.zeros_like(evidence))
        if settings.divergence == "none":
            student = Gaussian(mean, log_var)
            rent = torch.where(some, kl(student, standard_like(student)), 0.0)
            loss = loss + settings.reconstruction * vae.beta * rent.mean()
        loss = loss - settings.reconstruction * evidence.mean()
        figures["reconstruction"] = evidence.mean()
    return loss, figures


def refresh_loss(vae: MultimodalVAE, batch: Batch, noise: Noise, settings: config.Refiner) -> tuple[Tensor, dict[str, Tensor]]:
    """The refiner learns its steps as the service takes them: from the aligned posterior, of rows as they are and, as often, of
    random subsets, which are held to where they start. Nothing else has a gradient."""
    subsets = every_subset(len(vae.modalities))
    seen = batch.present & subsets[noise.choices(2 * len(subsets)).clamp(max=len(subsets) - 1)]  # the last lacks nothing
    part = Batch(batch.arrays, seen, batch.labels)
    with torch.no_grad():
        start = vae.aligned(part.arrays, seen)
    anchor = served_anchor(start, seen)
    refined = _refined(vae, part, noise, settings, start, anchor, learn=True)
    with torch.no_grad():
        at_start, at_refined = elbos(vae, part, [start, refined.posterior], noise.normal(2, vae.latent), anchor)
    return refined.loss.mean() / settings.steps, {"objective": at_start.mean(), "refined": at_refined.mean()}


def flow_loss(vae: MultimodalVAE, batch: Batch, noise: Noise, settings: config.Config) -> tuple[Tensor, dict[str, Tensor]]:
    """-E log q(z | x_S) of samples z of the refined joint posterior: forward KL, which covers all that a subset leaves open.

    The flow learns it around the aligned posterior of every subset and, of one subset a row, around it refined. Nothing else
    has a gradient.
    """
    assert vae.flow is not None
    with torch.no_grad():
        joint = vae.joint(batch.arrays, batch.present)
        teacher = _refined(vae, batch, noise, settings.refiner, joint, None, learn=False).posterior
        z = sample(teacher, noise.normal(2, vae.latent))
        subsets = _some_subsets(vae, noise)
        features = vae.aligned.features(batch.arrays, batch.present)
        masks = [batch.present & subset for subset in subsets]
        students = [vae.aligned.fuse(features, seen) for seen in masks]
        if settings.horizon:
            seen = batch.present & subsets[noise.choices(len(subsets))]
            start, steps = vae.aligned.fuse(features, seen), 1 + int(noise.order(settings.horizon)[0])
            part, climb = Batch(batch.arrays, seen, batch.labels), settings.refiner.model_copy(update={"steps": steps})
            students.append(_refined(vae, part, noise, climb, start, served_anchor(start, seen), learn=False).posterior)
            masks.append(seen)
    some = torch.stack([seen.any(1) for seen in masks])
    every = Gaussian(*(torch.cat(parts) for parts in zip(*students, strict=True)))
    with torch.autocast("cpu", enabled=False):  # many couplings in a row want their digits
        density = FlowPosterior(every, vae.flow).log_density(z.repeat(len(masks), 1, 1)).mean(1).view(some.shape)
    density = torch.where(some, density, 0.0).mean()
    return -density, {"log_density": density}


def _some_subsets(vae: MultimodalVAE, noise: Noise) -> Bool[Tensor, "subset modality"]:
    """All of them, the single modalities first; of many, those and a random choice of the others."""
    subsets = every_subset(len(vae.modalities))
    if len(subsets) <= MAX_SUBSETS:
        return subsets
    singles = len(vae.modalities)
    others = noise.order(len(subsets) - singles)[: MAX_SUBSETS - singles] + singles
    return torch.cat((subsets[:singles], subsets[others]))


def _evidence(vae: MultimodalVAE, batch: Batch, z: Float[Tensor, "batch latent"], *, through: bool) -> Float[Tensor, " batch"]:
    """Of one sample a row. Unless ``through``, its gradient reaches the sample alone and no weight of the decoders."""
    if through:
        return vae.evidences(batch.arrays, batch.present, z.unsqueeze(1))[:, 0]
    at = z.detach().requires_grad_()
    evidence = vae.evidences(batch.arrays, batch.present, at.unsqueeze(1))[:, 0]
    (slope,) = torch.autograd.grad(evidence.sum(), at)
    return evidence.detach() + (slope * (z - at.detach())).sum(-1)


def _joint_and_refined(
    vae: MultimodalVAE, batch: Batch, noise: Noise, settings: config.Refiner, *, learn: bool
) -> tuple[Tensor, dict[str, Tensor], Gaussian, Refined]:
    start = vae.joint(batch.arrays, batch.present)
    refined = _refined(vae, batch, noise, settings, start, None, learn=learn)
    at_start, at_refined = elbos(vae, batch, [start, refined.posterior], noise.normal(2, vae.latent))
    loss = -(at_start + at_refined).mean() / 2
    return loss, {"elbo": at_start.mean(), "refined": at_refined.mean()}, start, refined


def _refined(
    vae: MultimodalVAE,
    batch: Batch,
    noise: Noise,
    settings: config.Refiner,
    start: Gaussian,
    anchor: Gaussian | None,
    *,
    learn: bool,
) -> Refined:
    pairs = settings.samples // 2
    climbed = antithetic(noise.normal(pairs, vae.latent))
    judging = [antithetic(noise.normal(pairs, vae.latent)) for _ in range(settings.steps)] if learn else []
    return refine(vae, batch, start, climbed, settings.steps, torch.stack(judging) if judging else None, anchor)
