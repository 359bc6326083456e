"""Search for learning rate, beta and the weights of the alignment, by Optuna, which is optional."""

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from concord.model.installation import not_installed
from concord.model.modality import resolve_weights
from concord.training.checkpoint import Run, write_atomically
from concord.training.config import DEFAULT_MODEL, STAGES, Config
from concord.training.data.dataset import Dataset
from concord.training.device import EvaluationDevice, resolve_device
from concord.training.errors import ConfigError, DivergenceError, RunError
from concord.training.fit import fit
from concord.training.objectives import every_subset
from concord.training.progress import Progress
from concord.training.run_data import RunData, keep_run_data
from concord.training.trainable import TrainableModel

SPACE: Mapping[str, tuple[float, float]] = {
    "learning_rate": (1e-4, 1e-2),
    "objective.beta": (0.1, 10.0),
    "align.reconstruction": (0.02, 2.0),
    "align.multimodal_weight": (0.01, 1.0),
    "align.jmvae_weight": (0.01, 1.0),
}
"""Setting -> smallest and largest value, on a logarithmic scale. ``learning_rate`` is that of ``joint``; those of the other
stages keep their ratio to it."""
HELD_OUT = 0.1
"""Share of the training rows that measure a run, if ``validation.rows`` does not set their number."""
STUDY, PICTURE, BEST = "study.db", "tune.png", "best.toml"
_BATCH_ROWS = 500
_SAMPLES = 4


@dataclass(frozen=True)
class Candidate:
    """One trained configuration."""

    number: int
    settings: Mapping[str, float]
    """Keys of ``SPACE``."""
    score: float | None
    """See ``cross_modal_log_likelihood``. None: training diverged."""


def tune(config: Config, data: Dataset, folder: Path, runs: int, progress: Progress) -> list[Candidate]:
    """Train configurations until ``runs`` of them have ended, and return these, the best first.

    The first one has the settings of ``config``, or where they lie outside of ``SPACE``, the nearest in it. Optuna's TPE
    (Bergstra et al. 2011) proposes the others. A setting of 0 stays 0. An interrupted search continues, an interrupted run from
    its checkpoint. The result of a run depends on its settings only.

    Args:
        data: training rows. Some of them are held out and measure the runs, see ``HELD_OUT``. Test rows are not needed.
        folder: of the study and of the runs.

    Raises:
        ConfigError: Optuna is not installed, or the model is a baseline.
        RunError: the folder belongs to the search of another configuration, or of other data.
    """
    if config.model != DEFAULT_MODEL:
        raise ConfigError(f'tune searches the settings of model = "{DEFAULT_MODEL}", received "{config.model}"')
    try:
        optuna = importlib.import_module("optuna")
        storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY).resolve()}")
    except ImportError as error:
        raise ConfigError(not_installed(str(error.name), "tune", "tune")) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = with_validation(config, len(data))
    study = optuna.create_study(storage=storage, study_name="concord", direction="maximize", load_if_exists=True)
    if study.user_attrs.setdefault("config", config.sha256) != config.sha256:
        raise RunError(f"{folder}: holds a search for another configuration. Name another folder with --out")
    study.set_user_attr("config", config.sha256)
    keep_run_data(Run(folder, config), RunData(data.modalities, tuple(data.sources)))  # scores of other rows do not compare
    state = optuna.trial.TrialState
    present = {name: value for name, value in _settings(config).items() if value}
    if not study.trials:
        study.enqueue_trial({name: min(max(value, SPACE[name][0]), SPACE[name][1]) for name, value in present.items()})
    for interrupted in study.get_trials(states=[state.RUNNING]):
        study.tell(interrupted.number, state=state.FAIL)
        study.enqueue_trial(interrupted.params)
    for count in range(len(_ended(study)), runs):
        # A new sampler for each run: its choice depends on the runs before it, and not on interruptions.
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + count)
        trial = study.ask()
        settings = {name: trial.suggest_float(name, *SPACE[name], log=True) for name in present}
        score = _train(with_settings(config, settings), data, folder, progress)
        if score is None:
            trial.set_user_attr("diverged", True)
        study.tell(trial, score, state=state.FAIL if score is None else state.COMPLETE)
        shown = "diverged" if score is None else f"{score:.2f}"
        progress.say(
            f"run {trial.number}, {count + 1} of {runs}: {shown}  " + "  ".join(f"{n} {v:.3g}" for n, v in settings.items())
        )
    found = [Candidate(trial.number, trial.params, trial.value) for trial in _ended(study)]
    return sorted(found, key=lambda run: -math.inf if run.score is None else run.score, reverse=True)


def _ended(study: Any) -> list[Any]:
    """Return the runs that were trained to their end. Those that were interrupted have failed too."""
    return [trial for trial in study.trials if trial.value is not None or "diverged" in trial.user_attrs]


def with_validation(config: Config, rows: int) -> Config:
    """Return the configuration with held-out rows, so that each stage ends with its best weights."""
    if config.validation.rows:
        return config
    return config.model_copy(
        update={"validation": config.validation.model_copy(update={"rows": max(2, round(HELD_OUT * rows))})}
    )


