"""The terms of the training losses: pure functions that return one number for each row, in (weighted) nats."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from concord.model.modality import BinaryModality, CategoricalModality, VectorModality
from concord.model.vae.gaussian import Gaussian, kl, sample, standard_like
from concord.model.vae.generative import Arrays, context_name, target_name
from concord.model.vae.likelihood import log_likelihood
from concord.model.vae.multimodal import MultimodalVAE
from concord.training.config import Divergence
from concord.training.data.dataset import Batch

DISTINCT = 0.5
"""Smallest share of distinct values with which rows are searched by a modality: in a batch of contrastive learning, and in a
gallery of evaluation."""


class RefinementResult(NamedTuple):
    """A refined posterior, and the loss that trains the refiner."""

    posterior: Gaussian
    """lambda_T, detached from the graph."""
    refiner_loss: Float[Tensor, " batch"]
    """Surrogate whose gradient is that of -sum_t ELBO(lambda_t) with respect to the refiner. Its value has no meaning. Zero
    without evaluation noise."""


def elbos(
    model: MultimodalVAE,
    batch: Batch,
    posteriors: list[Gaussian],
    noise: Float[Tensor, "batch posterior latent"],
    anchor: Gaussian | None = None,
) -> list[Float[Tensor, " batch"]]:
    """Return the ELBO of each posterior, estimated with one sample each, in a single pass through the decoders.

    Args:
        anchor: second argument of the KL term. None: the prior.
    """
    z = torch.cat([sample(q, noise[:, i : i + 1]) for i, q in enumerate(posteriors)], dim=1)
    log_likelihood = model.weighted_log_likelihood(batch.arrays, batch.present, z)
    return [
        log_likelihood[:, i] - model.beta * kl(q, standard_like(q) if anchor is None else anchor)
        for i, q in enumerate(posteriors)
    ]


def as_requested(arrays: Arrays) -> Arrays:
    """Return the arrays as a request has them: a decoder of a text predicts the text that is given, not another one."""
    names = [name for name in arrays if target_name(name) in arrays]
    replaced = {derived for name in names for derived in (target_name(name), context_name(name))}
    return {name: array for name, array in arrays.items() if name not in replaced}


def refine(
    model: MultimodalVAE,
    batch: Batch,
    start: Gaussian,
    noise: Float[Tensor, "batch sample latent"],
    steps: int,
    evaluation_noise: Float[Tensor, "step batch sample latent"] | None = None,
    anchor: Gaussian | None = None,
) -> RefinementResult:
    """Refine ``start`` with the modalities present (Marino, Yue & Mandt 2018, algorithm 1), as the service does.

    Each lambda_t is detached before the next step, so the refiner is trained on each step separately. Its parameters get the
    gradient of the ELBO at lambda_{t+1} by the chain rule, without another pass through the decoders.

    Args:
        batch: rows. Refinement reads the texts that are given, also where decoders predict others, see ``target_name``.
        noise: of the gradients that the refiner reads, the same in every step.
        evaluation_noise: independent noise for each step, for the ELBO that trains the refiner. With ``noise`` itself, the
            refiner would learn to fit that noise: the ELBO rises on it and falls on any other. None: the refiner is not
            trained.
        anchor: second argument of the KL term. None: the prior, and the objective is the ELBO.
    """
    arrays, posterior = as_requested(batch.arrays), start.detach()
    anchor = standard_like(posterior) if anchor is None else anchor.detach()
    loss = torch.zeros_like(posterior.mean[:, 0])
    for step in range(steps):
        with torch.no_grad():
            gradient, _ = model.gradient(arrays, batch.present, posterior, anchor, noise)
        with torch.set_grad_enabled(evaluation_noise is not None):
            refined = model.refiner(posterior, gradient)
        posterior = refined.detach()
        if evaluation_noise is not None:
            with torch.no_grad():
                elbo_gradient, _ = model.gradient(arrays, batch.present, posterior, anchor, evaluation_noise[step])
            loss = loss - (refined.mean * elbo_gradient.mean + refined.log_var * elbo_gradient.log_var).sum(-1)
    return RefinementResult(posterior, loss)


def alignment_divergences(
    model: MultimodalVAE,
    batch: Batch,
    teacher: Gaussian,
    subsets: Bool[Tensor, "subset modality"],
    divergence: Divergence = "forward",
    features: Float[Tensor, "batch modality feature"] | None = None,
) -> tuple[Float[Tensor, "subset batch"], list[Gaussian]]:
    """Return the divergence between the teacher and the student q(z | x_S) of every subset, in nats, and the students.

    Args:
        teacher: receives no gradient.
        divergence: "forward": KL(teacher || student), mass-covering: a student with little information matches the moments of
            its teachers on average. "reverse": KL(student || teacher), mode-seeking. "both": their mean, half of Jeffreys'
            divergence.
        features: of the aligned encoder. None: they are computed.

    Returns:
        Divergences, zero where a row has no modality of the subset. Students, one for each subset.
    """
    teacher = teacher.detach()
    features = model.aligned.features(batch.arrays, batch.present) if features is None else features
    masks = batch.present & subsets.unsqueeze(1)
    students = model.aligned.fuse_each(features, masks)
    divergences = torch.stack([_divergence(teacher, student, divergence) for student in students])
    return torch.where(masks.any(2), divergences, torch.zeros_like(divergences)), students


def _divergence(teacher: Gaussian, student: Gaussian, divergence: Divergence) -> Float[Tensor, " batch"]:
    match divergence:
        case "reverse":
            return kl(student, teacher)
        case "both":
            return (kl(teacher, student) + kl(student, teacher)) / 2
        case _:
            return kl(teacher, student)


def contrastive_loss(
    embeddings: Float[Tensor, "modality batch latent"],
    present: Bool[Tensor, "batch modality"],
    temperature: float | Float[Tensor, ""],
    groups: Int64[Tensor, "modality batch"] | None = None,
) -> Float[Tensor, ""]:
    """Return symmetric InfoNCE (van den Oord et al. 2018) between the embeddings of every two modalities, in nats.

    Each row that has both modalities has to find its own embedding of the one by its embedding of the other, among those of all
    rows that have the one. Similarity is the cosine. The loss is a mean over rows and both directions, then over the pairs of
    modalities, weighted by the square root of their number of rows: a rare pair counts less, its rows count more.

    Args:
        embeddings: of each modality alone. Those of absent modalities have no effect.
        temperature: divides the similarities.
        groups: rows of the same group in one of the two modalities are no negatives of each other. None: all rows are.

    Returns:
        zero if no row has two modalities.
    """
    unit = nn.functional.normalize(torch.where(present.T.unsqueeze(-1), embeddings.float(), 0.0), dim=-1)
    itself = torch.eye(len(present), dtype=torch.bool, device=present.device)
    differs = None if groups is None else groups.unsqueeze(2) != groups.unsqueeze(1)
    losses, weights = [], []
    with torch.autocast(unit.device.type, enabled=False):  # bfloat16 has too few digits
        for query, gallery in itertools.permutations(range(len(unit)), 2):
            rows = (present[:, query] & present[:, gallery]).nonzero().flatten()
            if len(rows):
                similarities = unit[query, rows] @ unit[gallery].T / temperature
                is_candidate = present[:, gallery].expand_as(similarities)
                if differs is not None:
                    is_candidate = is_candidate & (itself | differs[query] & differs[gallery])[rows]
                logits = similarities.masked_fill(~is_candidate, -math.inf)
                losses.append(nn.functional.cross_entropy(logits, rows))
                weights.append(math.sqrt(len(rows)))
    total = sum((weight * loss for weight, loss in zip(weights, losses, strict=True)), start=unit.sum() * 0.0)
    return total / max(1.0, sum(weights))


def prediction_loss(
    model: MultimodalVAE,
    batch: Batch,
    embeddings: Float[Tensor, "batch source latent"],
    available: Bool[Tensor, "batch source"],
    sources: Bool[Tensor, "modality source"],
) -> Float[Tensor, " batch"]:
    """Return -log p(x_t | z) of the classes, attributes and numbers of each row, where z is the embedding of a source.

    It is in nats for each number, attribute or class, so that a long vector does not outweigh a class. It is a mean over the
    pairs of a target x_t and a source that the row has. Zero without such a pair.

    Args:
        embeddings: of subsets of modalities.
        available: the embeddings that a row has.
        sources: those from which each modality is predicted.
    """
    total = torch.zeros(len(batch), device=embeddings.device)
    pairs = torch.zeros(len(batch), device=embeddings.device)
    for index, modality in enumerate(model.modalities):
        if not isinstance(modality, BinaryModality | CategoricalModality | VectorModality):
            continue
        chosen = available & batch.present[:, index : index + 1] & sources[index]
        rows, of_source = chosen.nonzero(as_tuple=True)
        if not len(rows):
            continue
        raw = model.decoders[modality.name](embeddings[rows, of_source]).float()
        nats = log_likelihood(modality, raw, batch.arrays[modality.name][rows]) / math.prod(modality.shape)
        total = total.index_add(0, rows, -nats)
        pairs += chosen.sum(1)
    return total / pairs.clamp(min=1)


def every_subset(modalities: int) -> Bool[Tensor, "subset modality"]:
    """Return all non-empty subsets as masks, by size: single modalities first, all modalities last."""
    masks = [[bool(code >> m & 1) for m in range(modalities)] for code in range(1, 2**modalities)]
    return torch.tensor(sorted(masks, key=lambda mask: (sum(mask), [not bit for bit in mask])))


def figure_name(name: str, modalities: Collection[str]) -> str:
    """Return ``name`` for a figure next to those of the modalities, or ``the <name>`` if a modality has this name."""
    return f"the {name}" if name in modalities else name


def named_subsets(names: Sequence[str]) -> dict[str, Bool[Tensor, " modality"]]:
    """Return ``every_subset`` by name: the names of the modalities joined by +."""
    masks = every_subset(len(names))
    return {"+".join(name for name, bit in zip(names, mask.tolist(), strict=True) if bit): mask for mask in masks}
