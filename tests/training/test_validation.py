"""Held-out rows: every stage ends with the weights of its best epoch, and may end early."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from concord.model.bundle.manifest import DataSource
from concord.training import fit
from concord.training.checkpoint import Position, Run
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.data.sources import Table
from concord.training.distributed import Noise
from concord.training.errors import ConfigError
from concord.training.estimate import estimate
from concord.training.progress import Progress
from concord.training.stages import ContrastStage

EPOCHS = 40
STAGE = {"epochs": EPOCHS - 4, "batch_size": 20, "learning_rate": 0.01}  # a baseline has the epochs of refiner and align too
NETWORK = {"latent": 8, "features": 64, "width": 4, "hidden": 64}
ROWS = 20


@pytest.fixture(scope="module")
def rows(make_config: Any) -> dataset.Dataset:
    return dataset.load(make_config(), "train")


@pytest.fixture(scope="module", autouse=True)
def _frequent_checkpoints() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "CHECKPOINT_STEPS", 3)
        yield


def settings(make_config: Any, **validation: Any) -> Config:
    """Return the configuration of a single stage that overfits: 40 rows and a high learning rate."""
    config: Config = make_config(model="mvae", joint=STAGE, network=NETWORK, validation={"rows": ROWS, **validation})
    return config


def train(config: Config, rows: dataset.Dataset, run: Run) -> Any:
    return fit.fit(config, rows, run, Progress(quiet=True))


def scores(run: Run) -> list[float]:
    """Return the validation after each epoch."""
    return [line["validation"] for line in run.metrics() if "validation" in line]


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the weights of a finished run."""
    position, state = run.checkpoint() or pytest.fail("no checkpoint")
    assert position == Position(1, 0)
    assert "best" not in state, "they belong to a stage that has ended"
    model: dict[str, torch.Tensor] = state["model"]
    return model