def with_settings(config: Config, settings: Mapping[str, float]) -> Config:
    """Return the configuration with the settings of a run."""
    tables: dict[str, Any] = {stage: getattr(config, stage) for stage in STAGES}
    tables |= {"objective": config.objective}
    for name, value in settings.items():
        table, _, key = name.rpartition(".")
        if table:
            tables[table] = tables[table].model_copy(update={key: value})
    for stage, rate in _learning_rates(config, settings).items():
        tables[stage] = tables[stage].model_copy(update={"learning_rate": rate})
    return config.model_copy(update=tables)


def _learning_rates(config: Config, settings: Mapping[str, float]) -> dict[str, float]:
    """Return the learning rate of each stage for the settings of a run."""
    factor = settings["learning_rate"] / config.joint.learning_rate
    return {stage: getattr(config, stage).learning_rate * factor for stage in STAGES}


def _settings(config: Config) -> dict[str, float]:
    """Return the present values of what is searched. The learning rate is that of ``joint``."""
    values = {"learning_rate": config.joint.learning_rate}
    for name in SPACE:
        table, _, key = name.rpartition(".")
        if table:
            values[name] = getattr(getattr(config, table), key)
    return values


def _train(config: Config, data: Dataset, folder: Path, progress: Progress) -> float | None:
    """Train one configuration, from its checkpoint if it has one, and return its score. None: training diverged."""
    run = Run(folder / config.sha256[:12], config)
    try:
        model = fit(config, data, run, progress)
    except DivergenceError as error:
        progress.say(str(error))
        return None
    return cross_modal_log_likelihood(model, data.hold_out(config.validation.rows)[1], config)


def cross_modal_log_likelihood(model: TrainableModel, rows: Dataset, config: Config) -> float:
    """Return how well each single modality predicts all modalities of its row, in weighted nats. Higher is better.

    The mean of E_{q(z | x_m)}[sum_n w_n log p(x_n | z)] over the modalities m of each row, then over the rows. Unlike the ELBO
    it does not depend on beta. The weights w_n are those of the configuration.
    """
    device = resolve_device(config.device)
    model = model.eval().requires_grad_(False).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    weights = torch.tensor(list(resolve_weights(model.modalities).values()))
    total, count = 0.0, 0
    with EvaluationDevice(device), torch.no_grad():
        for batch in rows.to(device).batches(0, _BATCH_ROWS, 0, shuffle=False):
            singles = [batch.present & mask.to(device) for mask in every_subset(len(model.modalities))[: len(model.modalities)]]
            of_row, sources = torch.zeros(len(batch)), torch.zeros(len(batch))
            for posterior, mask in zip(model.posteriors(batch.arrays, singles), singles, strict=True):
                z = posterior.sample(_SAMPLES, generator)
                terms = model.log_likelihoods(batch.arrays, z).mean(1) * weights
                predicted = torch.where(batch.present, terms, 0.0).sum(1)
                has = mask.any(1)
                of_row += torch.where(has, predicted, 0.0)
                sources += has
            total += float((of_row / sources).sum())
            count += len(batch)
    return total / count


def best_toml(configuration: Path, config: Config, best: Candidate, folder: Path) -> str:
    """Return a configuration that extends another one with the settings of the best run."""
    base = os.path.relpath(configuration.resolve(), folder.resolve())
    lines = [
        f"# Run {best.number} of concord tune.",
        f"extends = {json.dumps(base)}",
        f'name = "{config.name[:58]}-tuned"',
    ]
    for table in ("objective", *(stage for stage in STAGES if getattr(config, stage).epochs)):
        keys = [f"{name.rpartition('.')[2]} = {value:.4g}" for name, value in best.settings.items() if _table(name) == table]
        if table in STAGES:
            keys.append(f"learning_rate = {_learning_rates(config, best.settings)[table]:.4g}")
        lines += ["", f"[{table}]", *keys]
    return "\n".join(lines) + "\n"


def _table(name: str) -> str:
    return name.rpartition(".")[0]


def write_results(runs: Sequence[Candidate], configuration: Path, config: Config, folder: Path) -> None:
    """Write ``best.toml`` and ``tune.png``: the score of every run over each setting, the best one in red.

    Raises:
        ConfigError: Matplotlib is not installed, or every run diverged.
    """
    finished = [run for run in runs if run.score is not None]
    if not finished:
        raise ConfigError("training diverged with every setting: check the data with concord check")
    write_atomically(folder / BEST, best_toml(configuration, config, finished[0], folder))
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(not_installed(str(error.name), "The picture of tune", "tune")) from error
    names = list(finished[0].settings)
    figure = figures.Figure(figsize=(2.4 * len(names), 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        axes.scatter([run.settings[name] for run in finished], [run.score for run in finished], s=14)
        axes.scatter([finished[0].settings[name]], [finished[0].score], s=24, color="tab:red")
        axes.set(xscale="log", title=name)
        axes.grid(alpha=0.4)
    figure.supylabel("score, weighted nats")
    figure.savefig(folder / PICTURE, dpi=100, metadata={"Software": None})
