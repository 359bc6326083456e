"""The training stages of ``Concord``, in the order in which ``fit`` runs them. ``objectives`` holds their terms."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from concord.model.modality import BinaryModality, ImageModality, Modality, VectorModality
from concord.model.vae.gaussian import Gaussian, antithetic, kl, refinement_anchor, sample, standard_like
from concord.model.vae.multimodal import MultimodalVAE
from concord.training import config
from concord.training.data.dataset import Batch, Dataset
from concord.training.distributed import Noise
from concord.training.objectives import (
    DISTINCT,
    RefinementResult,
    alignment_divergences,
    contrastive_loss,
    elbos,
    every_subset,
    prediction_loss,
    refine,
)
from concord.training.posteriors import FlowPosterior
from concord.training.trainable import Stage, WholeBatch

MAX_SUBSETS = 16
"""Largest number of subsets that one batch aligns. Above it: all single modalities, and a random choice of the others."""


@dataclass(frozen=True)
class JointStage(Stage):
    """Trains joint encoder and decoders on the ELBO of the joint posterior."""

    name: ClassVar[str] = "joint"
    settings: config.Joint
    model: MultimodalVAE

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        posterior = self.model.joint(batch.arrays, batch.present)
        (elbo,) = elbos(self.model, batch, [posterior], noise.normal(1, self.model.latent))
        return -elbo.mean(), {"elbo": elbo.mean()}


@dataclass(frozen=True)
class RefinerStage(Stage):
    """Trains the refiner. Joint encoder and decoders are trained further, the decoders on refined posteriors too."""

    name: ClassVar[str] = "refiner"
    settings: config.Refiner
    model: MultimodalVAE

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures, refined = _joint_and_refined_loss(self.model, batch, noise, self.settings, train_refiner=True)
        return loss + refined.mean(refined.refiner_loss) / max(1, self.settings.steps), figures

    def score(self, loss: Tensor, figures: Mapping[str, Tensor]) -> Tensor:
        del loss  # the value of the refiner's loss has no meaning
        return (figures["elbo"] + figures["refined"]) / 2


@dataclass(frozen=True)
class ContrastStage(Stage):
    """Trains the aligned encoder on the posterior means of single modalities: to find each other, and to predict classes.

    A modality takes part if most of its values in a batch are distinct: a class does not distinguish rows. InfoNCE compares the
    means of every two of them by their cosine, as in retrieval. Classes, attributes and numbers are decoded from each of them,
    which trains these decoders too. No large decoder runs, so a step costs little and may have many rows. The encoder starts
    from new weights: those of the joint encoder, which sees everything, retrieve worse.

    With ``multimodal_weight`` the same is done with the mean of several modalities, for each modality that is not among them.
    """

    name: ClassVar[str] = "contrast"
    settings: config.Contrast
    model: MultimodalVAE
    by_class: bool
    """Whether rows are paired by class. Rows of one class are then no negatives of each other."""
    weight: float = 1.0
    whole: WholeBatch | None = None
    """The batch of this micro-batch. None: the stage gets whole batches."""

    def rows(self, data: Dataset) -> Dataset:
        return data.with_pairs()

    def within(self, whole: WholeBatch) -> "ContrastStage":
        return replace(self, whole=whole)

    def embed(self, batch: Batch, noise: Noise) -> Float[Tensor, "row subset latent"]:
        """Return the posterior means of every single modality and, with ``multimodal_weight``, of several others of each.

        Those are all other modalities in half of the rows, and half of the others in the other rows. Zeros where a row has no
        modality of a subset, or one of several.
        """
        features = _features_with_dropout(self.model, batch, noise, self.settings.dropout)
        single = torch.eye(len(self.model.modalities), dtype=torch.bool, device=noise.device).unsqueeze(1)
        masks = batch.present & single
        if self.settings.multimodal_weight:
            kept = (noise.choices(2) == 0).unsqueeze(1) | (noise.dropout(0.5, len(single)) > 0)
            several = batch.present & kept & ~single
            masks = torch.cat((masks, several & (several.sum(2, keepdim=True) > 1)))
        students = self.model.aligned.fuse_each(features, masks)
        return torch.stack([student.mean for student in students], dim=1) * masks.any(2).T.unsqueeze(-1)

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        own = embeddings = self.embed(batch, noise)
        rows, count = batch, len(self.model.modalities)
        if self.whole is not None:
            others, part, rows = self.whole.embeddings, self.whole.micro_batch, self.whole.batch
            embeddings = torch.cat((others[: part.start], own, others[part.stop :]))
        groups = torch.stack([_value_numbers(m, rows.arrays[m.name]) for m in self.model.modalities])
        compared = [m for m, of_rows in enumerate(groups) if _are_distinct(of_rows[rows.present[:, m]])]
        if self.by_class and rows.labels is not None:
            groups = rows.labels.expand_as(groups)
        chosen = torch.tensor(compared, dtype=torch.int64).to(groups.device)
        contrast = contrastive_loss(
            embeddings.index_select(1, chosen).transpose(0, 1),
            rows.present.index_select(1, chosen),
            self.settings.temperature,
            groups.index_select(0, chosen),
        )
        figures = {"contrast": contrast}
        itself = torch.eye(count, dtype=torch.bool, device=groups.device)
        if self.settings.prediction:
            sources = ~itself & torch.tensor([m in compared for m in range(count)]).to(groups.device)
            figures["prediction"] = prediction_loss(self.model, batch, own[:, :count], batch.present, sources).mean()
        if weight := self.settings.multimodal_weight:
            found = [self._found_by_others(m, embeddings, rows.present, groups[m]) for m in compared]
            contrast = contrast + weight * torch.stack(found).mean() if found else contrast
            if self.settings.prediction:
                available = own.ne(0).any(-1)
                available[:, :count] &= torch.tensor([m not in compared for m in range(count)]).to(groups.device)
                of_others = prediction_loss(self.model, batch, own, available, torch.cat((~itself, itself), dim=1)).mean()
                figures["prediction"] = figures["prediction"] + weight * of_others
        # A micro-batch has the gradient of its rows only. Gradients add up, but the mean over micro-batches is taken.
        parts = len(rows) / len(batch)
        loss = contrast.detach() + parts * (contrast - contrast.detach())
        if self.settings.prediction:
            loss = loss + self.settings.prediction * figures["prediction"]
        return self.weight * loss, figures

    def _found_by_others(
        self,
        modality: int,
        embeddings: Float[Tensor, "row subset latent"],
        present: Bool[Tensor, "row modality"],
        groups: Int64[Tensor, " row"],
    ) -> Float[Tensor, ""]:
        """Return the contrastive loss between the embedding of a modality and that of several others."""
        several = embeddings[:, len(self.model.modalities) + modality]
        pair = torch.stack((embeddings[:, modality], several))
        has = torch.stack((present[:, modality], several.ne(0).any(-1)), dim=1)
        return contrastive_loss(pair, has, self.settings.temperature, groups.expand(2, -1))


@dataclass(frozen=True)
class AlignStage(Stage):
    """Trains the aligned encoder on the refined joint posterior, from every subset. All but the refiner is trained further.

    Students without a reconstruction term do not learn to generate (as CRMVAE found). So decoders and aligned encoder are also
    trained on samples from the posterior of a random subset.
    """

    name: ClassVar[str] = "align"
    settings: config.Align
    model: MultimodalVAE
    refiner: config.Refiner
    """Of the teacher."""
    contrast: ContrastStage | None = None
    """Contrastive learning next to the alignment. None: without."""
    continues: bool = False
    """Whether the aligned encoder is trained already."""

    @property
    def companion(self) -> ContrastStage | None:
        return self.contrast

    def begin(self) -> None:
        """Initialise the aligned encoder from the joint one, which is trained on complete inputs already."""
        if not self.continues:
            self.model.aligned.initialise_from(self.model.joint)

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        model, settings = self.model, self.settings
        loss, figures, refined = _joint_and_refined_loss(model, batch, noise, self.refiner, train_refiner=False)
        batch, noise, mean = refined.batch, refined.noise, refined.mean
        subsets = _sample_subsets(model, noise)
        features = _features_with_dropout(model, batch, noise, settings.dropout)
        divergences, students = alignment_divergences(model, batch, refined.posterior, subsets, settings.divergence, features)
        if settings.divergence != "none":
            weights = torch.where(subsets.sum(1) > 1, settings.multimodal_weight, 1.0).unsqueeze(1)
            # Not a matrix product: autocast would round it to bfloat16.
            loss = loss + model.beta * mean((weights * divergences).sum(0))
        figures["align"] = mean(divergences.mean(0))
        if settings.jmvae_weight:
            unimodal = students[: len(model.modalities)]
            jmvae = torch.where(batch.present.T, torch.stack([kl(refined.joint, student) for student in unimodal]), 0.0)
            loss = loss + settings.jmvae_weight * model.beta * mean(jmvae.sum(0))
            figures["jmvae"] = mean(jmvae.mean(0))
        if settings.reconstruction:
            # One random student for each row: a single pass through the decoders.
            choice = noise.choices(len(students))
            rows = torch.arange(len(choice), device=choice.device)
            student = Gaussian(*(torch.stack(parts)[choice, rows] for parts in zip(*students, strict=True)))
            z = sample(student, noise.normal(1, model.latent))[:, 0]
            train_decoders = settings.reconstruction_teaches == "all"
            reconstruction = _reconstruction(model, batch, z, train_decoders=train_decoders)
            has_subset = (batch.present & subsets[choice]).any(1)
            reconstruction = torch.where(has_subset, reconstruction, torch.zeros_like(reconstruction))
            if settings.divergence == "none":
                kl_to_prior = torch.where(has_subset, kl(student, standard_like(student)), 0.0)
                loss = loss + settings.reconstruction * model.beta * mean(kl_to_prior)
            loss = loss - settings.reconstruction * mean(reconstruction)
            figures["reconstruction"] = mean(reconstruction)
        return loss, figures


@dataclass(frozen=True)
class RefreshStage(Stage):
    """Trains the refiner only, on the steps that the service takes: from aligned posteriors, with the anchor of the service.

    Half of the rows keep all their modalities, the others keep a random subset.
    """

    name: ClassVar[str] = "refresh"
    settings: config.Refresh
    model: MultimodalVAE
    refiner: config.Refiner
    """With the number of steps of this stage."""

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        subsets = every_subset(len(model.modalities)).to(noise.device)
        # Half of the choices lie past the end: the last subset has all modalities.
        present = batch.present & subsets[noise.choices(2 * len(subsets)).clamp(max=len(subsets) - 1)]
        reduced = Batch(batch.arrays, present, batch.labels)
        with torch.no_grad():
            start = model.aligned(reduced.arrays, present)
        anchor = refinement_anchor(start, present)
        refined = _run_refiner(model, reduced, noise, self.refiner, start, anchor, train_refiner=True)
        with torch.no_grad():
            noise_of_both = noise.normal(2, model.latent)
            at_start, at_refined = elbos(model, reduced, [start, refined.posterior], noise_of_both, anchor)
        figures = {"objective": at_start.mean(), "refined": at_refined.mean()}
        return refined.refiner_loss.mean() / self.refiner.steps, figures

    def score(self, loss: Tensor, figures: Mapping[str, Tensor]) -> Tensor:
        del loss  # its value has no meaning
        return figures["refined"]


@dataclass(frozen=True)
class FlowStage(Stage):
    """Trains the flow only, on -E log q(z | x_S) of samples z of the refined joint posterior: forward KL, mass-covering.

    The flow is conditioned on the aligned posterior of every subset and, for one random subset per row, on its refined
    posterior. With ``settings.prior`` it is conditioned on N(0, I) too, the posterior of the empty subset. Its density is then
    that of the aggregated posterior, a learned prior (Tomczak & Welling 2018).
    """

    name: ClassVar[str] = "flow"
    settings: config.Flow
    model: MultimodalVAE
    refiner: config.Refiner
    """Of the teacher."""
    horizon: int
    """Largest number of refinement steps of the random subset. 0: it is not refined."""

    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        assert model.flow is not None
        with torch.no_grad():
            joint = model.joint(batch.arrays, batch.present)
            teacher = _run_refiner(model, batch, noise, self.refiner, joint, None, train_refiner=False).posterior
            z = sample(teacher, noise.normal(2, model.latent))
            subsets = _sample_subsets(model, noise)
            features = model.aligned.features(batch.arrays, batch.present)
            masks = [batch.present & subset for subset in subsets]
            students = model.aligned.fuse_each(features, torch.stack(masks))
            if self.horizon:
                present = batch.present & subsets[noise.choices(len(subsets))]
                start, steps = model.aligned.fuse(features, present), 1 + int(noise.order(self.horizon)[0])
                reduced, refiner = Batch(batch.arrays, present, batch.labels), self.refiner.model_copy(update={"steps": steps})
                anchor = refinement_anchor(start, present)
                refined = _run_refiner(model, reduced, noise, refiner, start, anchor, train_refiner=False)
                students.append(refined.posterior)
                masks.append(present)
            if self.settings.prior:
                students.append(standard_like(teacher))
                masks.append(torch.ones_like(batch.present))
        has_subset = torch.stack([mask.any(1) for mask in masks])
        conditions = Gaussian(*(torch.cat(parts) for parts in zip(*students, strict=True)))
        with torch.autocast(noise.device.type, enabled=False):  # rounding errors of bfloat16 add up over the couplings
            density = FlowPosterior(conditions, model.flow).log_density(z.repeat(len(masks), 1, 1)).mean(1)
            density = density.view(has_subset.shape)
        log_density = torch.where(has_subset, density, 0.0).mean()
        return -log_density, {"log_density": log_density}


def _value_numbers(modality: Modality, values: Shaped[Tensor, "batch ..."]) -> Int64[Tensor, " batch"]:
    """Return a number for each row, the same for equal values. Images count as distinct."""
    if isinstance(modality, ImageModality):
        return torch.arange(len(values)).to(values.device)
    flat = values.flatten(1).float()
    # Equal rows have equal sums, others hardly ever. To compare whole rows takes as long as a small network.
    factors = torch.rand(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    numbers: Tensor = torch.unique((flat * factors).sum(1), return_inverse=True)[1]
    return numbers


def _are_distinct(numbers: Int64[Tensor, " row"]) -> bool:
    return len(numbers) > 0 and len(torch.unique(numbers)) >= DISTINCT * len(numbers)


def _features_with_dropout(
    model: MultimodalVAE, batch: Batch, noise: Noise, rate: float
) -> Float[Tensor, "row modality feature"]:
    """Return the trunk features of the aligned encoder, with dropout on inputs and features (Srivastava et al. 2014).

    Numbers and attributes are dropped at the input. A pixel or a word less would hide little of an image or a text.
    """
    arrays = dict(batch.arrays)
    for modality in model.modalities if rate else ():
        if isinstance(modality, VectorModality | BinaryModality):
            arrays[modality.name] = arrays[modality.name] * noise.dropout(rate, *modality.shape)
    features = model.aligned.features(arrays, batch.present)
    return features * noise.dropout(rate, *features.shape[1:]) if rate else features


def _sample_subsets(model: MultimodalVAE, noise: Noise) -> Bool[Tensor, "subset modality"]:
    """Return all subsets if there are at most ``MAX_SUBSETS``, else all single modalities and a random choice of the others."""
    subsets = every_subset(len(model.modalities)).to(noise.device)
    if len(subsets) <= MAX_SUBSETS:
        return subsets
    singles = len(model.modalities)
    others = noise.order(len(subsets) - singles)[: MAX_SUBSETS - singles] + singles
    return torch.cat((subsets[:singles], subsets[others]))


def _reconstruction(
    model: MultimodalVAE, batch: Batch, z: Float[Tensor, "batch latent"], *, train_decoders: bool
) -> Float[Tensor, " batch"]:
    """Return the weighted log likelihood of each row given one sample z.

    Args:
        train_decoders: whether the decoders receive a gradient, or z only.
    """
    if train_decoders:
        return model.weighted_log_likelihood(batch.arrays, batch.present, z.unsqueeze(1))[:, 0]
    with torch.enable_grad():  # validation has none
        leaf = z.detach().requires_grad_()
        log_likelihood = model.weighted_log_likelihood(batch.arrays, batch.present, leaf.unsqueeze(1))[:, 0]
        (gradient,) = torch.autograd.grad(log_likelihood.sum(), leaf)
    return log_likelihood.detach() + (gradient * (z - leaf.detach())).sum(-1)


class _RefinedRows(NamedTuple):
    """The rows of a batch whose posteriors are refined."""

    batch: Batch
    noise: Noise
    """Of these rows."""
    joint: Gaussian
    """Their posteriors before refinement."""
    posterior: Gaussian
    """Their refined posteriors, detached."""
    refiner_loss: Float[Tensor, " row"]
    """See ``RefinementResult``."""
    expected_rows: float
    """Number of these rows, in the mean over all choices of them."""

    def mean(self, values: Float[Tensor, " row"]) -> Float[Tensor, ""]:
        """Return an unbiased estimate of the mean over the whole batch (Horvitz & Thompson 1952)."""
        return values.sum() / self.expected_rows


def _joint_and_refined_loss(
    model: MultimodalVAE, batch: Batch, noise: Noise, settings: config.Refiner, *, train_refiner: bool
) -> tuple[Tensor, dict[str, Tensor], _RefinedRows]:
    """Return the negative mean ELBO of joint and refined posteriors, figures, and the refined rows.

    If all rows are refined, each has a sample of both posteriors. Otherwise each row has one sample: refined rows of their
    refined posterior, other rows of their joint posterior. Both means are estimated without bias.
    """
    joint, size, share = model.joint(batch.arrays, batch.present), len(batch), settings.share
    if share == 1:
        result = _run_refiner(model, batch, noise, settings, joint, None, train_refiner=train_refiner)
        refined = _RefinedRows(batch, noise, joint, *result, size)
        elbo_joint, elbo_refined = (
            elbo.mean() for elbo in elbos(model, batch, [joint, result.posterior], noise.normal(2, model.latent))
        )
    else:
        rows, others = noise.split(share)
        part, part_noise, start = batch.take(rows), noise.take(rows), Gaussian(joint.mean[rows], joint.log_var[rows])
        result = _run_refiner(model, part, part_noise, settings, start, None, train_refiner=train_refiner)
        refined = _RefinedRows(part, part_noise, start, *result, share * size)
        each = Gaussian(*(before.index_copy(0, rows, after) for before, after in zip(joint, result.posterior, strict=True)))
        (elbo,) = elbos(model, batch, [each], noise.normal(1, model.latent))
        elbo_joint, elbo_refined = elbo[others].sum() / ((1 - share) * size), refined.mean(elbo[rows])
    return -(elbo_joint + elbo_refined) / 2, {"elbo": elbo_joint, "refined": elbo_refined}, refined


def _run_refiner(
    model: MultimodalVAE,
    batch: Batch,
    noise: Noise,
    settings: config.Refiner,
    start: Gaussian,
    anchor: Gaussian | None,
    *,
    train_refiner: bool,
) -> RefinementResult:
    """Sample the noise of the refinement steps and return the result of ``objectives.refine``."""
    pairs = settings.samples // 2
    step_noise = antithetic(noise.normal(pairs, model.latent))
    steps = range(settings.steps) if train_refiner else ()
    evaluation_noise = [antithetic(noise.normal(pairs, model.latent)) for _ in steps]
    stacked = torch.stack(evaluation_noise) if evaluation_noise else None
    return refine(model, batch, start, step_noise, settings.steps, stacked, anchor)