@pytest.fixture(scope="module")
def finished(make_config: Any, rows: dataset.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with validation and without early stopping."""
    config = settings(make_config)
    run = Run(tmp_path_factory.mktemp("finished"), config)
    train(config, rows, run)
    return run


def test_stage_ends_with_the_weights_of_its_best_epoch(make_config: Any, rows: dataset.Dataset, finished: Run) -> None:
    config = settings(make_config)
    logged = scores(finished)
    assert len(logged) == EPOCHS
    assert max(logged) > logged[-1], "the last weights are not the best ones"
    model = fit.build(config, rows.modalities)
    model.load_state_dict(weights(finished))
    (stage,) = model.stages(config)
    (batch,) = rows.hold_out(ROWS)[1].batches(0, ROWS, 0, shuffle=False)
    loss, figures = stage(batch, Noise(fit._seed(config.seed, 0, 0, fit._VALIDATION_STREAM), len(batch)))
    assert stage.score(loss, figures).item() == pytest.approx(max(logged), abs=1e-3)


def test_held_out_rows_are_the_same_in_every_run_and_train_nothing(rows: dataset.Dataset) -> None:
    (kept, held_out), (again, _) = rows.hold_out(ROWS), rows.hold_out(ROWS)
    assert len(kept) + len(held_out) == len(rows)
    assert not set(kept._rows) & set(held_out._rows)
    assert (kept._rows == again._rows).all()
    assert kept.steps_per_epoch(20) == 2
    batches = list(held_out.batches(0, 8, 0, shuffle=False))
    assert sum(map(len, batches)) == ROWS


def test_stage_without_a_better_epoch_ends_early(
    make_config: Any, rows: dataset.Dataset, finished: Run, tmp_path: Path
) -> None:
    config = settings(make_config, patience=2)
    run = Run(tmp_path, config)
    train(config, rows, run)
    logged = scores(run)
    assert logged == scores(finished)[: len(logged)], "the same training until then"
    best = logged.index(max(logged))
    assert len(logged) == best + 3 < EPOCHS
    assert weights(run)


@pytest.mark.parametrize("interrupted_at", [6, 45])
def test_interrupted_run_keeps_its_best_weights(
    make_config: Any, rows: dataset.Dataset, finished: Run, tmp_path: Path, interrupted_at: int
) -> None:
    """At any step: the best weights so far are in the checkpoint."""

    class Interrupted(Run):
        def save(self, position: Position, state: Any) -> None:
            super().save(position, state)
            if position.step == interrupted_at:
                raise InterruptedError

    config = settings(make_config)
    with pytest.raises(InterruptedError):
        train(config, rows, Interrupted(tmp_path, config))
    run = Run(tmp_path, config)
    train(config, rows, run)
    assert scores(run) == scores(finished)
    assert all(line["seconds"] > 0 for line in run.metrics()), "the time of the validation is in no line"
    expected = weights(finished)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(run).items())


def test_validation_compares_every_stage_by_its_objective(make_config: Any, rows: dataset.Dataset, tmp_path: Path) -> None:
    """The value of the refiner's loss has no meaning, so the ELBO takes its place."""
    stage = {"epochs": 1, "batch_size": 20}
    names = ("joint", "refiner", "contrast", "align", "refresh", "flow")
    config = make_config(**dict.fromkeys(names, stage), validation={"rows": ROWS})
    run = Run(tmp_path, config)
    train(config, rows, run)
    found = {line["stage"]: line["validation"] for line in run.metrics()}
    assert set(found) == set(names)
    # An ELBO of these rows is far from 0, and the losses of these two stages are differences of ELBOs, near it.
    assert found["refiner"] == pytest.approx(found["joint"], rel=0.5)
    assert found["refresh"] == pytest.approx(found["joint"], rel=0.5)


def test_stage_that_can_use_no_held_out_row_is_an_error(make_config: Any, rows: dataset.Dataset, tmp_path: Path) -> None:
    """A score of no rows would make the weights of the first epoch the best ones."""
    config = make_config(contrast={"epochs": 1, "batch_size": 20}, validation={"rows": ROWS})
    stage = ContrastStage(config.contrast, fit.build(config, rows.modalities), by_class=False)
    _, held_out = rows.hold_out(ROWS)
    first = next(iter(held_out.columns))
    held_out.columns = {
        name: column if name == first else replace(column, present=np.zeros_like(column.present))
        for name, column in held_out.columns.items()
    }
    run, progress = Run(tmp_path, config), Progress(quiet=True)
    single, cpu = fit.SINGLE_PROCESS, torch.device("cpu")
    training = fit._Training(config, rows, held_out, run, progress, single, None, stage.model, cpu)
    with pytest.raises(ConfigError, match=r"stage contrast: none of the 20 held-out rows has two modalities"):
        training._validate(stage, 0)


def test_partners_of_held_out_rows_train_nothing() -> None:
    """With pairing by class, rows of the other tables are held out too: the same share of each class."""
    classes = np.repeat(np.arange(3), (10, 20, 1))
    source = DataSource(file="f", sha256="", rows=31, licence="")
    anchors, others = (Table({}, classes, ("a", "b", "c"), source, np.zeros(0, int)) for _ in range(2))
    kept, held_out = dataset._ClassPairing(anchors, others).split(0.2)
    generator = np.random.default_rng(0)
    for label, size in enumerate((10, 20)):
        drawn = [
            set(view.sample(np.full(500, np.flatnonzero(classes == label)[0]), generator).tolist()) for view in (kept, held_out)
        ]
        assert all(classes[row] == label for row in drawn[0] | drawn[1])
        assert not drawn[0] & drawn[1]
        assert [len(rows) for rows in drawn] == [size * 4 // 5, size // 5]
    only = np.flatnonzero(classes == 2)
    assert kept.sample(only, generator) == held_out.sample(only, generator) == only


def test_too_many_held_out_rows_are_rejected(make_config: Any, rows: dataset.Dataset, tmp_path: Path) -> None:
    config = make_config(validation={"rows": 31})
    with pytest.raises(ConfigError, match=r"31 rows are to be held out, but there are 60 training rows\..*validation\.rows"):
        train(config, rows, Run(tmp_path, config))
    with pytest.raises(ConfigError, match="31 rows are to be held out"):
        estimate(config, rows, 0.0)  # which ``check`` calls


def test_patience_without_held_out_rows_is_rejected(make_config: Any) -> None:
    with pytest.raises(ValidationError, match=r"patience needs held-out rows: set validation\.rows"):
        make_config(validation={"patience": 2})
