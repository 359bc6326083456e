"""The loss of each training stage, and the networks that it trains."""

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from concord.model.modality import VectorModality
from concord.model.vae.gaussian import Gaussian, antithetic, kl, sample, standard_like
from concord.model.vae.multimodal import MultimodalVAE
from concord.training import config, stages
from concord.training.concord import Concord
from concord.training.data.dataset import Batch
from concord.training.distributed import Noise
from concord.training.objectives import contrastive_loss, every_subset, prediction_loss
from concord.training.posteriors import FlowPosterior, log_prior
from concord.training.stages import AlignStage, ContrastStage, FlowStage, JointStage, RefinerStage, RefreshStage
from concord.training.trainable import Stage, WholeBatch

ROWS = 6
REFINER = config.Refiner(steps=2, samples=2)


def make_stage(name: str, vae: MultimodalVAE) -> Stage:
    if name == "joint":
        return JointStage(config.Joint(), vae)
    if name == "refiner":
        return RefinerStage(REFINER, vae)
    if name == "align":
        return AlignStage(config.Align(reconstruction=0.5), vae, REFINER)
    if name == "contrast":
        return ContrastStage(config.Contrast(epochs=1, prediction=1.0), vae, by_class=False)
    return RefreshStage(config.Refresh(epochs=1), vae, REFINER)


def align(vae: MultimodalVAE, batch: Batch, *, seed: int = 0, refiner: config.Refiner = REFINER, **settings: Any) -> Any:
    """Return loss and figures of the align stage."""
    return AlignStage(config.Align(**settings), vae, refiner)(batch, seeded(seed))


STAGES = ("joint", "refiner", "contrast", "align", "refresh")


@pytest.fixture
def vae(tiny_vae: Concord, make_vae: Any) -> Concord:
    return make_vae(tiny_vae.modalities).requires_grad_(True)


@pytest.fixture
def batch(tiny_vae: Concord, make_rows: Any) -> Batch:
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    present[:, 0] |= ~present.any(1)
    return Batch(make_rows(tiny_vae.modalities, ROWS), present, None)


def seeded(seed: int = 0) -> Noise:
    return Noise(seed, ROWS)


def gradients(vae: MultimodalVAE, loss: Tensor, part: str) -> list[Tensor]:
    parameters = list(getattr(vae, part).parameters())
    values = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, values, strict=True)]


def has_gradient(vae: MultimodalVAE, loss: Tensor, part: str) -> bool:
    return any(bool(gradient.any()) for gradient in gradients(vae, loss, part))


def test_stages_are_joint_refiner_align_and_optionally_refresh(vae: Concord, make_config: Any) -> None:
    settings = make_config()
    plan = vae.stages(settings)
    assert [stage.name for stage in plan] == ["joint", "refiner", "align"]
    assert [stage.settings for stage in plan] == [settings.joint, settings.refiner, settings.align]
    refresh = {"epochs": 1, "batch_size": 7}
    settings = make_config(refresh=refresh)
    assert [stage.name for stage in vae.stages(settings)] == ["joint", "refiner", "align", "refresh"]
    assert vae.stages(settings)[-1].settings == settings.refresh
    without_refinement = make_config(refresh=refresh, refiner={"steps": 0})
    assert [stage.name for stage in vae.stages(without_refinement)] == ["joint", "refiner", "align"]


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("joint", {"joint", "decoders"}),
        ("refiner", {"joint", "decoders", "refiner"}),
        ("contrast", {"aligned", "decoders"}),
        ("align", {"joint", "decoders", "aligned"}),
        ("refresh", {"refiner"}),
    ],
)
def test_stage_trains_its_networks_only(vae: Concord, batch: Batch, name: str, trained: set[str]) -> None:
    loss, _ = make_stage(name, vae)(batch, seeded())
    parts = {"joint", "decoders", "refiner", "aligned"}
    assert {part for part in parts if has_gradient(vae, loss, part)} == trained


