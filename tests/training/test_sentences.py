"""Every training stage with autoregressive texts, some of them absent."""

from typing import Any

import pytest
import torch

from concord.training import config
from concord.training.concord import Concord
from concord.training.data.dataset import Batch
from concord.training.distributed import Noise
from concord.training.trainable import Stage

ROWS = 8
STAGES = ("joint", "refiner", "contrast", "align", "refresh", "flow")


@pytest.fixture
def vae(sentence_modalities: Any, make_vae: Any) -> Concord:
    return make_vae(sentence_modalities, couplings=2).requires_grad_(True)


@pytest.fixture
def stages(vae: Concord, make_config: Any) -> dict[str, Stage]:
    settings = make_config(
        contrast={"epochs": 1}, refresh={"epochs": 1}, flow={"epochs": 1, "couplings": 2}, align={"contrast_weight": 1.0}
    )
    assert isinstance(settings, config.Config)
    return {stage.name: stage for stage in vae.stages(settings)}


@pytest.fixture
def batch(sentence_rows: Any) -> Batch:
    present = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    present[:, 0] |= ~present.any(1)
    assert not present[:, 1].all()
    return Batch({name: array[:ROWS] for name, array in sentence_rows.items()}, present, None)


@pytest.mark.parametrize("name", STAGES)
def test_loss_ignores_absent_texts_and_trains_their_decoder(
    vae: Concord, stages: dict[str, Stage], batch: Batch, name: str
) -> None:
    loss, figures = stages[name](batch, Noise(0, ROWS))
    assert loss.isfinite()
    assert all(figure.isfinite() for figure in figures.values())
    arrays = dict(batch.arrays)
    for index, text in ((1, "caption"), (2, "code")):
        arrays[text] = torch.where(batch.present[:, index : index + 1], arrays[text], 10**6)
    again, _ = stages[name](Batch(arrays, batch.present, None), Noise(0, ROWS))
    torch.testing.assert_close(again, loss)
    gradients = torch.autograd.grad(loss, list(vae.decoders["caption"].parameters()), allow_unused=True)
    is_trained = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    assert is_trained == (name in ("joint", "refiner", "align"))
