"""What each stage minimises, and which networks it teaches."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from model.vae.gaussian import antithetic, kl, sample, standard_like
from model.vae.multimodal import MultimodalVAE
from training import config, stages
from training.data import Batch
from training.objectives import every_subset
from training.parallel import Noise
from training.posteriors import FlowPosterior
from training.stages import align_loss, flow_loss, joint_loss, refiner_loss, refresh_loss

ROWS = 6
REFINER = config.Refiner(steps=2, samples=2)
Loss = Callable[[MultimodalVAE, Batch, Noise], tuple[Tensor, dict[str, Tensor]]]
LOSSES: dict[str, Loss] = {
    "joint": joint_loss,
    "refiner": lambda vae, batch, noise: refiner_loss(vae, batch, noise, REFINER),
    "align": lambda vae, batch, noise: align_loss(vae, batch, noise, REFINER, config.Align(reconstruction=0.5)),
    "refresh": lambda vae, batch, noise: refresh_loss(vae, batch, noise, REFINER),
}


@pytest.fixture
def vae(tiny_vae: MultimodalVAE, make_vae: Any) -> MultimodalVAE:
    return make_vae(tiny_vae.modalities).requires_grad_(True)


@pytest.fixture
def batch(tiny_vae: MultimodalVAE, make_rows: Any) -> Batch:
    present = torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    present[:, 0] |= ~present.any(1)
    return Batch(make_rows(tiny_vae.modalities, ROWS), present, None)


def seeded(seed: int = 0) -> Noise:
    return Noise(seed, ROWS)


def slopes(vae: MultimodalVAE, loss: Tensor, part: str) -> list[Tensor]:
    parameters = list(getattr(vae, part).parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_three_stages_in_their_order_and_a_fourth_on_demand(vae: MultimodalVAE, make_config: Any) -> None:
    settings = make_config()
    plan = stages.stages(vae, settings)
    assert [stage.name for stage in plan] == ["joint", "refiner", "align"]
    assert [stage.settings for stage in plan] == [settings.joint, settings.refiner, settings.align]
    again = {"epochs": 1, "batch_size": 7}
    settings = make_config(refresh=again)
    assert [stage.name for stage in stages.stages(vae, settings)] == ["joint", "refiner", "align", "refresh"]
    assert stages.stages(vae, settings)[-1].settings == settings.refresh
    nothing_to_learn = make_config(refresh=again, refiner={"steps": 0})
    assert [stage.name for stage in stages.stages(vae, nothing_to_learn)] == ["joint", "refiner", "align"]


@pytest.mark.parametrize(
    ("name", "taught"),
    [
        ("joint", {"joint", "decoders"}),
        ("refiner", {"joint", "decoders", "refiner"}),
        ("align", {"joint", "decoders", "aligned"}),
        ("refresh", {"refiner"}),
    ],
)
def test_who_learns(vae: MultimodalVAE, batch: Batch, name: str, taught: set[str]) -> None:
    loss, _ = LOSSES[name](vae, batch, seeded())
    parts = {"joint", "decoders", "refiner", "aligned"}
    assert {part for part in parts if any(bool(g.any()) for g in slopes(vae, loss, part))} == taught


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_and_depend_on_the_seed_alone(vae: MultimodalVAE, batch: Batch, name: str) -> None:
    (first, figures), (again, _), (other, _) = (LOSSES[name](vae, batch, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite()
    assert all(figure.isfinite() and figure.ndim == 0 for figure in figures.values())


def test_stages_are_wired_to_their_losses(vae: MultimodalVAE, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 2, "samples": 2}, align={"reconstruction": 0.5}, refresh={"epochs": 1})
    for stage in stages.stages(vae, settings):
        assert torch.equal(stage.loss(batch, seeded())[0], LOSSES[stage.name](vae, batch, seeded())[0])


def test_the_joint_loss_is_the_negative_elbo(vae: MultimodalVAE, batch: Batch) -> None:
    loss, figures = joint_loss(vae, batch, seeded())
    q = vae.joint(batch.arrays, batch.present)
    expected = vae.objective(batch.arrays, batch.present, q, standard_like(q), seeded().normal(1, vae.latent)).mean()
    torch.testing.assert_close(-loss, expected)
    torch.testing.assert_close(figures["elbo"], expected)


def test_alignment_and_reconstruction_come_on_top(vae: MultimodalVAE, batch: Batch) -> None:
    """By their weights; beta makes the alignment a matter of the same nats."""
    (plain, figures), (more, told) = (
        align_loss(vae, batch, seeded(), REFINER, config.Align(reconstruction=weight, several=1.0, pull=0))
        for weight in (0.0, 3.0)
    )
    assert "reconstruction" not in figures
    torch.testing.assert_close(plain - more, 3.0 * told["reconstruction"])
    before = -(figures["elbo"] + figures["refined"]) / 2
    torch.testing.assert_close(plain - before, vae.beta * 15 * figures["align"])


def test_subsets_of_several_weigh_what_they_are_told(vae: MultimodalVAE, batch: Batch) -> None:
    one, half = (
        align_loss(vae, batch, seeded(), REFINER, config.Align(reconstruction=0, pull=0, several=w))[0] for w in (1.0, 0.5)
    )
    start = vae.joint(batch.arrays, batch.present)
    noise = antithetic(seeded().normal(1, vae.latent))
    teacher = stages.refine(vae, batch, start, noise, REFINER.steps).posterior
    several = stages.alignment(vae, batch, teacher, every_subset(4)[4:])[0]
    torch.testing.assert_close(one - half, 0.5 * vae.beta * several.sum(0).mean(), rtol=1e-4, atol=1e-4)


def test_weighing_keeps_full_precision_where_networks_do_not(vae: MultimodalVAE, batch: Batch) -> None:
    """A tenth is no number that bfloat16 has."""
    with torch.autocast("cpu", torch.bfloat16):
        one, tenth = (
            align_loss(vae, batch, seeded(), REFINER, config.Align(reconstruction=0, pull=0, several=w))[0] for w in (1.0, 0.1)
        )
        start = vae.joint(batch.arrays, batch.present)
        teacher = stages.refine(vae, batch, start, antithetic(seeded().normal(1, vae.latent)), REFINER.steps).posterior
        several = stages.alignment(vae, batch, teacher, every_subset(4)[4:])[0]
    torch.testing.assert_close(one - tenth, 0.9 * vae.beta * several.sum(0).mean(), rtol=1e-5, atol=1e-4)


def test_reconstruction_teaches_decoders_or_not(vae: MultimodalVAE, batch: Batch) -> None:
    """The encoder learns the same either way."""
    through, around = (
        align_loss(vae, batch, seeded(), REFINER, config.Align(reconstruction=0.5, pull=0, reconstruction_teaches=who))
        for who in ("all", "encoder")
    )
    torch.testing.assert_close(through[0], around[0])
    for found, expected in zip(slopes(vae, around[0], "aligned"), slopes(vae, through[0], "aligned"), strict=True):
        torch.testing.assert_close(found, expected)
    assert any(bool(g.any()) for g in slopes(vae, through[1]["reconstruction"], "decoders"))
    assert not any(bool(g.any()) for g in slopes(vae, around[1]["reconstruction"], "decoders"))


def test_the_teacher_is_not_pulled_to_its_students(vae: MultimodalVAE, batch: Batch) -> None:
    loss, figures = align_loss(vae, batch, seeded(), REFINER, config.Align(reconstruction=0, pull=0))
    without = -(figures["elbo"] + figures["refined"]) / 2
    for found, expected in zip(slopes(vae, loss, "joint"), slopes(vae, without, "joint"), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_pull_moves_both_sides(vae: MultimodalVAE, batch: Batch) -> None:
    losses = [align_loss(vae, batch, seeded(), REFINER, config.Align(reconstruction=0, pull=weight)) for weight in (0.0, 0.5)]
    (plain, without), (pulled, figures) = losses
    assert "pull" not in without
    torch.testing.assert_close(pulled - plain, 0.5 * vae.beta * len(vae.modalities) * figures["pull"])
    for part in ("joint", "aligned"):
        assert any(bool(g.any()) for g in slopes(vae, figures["pull"], part))


def test_without_steps_the_joint_posterior_teaches_and_decoders_learn_as_often(vae: MultimodalVAE, batch: Batch) -> None:
    none = config.Refiner(steps=0, samples=2)
    loss, figures = refiner_loss(vae, batch, seeded(), none)
    assert torch.equal(loss, -(figures["elbo"] + figures["refined"]) / 2)
    assert not any(bool(g.any()) for g in slopes(vae, loss, "refiner"))
    assert any(bool(g.any()) for g in slopes(vae, figures["refined"], "decoders"))
    _, figures = align_loss(vae, batch, seeded(), none, config.Align())
    q = vae.joint(batch.arrays, batch.present)
    divergences, _ = stages.alignment(vae, batch, q, stages.every_subset(len(vae.modalities)))
    torch.testing.assert_close(figures["align"], divergences.mean())


def test_decoders_serve_refined_posteriors_too(vae: MultimodalVAE, batch: Batch) -> None:
    _, figures = refiner_loss(vae, batch, seeded(), REFINER)
    assert any(bool(g.any()) for g in slopes(vae, figures["refined"], "decoders"))
    assert not any(bool(g.any()) for g in slopes(vae, figures["refined"], "joint"))


def test_the_refiner_learns_to_climb_from_where_the_service_starts(
    vae: MultimodalVAE, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the aligned posterior of what is seen, held to it unless all is."""
    batch.present[: ROWS // 2] = True
    honest, calls = stages.refine, []

    def watch(*given: Any) -> Any:
        calls.append(given)
        return honest(*given)

    monkeypatch.setattr(stages, "refine", watch)
    with torch.no_grad():
        for parameter in vae.refiner.parameters():
            parameter.zero_()  # rates that suit nothing
        vae.refiner.rates[-1].bias.fill_(-9.0)
        aligned = vae.aligned(batch.arrays, batch.present)

    def gain() -> float:
        found = [refresh_loss(vae, batch, seeded(seed), REFINER)[1] for seed in range(20)]
        return float(torch.stack([figures["refined"] - figures["objective"] for figures in found]).mean())

    before = gain()
    seen = torch.stack([part.present for _, part, *_ in calls])
    assert not (seen & ~batch.present).any(), "nothing that a row lacks"
    assert seen[:, : ROWS // 2].all(2).float().mean() == pytest.approx(16 / 30, abs=0.2), "as they are, as often as not"
    assert len({tuple(row) for row in seen[:, : ROWS // 2].flatten(0, 1).tolist()}) > 10, "of 15 subsets"
    for _, part, start, *_, anchor in calls:
        expected, prior = vae.aligned(part.arrays, part.present), standard_like(start)
        complete = part.present.all(1, keepdim=True)
        for at, held, own, plain in zip(start, anchor, expected, prior, strict=True):
            torch.testing.assert_close(at, own)
            torch.testing.assert_close(held, torch.where(complete, plain, own))
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    for seed in range(100, 160):
        optimizer.zero_grad()
        refresh_loss(vae, batch, seeded(seed), REFINER)[0].backward()
        optimizer.step()
    assert gain() > before + 1
    assert torch.equal(vae.aligned(batch.arrays, batch.present).mean, aligned.mean), "nothing else has moved"


def test_the_refresh_may_take_more_steps_than_the_teacher(vae: MultimodalVAE, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 1, "samples": 2}, refresh={"epochs": 1, "steps": 3})
    assert settings.horizon == 3
    *_, align, refresh = stages.stages(vae, settings)
    teacher, longer = config.Refiner(steps=1, samples=2), config.Refiner(steps=3, samples=2)
    assert torch.equal(refresh.loss(batch, seeded())[0], refresh_loss(vae, batch, seeded(), longer)[0])
    assert torch.equal(align.loss(batch, seeded())[0], align_loss(vae, batch, seeded(), teacher, settings.align)[0])
    assert make_config(refiner={"steps": 1}, refresh={"epochs": 0, "steps": 3}).horizon == 1
    assert make_config(refiner={"steps": 0}, refresh={"epochs": 1, "steps": 3}).horizon == 0


@pytest.fixture
def flowed(tiny_vae: MultimodalVAE, make_vae: Any) -> MultimodalVAE:
    return make_vae(tiny_vae.modalities, couplings=2).requires_grad_(True)


def test_the_flow_is_the_last_stage_and_learns_alone(flowed: MultimodalVAE, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 2, "samples": 2}, flow={"epochs": 1})
    *_, stage = stages.stages(flowed, settings)
    assert (stage.name, stage.settings) == ("flow", settings.flow)
    loss, figures = stage.loss(batch, seeded())
    assert torch.equal(loss, flow_loss(flowed, batch, seeded(), settings)[0])
    assert all(bool(slope.any()) for slope in slopes(flowed, loss, "flow"))
    assert not any(bool(g.any()) for part in ("joint", "decoders", "refiner", "aligned") for g in slopes(flowed, loss, part))
    torch.testing.assert_close(-loss, figures["log_density"])
    with torch.autocast("cpu", torch.bfloat16):
        assert flow_loss(flowed, batch, seeded(), settings)[0].dtype == torch.float32


def test_the_flow_learns_with_the_whole_spread(flowed: MultimodalVAE, batch: Batch, make_config: Any) -> None:
    settings = make_config(refiner={"steps": 2, "samples": 2}, flow={"epochs": 1})
    whole, _ = flow_loss(flowed, batch, seeded(), settings)
    flowed.spread = 0.5
    assert torch.equal(flow_loss(flowed, batch, seeded(), settings)[0], whole)


def test_the_flow_learns_what_the_refined_teacher_allows(
    flowed: MultimodalVAE, batch: Batch, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is the mean over subsets, and one of them refined, of -log q of samples of the teacher."""
    settings = make_config(refiner={"steps": 2, "samples": 2}, refresh={"epochs": 1, "steps": 3}, flow={"epochs": 1})
    honest, found = stages._refined, []

    def watch(*given: Any, **options: Any) -> Any:
        found.append((given, honest(*given, **options)))
        return found[-1][1]

    monkeypatch.setattr(stages, "_refined", watch)
    loss, _ = flow_loss(flowed, batch, seeded(), settings)
    (teaching, taught), (climbing, climbed) = found
    assert teaching[3].steps == 2
    assert climbing[3].steps in (1, 2, 3)
    seen = climbing[1].present
    torch.testing.assert_close(climbing[4].mean, flowed.aligned(batch.arrays, seen).mean)
    noise = seeded()
    noise.normal(1, flowed.latent)
    z = sample(taught.posterior, noise.normal(2, flowed.latent))
    terms = []
    for mask in [*(batch.present & subset for subset in every_subset(4)), None]:
        student = climbed.posterior if mask is None else flowed.aligned(batch.arrays, mask)
        some = (seen if mask is None else mask).any(1)
        terms.append(torch.where(some, FlowPosterior(student, flowed.flow).log_density(z).mean(1), 0.0))
    torch.testing.assert_close(loss, -torch.stack(terms).mean())
    flow_loss(flowed, batch, seeded(), make_config(refiner={"steps": 0}, flow={"epochs": 1}))
    assert len(found) == 3, "no student is refined by a refiner that never learned"


def test_many_modalities_align_some_subsets_at_a_time(
    vae: MultimodalVAE, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, taken = stages.alignment, []

    def watch(model: MultimodalVAE, rows: Batch, teacher: Any, subsets: Tensor, *options: Any) -> Any:
        taken.append(subsets)
        return honest(model, rows, teacher, subsets, *options)

    monkeypatch.setattr(stages, "alignment", watch)
    monkeypatch.setattr(stages, "MAX_SUBSETS", 7)
    for seed in range(20):
        loss, _ = align_loss(vae, batch, seeded(seed), REFINER, config.Align())
        assert loss.isfinite()
    singles = every_subset(4)[:4]
    drawn = set()
    for subsets in taken:
        assert torch.equal(subsets[:4], singles)
        others = {tuple(row) for row in subsets[4:].tolist()}
        assert len(others) == 3
        drawn |= others
    assert drawn == {tuple(row) for row in every_subset(4)[4:].tolist()}  # each comes up in time


def test_the_divergence_chooses_what_students_are_drawn_to(vae: MultimodalVAE, batch: Batch) -> None:
    settings = {d: config.Align(divergence=d, several=1.0, pull=0) for d in get_args(config.Divergence)}
    found = {d: align_loss(vae, batch, seeded(), REFINER, align) for d, align in settings.items()}
    forward, reverse, both, none = found.values()
    count = len(every_subset(4))
    for loss, figures in (forward, reverse, both):
        without = (figures["elbo"] + figures["refined"]) / 2 + config.Align().reconstruction * figures["reconstruction"]
        torch.testing.assert_close(loss, vae.beta * count * figures["align"] - without)
    assert not torch.isclose(forward[1]["align"], reverse[1]["align"])
    # Without a teacher the drawn student pays its KL to the prior, and its reconstruction is the same.
    loss, figures = none
    assert torch.equal(figures["reconstruction"], forward[1]["reconstruction"])
    noise = seeded()
    drawn = stages._joint_and_refined(vae, batch, noise, REFINER, learn=False)  # draws what comes before the choice
    choice = noise.choices(count)
    _, students = stages.alignment(vae, batch, drawn[2], every_subset(4))
    rent = torch.stack([kl(student, standard_like(student)) for student in students])[choice, torch.arange(ROWS)]
    rent = torch.where((batch.present & every_subset(4)[choice]).any(1), rent, 0.0).mean()
    elbo = (figures["elbo"] + figures["refined"]) / 2
    torch.testing.assert_close(loss, -elbo - config.Align().reconstruction * (figures["reconstruction"] - vae.beta * rent))