@pytest.mark.parametrize("name", STAGES)
def test_loss_is_finite_and_depends_on_the_seed_only(vae: Concord, batch: Batch, name: str) -> None:
    stage = make_stage(name, vae)
    (first, figures), (again, _), (other, _) = (stage(batch, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite()
    assert all(figure.isfinite() and figure.ndim == 0 for figure in figures.values())


def test_stages_of_a_configuration_have_its_settings(vae: Concord, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 2, "samples": 2}, align={"reconstruction": 0.5}, refresh={"epochs": 1})
    for stage in vae.stages(settings):
        assert torch.equal(stage(batch, seeded())[0], make_stage(stage.name, vae)(batch, seeded())[0])


def test_joint_loss_is_the_negative_elbo(vae: Concord, batch: Batch) -> None:
    loss, figures = JointStage(config.Joint(), vae)(batch, seeded())
    q = vae.joint(batch.arrays, batch.present)
    expected = vae.objective(batch.arrays, batch.present, q, standard_like(q), seeded().normal(1, vae.latent)).mean()
    torch.testing.assert_close(-loss, expected)
    torch.testing.assert_close(figures["elbo"], expected)


def test_align_loss_adds_weighted_alignment_and_reconstruction(vae: Concord, batch: Batch) -> None:
    """Beta weighs the alignment as it weighs the KL term of the ELBO."""
    (plain, figures), (with_reconstruction, its_figures) = (
        align(vae, batch, reconstruction=weight, multimodal_weight=1.0, jmvae_weight=0) for weight in (0.0, 3.0)
    )
    assert "reconstruction" not in figures
    torch.testing.assert_close(plain - with_reconstruction, 3.0 * its_figures["reconstruction"])
    joint_loss = -(figures["elbo"] + figures["refined"]) / 2
    torch.testing.assert_close(plain - joint_loss, vae.beta * 15 * figures["align"])


def test_multimodal_weight_scales_the_divergence_of_multimodal_subsets(vae: Concord, batch: Batch) -> None:
    one, half = (align(vae, batch, reconstruction=0, jmvae_weight=0, multimodal_weight=w)[0] for w in (1.0, 0.5))
    start = vae.joint(batch.arrays, batch.present)
    noise = antithetic(seeded().normal(1, vae.latent))
    teacher = stages.refine(vae, batch, start, noise, REFINER.steps).posterior
    multimodal = stages.alignment_divergences(vae, batch, teacher, every_subset(4)[4:])[0]
    torch.testing.assert_close(one - half, 0.5 * vae.beta * multimodal.sum(0).mean(), rtol=1e-4, atol=1e-4)


def test_multimodal_weight_is_not_rounded_under_autocast(vae: Concord, batch: Batch) -> None:
    """bfloat16 cannot represent 0.1."""
    with torch.autocast("cpu", torch.bfloat16):
        one, tenth = (align(vae, batch, reconstruction=0, jmvae_weight=0, multimodal_weight=w)[0] for w in (1.0, 0.1))
        start = vae.joint(batch.arrays, batch.present)
        teacher = stages.refine(vae, batch, start, antithetic(seeded().normal(1, vae.latent)), REFINER.steps).posterior
        multimodal = stages.alignment_divergences(vae, batch, teacher, every_subset(4)[4:])[0]
    torch.testing.assert_close(one - tenth, 0.9 * vae.beta * multimodal.sum(0).mean(), rtol=1e-5, atol=1e-4)


def test_reconstruction_teaches_encoder_leaves_decoders_untrained(vae: Concord, batch: Batch) -> None:
    """Loss and gradient of the encoder are the same with both settings."""
    everything, encoder_only = (
        align(vae, batch, reconstruction=0.5, jmvae_weight=0, reconstruction_teaches=value) for value in ("all", "encoder")
    )
    torch.testing.assert_close(everything[0], encoder_only[0])
    pairs = zip(gradients(vae, encoder_only[0], "aligned"), gradients(vae, everything[0], "aligned"), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient, expected)
    assert has_gradient(vae, everything[1]["reconstruction"], "decoders")
    assert not has_gradient(vae, encoder_only[1]["reconstruction"], "decoders")


def test_alignment_does_not_train_the_teacher(vae: Concord, batch: Batch) -> None:
    loss, figures = align(vae, batch, reconstruction=0, jmvae_weight=0)
    joint_loss = -(figures["elbo"] + figures["refined"]) / 2
    for gradient, expected in zip(gradients(vae, loss, "joint"), gradients(vae, joint_loss, "joint"), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_jmvae_term_trains_both_encoders(vae: Concord, batch: Batch) -> None:
    (plain, without), (loss, figures) = (align(vae, batch, reconstruction=0, jmvae_weight=weight) for weight in (0.0, 0.5))
    assert "jmvae" not in without
    torch.testing.assert_close(loss - plain, 0.5 * vae.beta * len(vae.modalities) * figures["jmvae"])
    for part in ("joint", "aligned"):
        assert has_gradient(vae, figures["jmvae"], part)


def test_zero_refiner_steps_make_the_joint_posterior_the_teacher(vae: Concord, batch: Batch) -> None:
    """The decoders are trained on two samples of it, as often as with refinement."""
    refiner = config.Refiner(steps=0, samples=2)
    loss, figures = RefinerStage(refiner, vae)(batch, seeded())
    assert torch.equal(loss, -(figures["elbo"] + figures["refined"]) / 2)
    assert not has_gradient(vae, loss, "refiner")
    assert has_gradient(vae, figures["refined"], "decoders")
    _, figures = align(vae, batch, refiner=refiner)
    q = vae.joint(batch.arrays, batch.present)
    divergences, _ = stages.alignment_divergences(vae, batch, q, every_subset(len(vae.modalities)))
    torch.testing.assert_close(figures["align"], divergences.mean())


class ZeroNoise(Noise):
    """Noise that does not depend on the choice of the rows: zeros, and given chosen rows."""

    chosen: Tensor

    def normal(self, *shape: int) -> Tensor:
        return torch.zeros_like(super().normal(*shape))

    def choices(self, count: int) -> Tensor:
        return super().choices(count) * 0

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        del share
        return self.chosen.nonzero().flatten(), (~self.chosen).nonzero().flatten()


@pytest.mark.parametrize("name", ["refiner", "align"])
@pytest.mark.parametrize("chosen_rows", [1, 3])
def test_mean_over_all_choices_of_refined_rows_is_the_loss_of_all_rows(
    vae: Concord, batch: Batch, name: str, chosen_rows: int
) -> None:
    """Loss, figures and gradients of a share of the rows are unbiased: enumeration of all choices."""

    def stage(share: float) -> Stage:
        refiner = config.Refiner(steps=2, samples=2, share=share)
        return RefinerStage(refiner, vae) if name == "refiner" else AlignStage(config.Align(), vae, refiner)

    def step(share: float, rows: tuple[int, ...] = ()) -> dict[str, Tensor]:
        noise = ZeroNoise(0, ROWS)
        noise.chosen = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, torch.tensor(rows, dtype=torch.int64), value=True)
        loss, figures = stage(share)(batch, noise)
        parts = {
            part: torch.cat([g.flatten() for g in gradients(vae, loss, part)]) for part in ("joint", "decoders", "aligned")
        }
        return {"loss": loss, "refiner": torch.cat([g.flatten() for g in gradients(vae, loss, "refiner")]), **parts, **figures}

    every = [step(chosen_rows / ROWS, rows) for rows in itertools.combinations(range(ROWS), chosen_rows)]
    for figure, expected in step(1.0).items():
        mean = torch.stack([values[figure] for values in every]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4, msg=lambda text, figure=figure: f"{figure}: {text}")
    assert not torch.equal(every[0]["loss"], every[1]["loss"])


@pytest.mark.parametrize("name", ["refiner", "align"])
def test_step_without_a_refined_row_trains_on_joint_posteriors(vae: Concord, batch: Batch, name: str) -> None:
    """As a small micro-batch may have."""
    noise = ZeroNoise(0, ROWS)
    noise.chosen = torch.zeros(ROWS, dtype=torch.bool)
    refiner = config.Refiner(share=0.25)
    stage = RefinerStage(refiner, vae) if name == "refiner" else AlignStage(config.Align(), vae, refiner)
    loss, figures = stage(batch, noise)
    torch.testing.assert_close(loss, -figures["elbo"] / 2)
    assert has_gradient(vae, loss, "joint")


def test_decoders_are_trained_on_refined_posteriors_too(vae: Concord, batch: Batch) -> None:
    _, figures = RefinerStage(REFINER, vae)(batch, seeded())
    assert has_gradient(vae, figures["refined"], "decoders")
    assert not has_gradient(vae, figures["refined"], "joint")


def test_refresh_trains_the_refiner_on_the_starts_and_anchors_of_the_service(
    vae: Concord, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is the aligned posterior. The anchor is the prior for complete rows, else the start."""
    batch.present[: ROWS // 2] = True
    original, calls = stages.refine, []

    def recording_refine(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(stages, "refine", recording_refine)
    with torch.no_grad():
        for parameter in vae.refiner.parameters():
            parameter.zero_()  # rates that suit no posterior
        vae.refiner.rates[-1].bias.fill_(-9.0)
        aligned = vae.aligned(batch.arrays, batch.present)
    stage = RefreshStage(config.Refresh(epochs=1), vae, REFINER)

    def gain() -> float:
        figures = [stage(batch, seeded(seed))[1] for seed in range(20)]
        return float(torch.stack([figure["refined"] - figure["objective"] for figure in figures]).mean())

    before = gain()
    present = torch.stack([reduced.present for _, reduced, *_ in calls])
    assert not (present & ~batch.present).any(), "no modality that a row lacks"
    assert present[:, : ROWS // 2].all(2).float().mean() == pytest.approx(16 / 30, abs=0.2), "half of the rows are complete"
    assert len({tuple(row) for row in present[:, : ROWS // 2].flatten(0, 1).tolist()}) > 10, "of 15 subsets"
    for _, reduced, start, *_, anchor in calls:
        expected, prior = vae.aligned(reduced.arrays, reduced.present), standard_like(start)
        complete = reduced.present.all(1, keepdim=True)
        for of_start, of_anchor, of_aligned, of_prior in zip(start, anchor, expected, prior, strict=True):
            torch.testing.assert_close(of_start, of_aligned)
            torch.testing.assert_close(of_anchor, torch.where(complete, of_prior, of_aligned))
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    for seed in range(100, 160):
        optimizer.zero_grad()
        stage(batch, seeded(seed))[0].backward()
        optimizer.step()
    assert gain() > before + 1
    assert torch.equal(vae.aligned(batch.arrays, batch.present).mean, aligned.mean), "the other networks are unchanged"


def test_refresh_may_have_more_steps_than_the_teacher(vae: Concord, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 1, "samples": 2}, refresh={"epochs": 1, "steps": 3})
    assert settings.horizon == 3
    *_, align_stage, refresh_stage = vae.stages(settings)
    teacher, longer = config.Refiner(steps=1, samples=2), config.Refiner(steps=3, samples=2)
    expected = RefreshStage(settings.refresh, vae, longer)
    assert torch.equal(refresh_stage(batch, seeded())[0], expected(batch, seeded())[0])
    expected = AlignStage(settings.align, vae, teacher)
    assert torch.equal(align_stage(batch, seeded())[0], expected(batch, seeded())[0])
    assert make_config(refiner={"steps": 1}, refresh={"epochs": 0, "steps": 3}).horizon == 1
    assert make_config(refiner={"steps": 0}, refresh={"epochs": 1, "steps": 3}).horizon == 0


def contrast(vae: MultimodalVAE, batch: Batch, noise: Noise, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return ContrastStage(config.Contrast(epochs=1, **settings), vae, by_class=False)(batch, noise)


def test_contrast_loss_compares_the_means_of_single_modalities(vae: Concord, batch: Batch) -> None:
    loss, figures = contrast(vae, batch, seeded(), temperature=0.2, dropout=0.0)
    singles = every_subset(4)[:4]
    means = torch.stack([vae.aligned(batch.arrays, batch.present & single).mean for single in singles])
    values = [batch.arrays[m.name] for m in vae.modalities]
    distinct = [m for m, x in enumerate(values) if len(x[batch.present[:, m]].unique(dim=0)) >= stages.DISTINCT * len(x)]
    assert len(distinct) >= 2
    groups = torch.stack([x.unique(dim=0, return_inverse=True)[1] for x in values])[distinct]
    torch.testing.assert_close(loss, contrastive_loss(means[distinct], batch.present[:, distinct], 0.2, groups))
    torch.testing.assert_close(figures["contrast"], loss)


def test_contrast_adds_the_prediction_of_classes_and_numbers(vae: Concord, batch: Batch) -> None:
    loss, figures = contrast(vae, batch, seeded(), prediction=0.5)
    torch.testing.assert_close(loss, figures["contrast"] + 0.5 * figures["prediction"])
    assert figures["prediction"] > 0


def test_contrast_leaves_out_modalities_with_few_values(vae: Concord, batch: Batch) -> None:
    """A value that is the same in all rows is compared with nothing, so the loss has no term of it."""
    present = torch.ones_like(batch.present)
    constant = {name: x[:1].expand_as(x) for name, x in batch.arrays.items()}
    images = [m.name for m in vae.modalities if m.kind == "image"]
    assert len(images) == 1
    assert contrast(vae, Batch(constant, present, None), seeded())[1]["contrast"] == 0


def test_contrast_embeds_several_others_of_each_modality(vae: Concord, batch: Batch) -> None:
    present = torch.ones_like(batch.present)
    present[0], present[0, 1] = False, True
    rows = Batch(batch.arrays, present, None)
    stage = ContrastStage(config.Contrast(dropout=0.0, multimodal_weight=1.0), vae, by_class=False)
    embeddings = stage.embed(rows, seeded())
    count = len(vae.modalities)
    assert embeddings.shape == (ROWS, 2 * count, vae.latent)
    assert not embeddings[0, count:].any(), "a row with one modality has no several others"
    subsets = [subset for subset in every_subset(count) if subset.sum() > 1]
    means = torch.stack([vae.aligned(rows.arrays, present & subset).mean for subset in subsets])
    found = set()
    for row in range(1, ROWS):
        for modality in range(count):
            several = embeddings[row, count + modality]
            if several.any():
                (number,) = (means[:, row] - several).abs().amax(1).lt(1e-4).nonzero().flatten().tolist()
                assert not subsets[number][modality], "it sees the modality that it has to find"
                found.add((modality, int(subsets[number].sum())))
    assert {modality for modality, _ in found} == set(range(count))
    assert {size for _, size in found} == {2, 3}


def test_contrast_of_several_adds_what_finds_and_predicts_the_modality_that_they_lack(vae: Concord, batch: Batch) -> None:
    options = {"temperature": 0.2, "dropout": 0.0, "prediction": 1.0}
    stage = ContrastStage(config.Contrast(**options, multimodal_weight=0.5), vae, by_class=False)
    loss, _ = stage(batch, seeded())
    single, figures = contrast(vae, batch, seeded(), **options)
    embeddings, count = stage.embed(batch, seeded()), len(vae.modalities)
    has_several = embeddings[:, count:].ne(0).any(-1)
    values = [batch.arrays[m.name] for m in vae.modalities]
    distinct = [m for m, x in enumerate(values) if len(x[batch.present[:, m]].unique(dim=0)) >= stages.DISTINCT * len(x)]
    groups = [x.unique(dim=0, return_inverse=True)[1] for x in values]
    pairs = [
        contrastive_loss(
            torch.stack((embeddings[:, m], embeddings[:, count + m])),
            torch.stack((batch.present[:, m], has_several[:, m]), dim=1),
            0.2,
            groups[m].expand(2, -1),
        )
        for m in distinct
    ]
    is_searched = torch.tensor([m in distinct for m in range(count)])
    available = torch.cat((batch.present & ~is_searched, has_several), dim=1)
    itself = torch.eye(count, dtype=torch.bool)
    prediction = prediction_loss(vae, batch, embeddings, available, torch.cat((~itself, itself), dim=1)).mean()
    torch.testing.assert_close(loss, single + 0.5 * (torch.stack(pairs).mean() + prediction))
    assert figures["contrast"] > 0


def test_contrast_with_class_pairing_has_no_negatives_of_the_same_class(vae: Concord, batch: Batch) -> None:
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labelled = Batch(batch.arrays, batch.present, labels)
    paired, unpaired = (ContrastStage(config.Contrast(), vae, by_class=by_class) for by_class in (True, False))
    assert paired(labelled, seeded())[1]["contrast"] == 0, "all rows have the same class"
    assert unpaired(labelled, seeded())[1]["contrast"] > 0


def test_dropout_changes_the_aligned_encoder_only(vae: Concord, batch: Batch) -> None:
    assert contrast(vae, batch, seeded(), dropout=0.0)[0] != contrast(vae, batch, seeded(), dropout=0.5)[0]
    whole, dropped = (align(vae, batch, dropout=rate, reconstruction=0)[1] for rate in (0.0, 0.5))
    assert whole["align"] != dropped["align"]
    assert (whole["elbo"], whole["refined"]) == (dropped["elbo"], dropped["refined"]), "the joint encoder sees everything"


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_contrast_of_micro_batches_has_the_gradient_of_the_whole_batch(vae: Concord, batch: Batch, weight: float) -> None:
    settings = config.Contrast(prediction=1.0, multimodal_weight=weight)
    stage = ContrastStage(settings, vae, by_class=False, weight=3.0)
    loss, _ = stage(batch, seeded())
    expected = gradients(vae, loss, "aligned") + gradients(vae, loss, "decoders")
    parts = [slice(0, 1), slice(1, 4), slice(4, ROWS)]
    with torch.no_grad():
        embeddings = torch.cat([stage.embed(batch.take(part), Noise(0, ROWS, part)) for part in parts])
    total, sums = 0.0, [torch.zeros_like(gradient) for gradient in expected]
    for part in parts:
        within = stage.within(WholeBatch(batch, embeddings, part))
        value, _ = within(batch.take(part), Noise(0, ROWS, part))
        share = (part.stop - part.start) / ROWS
        total += share * value.item()
        addends = gradients(vae, value, "aligned") + gradients(vae, value, "decoders")
        sums = [total_of + share * addend for total_of, addend in zip(sums, addends, strict=True)]
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for gradient, whole in zip(sums, expected, strict=True):
        torch.testing.assert_close(gradient, whole, rtol=1e-3, atol=1e-5)


def test_contrast_stage_precedes_align_which_continues_with_its_weights(vae: Concord, make_config: Any) -> None:
    *_, alone = vae.stages(make_config())
    assert alone.companion is None
    *_, first, second = vae.stages(make_config(contrast={"epochs": 1}, align={"contrast_weight": 2.0}))
    assert (first.name, second.name) == ("contrast", "align")
    assert isinstance(second.companion, ContrastStage)
    assert second.companion.settings == first.settings
    assert second.companion.weight == 2.0 * vae.beta * len(vae.modalities)

    def weights() -> Tensor:
        return torch.cat([parameter.flatten() for parameter in vae.aligned.parameters()])

    joint = torch.cat([parameter.flatten() for parameter in vae.joint.parameters()])
    before = weights()
    first.begin()
    second.begin()
    assert torch.equal(weights(), before)
    alone.begin()
    assert torch.equal(weights(), joint)


@pytest.mark.parametrize("pairing", ["row", "class"])
def test_contrast_knows_how_rows_are_paired(vae: Concord, make_config: Any, pairing: str) -> None:
    settings = make_config(photo=pairing == "class", contrast={"epochs": 1}, align={"contrast_weight": 1.0})
    *_, stage, align_stage = vae.stages(settings)
    assert isinstance(stage, ContrastStage)
    assert isinstance(align_stage, AlignStage)
    assert align_stage.contrast is not None
    assert stage.by_class == align_stage.contrast.by_class == (pairing == "class")


@pytest.fixture
def vae_with_flow(tiny_vae: Concord, make_vae: Any) -> Concord:
    return make_vae(tiny_vae.modalities, couplings=2).requires_grad_(True)


def flow_stage(vae: Concord, settings: config.Config) -> FlowStage:
    return FlowStage(settings.flow, vae, settings.refiner, settings.horizon)


def test_flow_stage_is_last_and_trains_the_flow_only(vae_with_flow: Concord, batch: Batch, make_config: Any) -> None:
    vae, settings = vae_with_flow, make_config(refiner={"steps": 2, "samples": 2}, flow={"epochs": 1})
    *_, stage = vae.stages(settings)
    assert (stage.name, stage.settings) == ("flow", settings.flow)
    loss, figures = stage(batch, seeded())
    assert torch.equal(loss, flow_stage(vae, settings)(batch, seeded())[0])
    assert all(bool(gradient.any()) for gradient in gradients(vae, loss, "flow"))
    assert not any(has_gradient(vae, loss, part) for part in ("joint", "decoders", "refiner", "aligned"))
    torch.testing.assert_close(-loss, figures["log_density"])
    with torch.autocast("cpu", torch.bfloat16):
        assert stage(batch, seeded())[0].dtype == torch.float32


def test_flow_is_trained_with_full_spread(vae_with_flow: Concord, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 2, "samples": 2}, flow={"epochs": 1})
    stage = flow_stage(vae_with_flow, settings)
    loss, _ = stage(batch, seeded())
    vae_with_flow.spread = 0.5
    assert torch.equal(stage(batch, seeded())[0], loss)


def test_flow_loss_is_the_negative_log_density_of_teacher_samples(
    vae_with_flow: Concord, batch: Batch, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all subsets, and over one random subset whose posterior is refined."""
    vae = vae_with_flow
    settings = make_config(refiner={"steps": 2, "samples": 2}, refresh={"epochs": 1, "steps": 3}, flow={"epochs": 1})
    original, calls = stages._run_refiner, []

    def recording_run_refiner(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, original(*arguments, **options)))
        return calls[-1][1]

    monkeypatch.setattr(stages, "_run_refiner", recording_run_refiner)
    loss, _ = flow_stage(vae, settings)(batch, seeded())
    (teacher_arguments, teacher), (student_arguments, refined_student) = calls
    assert teacher_arguments[3].steps == 2
    assert student_arguments[3].steps in (1, 2, 3)
    present = student_arguments[1].present
    torch.testing.assert_close(student_arguments[4].mean, vae.aligned(batch.arrays, present).mean)
    noise = seeded()
    noise.normal(1, vae.latent)
    z = sample(teacher.posterior, noise.normal(2, vae.latent))
    terms = []
    for mask in [*(batch.present & subset for subset in every_subset(4)), None]:
        student = refined_student.posterior if mask is None else vae.aligned(batch.arrays, mask)
        has_subset = (present if mask is None else mask).any(1)
        terms.append(torch.where(has_subset, FlowPosterior(student, vae.flow).log_density(z).mean(1), 0.0))
    torch.testing.assert_close(loss, -torch.stack(terms).mean())
    settings = make_config(
        refiner={"steps": 2, "samples": 2}, refresh={"epochs": 1, "steps": 3}, flow={"epochs": 1, "prior": True}
    )
    standard = standard_like(teacher.posterior)
    terms.append(FlowPosterior(standard, vae.flow).log_density(z).mean(1))
    torch.testing.assert_close(flow_stage(vae, settings)(batch, seeded())[0], -torch.stack(terms).mean())
    flow_stage(vae, make_config(refiner={"steps": 0}, flow={"epochs": 1}))(batch, seeded())
    assert len(calls) == 5, "an untrained refiner refines no student"


def test_flow_that_learns_the_prior_samples_like_all_rows_together(make_vae: Any) -> None:
    """The targets are a narrow cluster away from zero."""
    vae = make_vae([VectorModality(name="a", size=1), VectorModality(name="b", size=1)], couplings=2).requires_grad_(True)
    noise = torch.randn(500, vae.latent, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.sample_prior(noise), noise)
    torch.testing.assert_close(vae.log_prior(noise.unsqueeze(0))[0], log_prior(noise))
    vae.learns_prior = True
    optimizer = torch.optim.Adam(vae.flow.parameters(), lr=1e-2)
    prior = Gaussian(torch.zeros(100, vae.latent), torch.zeros(100, vae.latent))
    for step in range(100):
        z = 1 + 0.3 * torch.randn(100, 1, vae.latent, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (-FlowPosterior(prior, vae.flow).log_density(z).mean()).backward()
        optimizer.step()
    samples = vae.sample_prior(noise).detach()
    assert (samples.median(0).values - 1).abs().max() < 0.3
    assert (samples - 1).abs().median() < 0.3
    density = Normal(1.0, 0.3).log_prob(z[:, 0]).sum(-1)  # which the flow learned
    assert (vae.log_prior(z)[:, 0] - density).mean().abs() < 1
    assert (log_prior(z)[:, 0] - density).mean() < -5


def test_many_modalities_align_all_singles_and_a_random_choice_of_the_others(
    vae: Concord, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = stages.alignment_divergences, []

    def recording_divergences(model: MultimodalVAE, rows: Batch, teacher: Any, subsets: Tensor, *options: Any) -> Any:
        calls.append(subsets)
        return original(model, rows, teacher, subsets, *options)

    monkeypatch.setattr(stages, "alignment_divergences", recording_divergences)
    monkeypatch.setattr(stages, "MAX_SUBSETS", 7)
    for seed in range(20):
        loss, _ = align(vae, batch, seed=seed)
        assert loss.isfinite()
    singles = every_subset(4)[:4]
    chosen = set()
    for subsets in calls:
        assert torch.equal(subsets[:4], singles)
        others = {tuple(row) for row in subsets[4:].tolist()}
        assert len(others) == 3
        chosen |= others
    assert chosen == {tuple(row) for row in every_subset(4)[4:].tolist()}, "each occurs within 20 batches"


def test_divergence_setting_selects_the_alignment_term(vae: Concord, batch: Batch) -> None:
    names = get_args(config.Divergence)
    results = {name: align(vae, batch, divergence=name, multimodal_weight=1.0, jmvae_weight=0) for name in names}
    forward, reverse, both, none = results.values()
    count, weight = len(every_subset(4)), config.Align().reconstruction
    for loss, figures in (forward, reverse, both):
        others = (figures["elbo"] + figures["refined"]) / 2 + weight * figures["reconstruction"]
        torch.testing.assert_close(loss, vae.beta * count * figures["align"] - others)
    assert not torch.isclose(forward[1]["align"], reverse[1]["align"])
    # Without a teacher the random student has a KL to the prior, and its reconstruction is the same.
    loss, figures = none
    assert torch.equal(figures["reconstruction"], forward[1]["reconstruction"])
    noise = seeded()
    stages._joint_and_refined_loss(vae, batch, noise, REFINER, train_refiner=False)  # uses the noise before
    choice = noise.choices(count)
    joint = vae.joint(batch.arrays, batch.present)
    _, students = stages.alignment_divergences(vae, batch, joint, every_subset(4))
    kl_to_prior = torch.stack([kl(student, standard_like(student)) for student in students])[choice, torch.arange(ROWS)]
    has_subset = (batch.present & every_subset(4)[choice]).any(1)
    kl_to_prior = torch.where(has_subset, kl_to_prior, 0.0).mean()
    elbo = (figures["elbo"] + figures["refined"]) / 2
    torch.testing.assert_close(loss, -elbo - weight * (figures["reconstruction"] - vae.beta * kl_to_prior))
