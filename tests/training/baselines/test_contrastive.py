"""The contrastive baseline on cases whose result is known: modalities that determine each other, and independent ones."""

import pytest
import torch

from concord.model.modality import VectorModality
from concord.model.vae.networks import NetworkSizes
from concord.training import config
from concord.training.baselines.contrastive import Contrastive
from concord.training.data.dataset import Batch
from concord.training.distributed import Noise
from concord.training.evaluation.metrics.retrieval import recall_at

ROWS, SIZE = 200, 6
MODALITIES = tuple(VectorModality(name=name, size=SIZE, mean=(0.0,) * SIZE, std=(1.0,) * SIZE) for name in ("one", "two"))


def make() -> Contrastive:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Contrastive(MODALITIES, NetworkSizes(latent=8, features=32, hidden=16, width=4), beta=1.0)
    model.dropout = 0.1
    return model


def rows(seed: int, *, aligned: bool) -> Batch:
    """The second vector is a rotation of the first one, or independent of it."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, ROWS, SIZE, generator=generator)
    rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(9)))[0]
    two = one @ rotation if aligned else other
    return Batch({"one": one, "two": two}, torch.ones(ROWS, 2, dtype=torch.bool), None)


def trained(*, aligned: bool, steps: int = 150) -> Contrastive:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    (stage, _) = model.stages(SETTINGS)
    for step in range(steps):
        optimizer.zero_grad()
        stage(rows(step, aligned=aligned), Noise(step, ROWS))[0].backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def recall(model: Contrastive, batch: Batch) -> float:
    masks = torch.eye(2, dtype=torch.bool)
    one, two = model.posteriors(batch.arrays, [batch.present & mask for mask in masks])
    return recall_at(one.mean.detach().numpy(), two.mean.detach().numpy(), [10])[10]


SOURCE = config.Source(train="a", test="b", columns={"one": "one", "two": "two"}, licence="none")
SETTINGS = config.Config(name="c", modalities=MODALITIES, data=config.Data(pairing="row", sources=(SOURCE,)))


def test_contrastive_baseline_finds_rows_that_are_perfectly_aligned() -> None:
    assert recall(make(), rows(-1, aligned=True)) < 0.2
    assert recall(trained(aligned=True), rows(-1, aligned=True)) > 0.95


def test_contrastive_baseline_of_independent_modalities_is_at_the_chance_level() -> None:
    assert recall(trained(aligned=False), rows(-1, aligned=False)) == pytest.approx(10 / ROWS, abs=0.05)


def test_decoders_are_trained_on_fixed_embeddings_of_one_modality() -> None:
    model, batch = make(), rows(0, aligned=True)
    (_, stage) = model.stages(SETTINGS)
    loss, _ = stage(batch, Noise(0, ROWS))
    loss.backward()
    trained_parts = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained_parts == {"decoders"}


def test_contrast_stage_of_the_configuration_sets_its_epochs() -> None:
    own = SETTINGS.model_copy(update={"contrast": config.Contrast(epochs=7, batch_size=30)})
    assert [(stage.name, stage.settings.epochs) for stage in make().stages(own)] == [("contrast", 7), ("decoders", 9)]
