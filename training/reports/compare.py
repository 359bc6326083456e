"""The comparison of models, and of variants of a configuration, over seeds. It can be interrupted and resumed.

Every run has its own process and gives one row of results. A failed row holds the error, a row that was not run has the status
missing; the other rows are run in both cases. Rows are kept in the folders of the runs. The results file is rewritten after
every row.
"""

import itertools
import json
import logging
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from concord.model.modality import AudioModality, ImageModality
from concord.training.checkpoint import Run, write_atomically
from concord.training.config import DEFAULT_MODEL, Config, Model
from concord.training.data import dataset
from concord.training.data.dataset import Dataset
from concord.training.device import EvaluationDevice, resolve_device
from concord.training.errors import ConfigError
from concord.training.evaluation.evaluate import evaluate
from concord.training.evaluation.generative import evaluate_comparison
from concord.training.evaluation.metrics import frechet
from concord.training.evaluation.metrics.frozen_classifier import classifier_file, frozen_classifiers
from concord.training.export import code_revision
from concord.training.fit import fit, load
from concord.training.machine import full_disk_reported
from concord.training.progress import Progress
from concord.training.reports.sample_grid import render_grid, select_examples
from concord.training.reports.summary import rename_old_keys, row_name
from concord.training.run_data import RunData, keep_run_data
from concord.training.run_lock import RunLock

ROW, FAILURE, EVALUATION, GRID = "row.json", "failure.txt", "evaluation.json", "grid.png"
SUMMARISED = (
    "probe",
    "coherence",
    "frechet",
    "cosine",
    "gap",
    "gap_closed",
    "refined",
    "log_likelihood",
    "seconds",
    "peak_memory_bytes",
)
"""Metrics averaged over seeds."""
ADDED = ("texts",)
"""Metrics averaged over seeds that rows of earlier versions, and of models without texts, do not have."""
SHARED = {"data": "other data", "classifier_accuracy": "other frozen classifiers"}
"""What all rows must have in common, and the description of a row that has something else."""

Key = tuple[str, int]
"""Name of a model or variant, and seed."""


class Plan(NamedTuple):
    """The models, variants and seeds of a comparison."""

    config: Config
    """The configuration of the comparison. Each run replaces its model and seed."""
    models: Sequence[Model]
    seeds: Sequence[int]
    rows_per_epoch: int | None
    """A reduced training budget, the same for all. None: the configuration's."""
    test_rows: int
    variants: Sequence[Config] = ()
    """Configurations that differ in how the model is trained. Each is a row under its name, next to the models."""
    held_out: int | None = None
    """Number of training rows that replace the test rows, to choose settings. They are not trained on.

    The rows of results then lack the amortization gap and log p(X), which take most of the time of an evaluation.
    """

    def config_for(self, name: str, seed: int) -> Config:
        """Return the configuration of one run of a model or a variant."""
        variant = next((variant for variant in self.variants if variant.name == name), None)
        config = variant or self.config.model_copy(update={"model": name})
        return config.override(seed=seed, rows_per_epoch=self.rows_per_epoch)

    def row_header(self, name: str, seed: int) -> dict[str, Any]:
        """Return the fields that identify a row."""
        header: dict[str, Any] = {"model": self.config_for(name, seed).model, "seed": seed}
        return {"variant": name, **header} if name in self.names[len(self.models) :] else header

    @property
    def names(self) -> list[str]:
        """Names of the models, then of the variants."""
        return [*self.models, *(variant.name for variant in self.variants)]

    def validate(self) -> None:
        """Check that names are unique and that variants differ in training only.

        Raises:
            ConfigError: two rows have the same name, or a variant has other data, modalities or epochs.
        """
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"the names of models and variants must be unique, received {', '.join(self.names)}")
        for variant in self.variants:
            expected = _data_of(self.config)
            for field, value in _data_of(variant).items():
                if value != expected[field]:
                    raise ConfigError(
                        f"{variant.name}: its {field} differ from those of {self.config.name}. Compare it in a separate call"
                    )
            if variant.epochs != self.config.epochs:
                raise ConfigError(
                    f"{variant.name} trains {variant.epochs} epochs, {self.config.name} {self.config.epochs}. Make them equal"
                )

    @property
    def name(self) -> str:
        """Name of the results. A reduced budget and held-out rows have another name, so that they never overwrite results."""
        budget = f"-{self.rows_per_epoch}" if self.rows_per_epoch is not None else ""
        return self.config.name + budget + (f"-held-out-{self.held_out}" if self.held_out is not None else "")


def _data_of(config: Config) -> dict[str, Any]:
    """Return the settings that all variants share. Likelihood weights are settings of training."""
    return {"modalities": [m.model_copy(update={"weight": None}) for m in config.modalities], "data": config.data}


def compare(plan: Plan, folder: Path | None, out: Path, results: Path, command: str, progress: Progress) -> dict[str, Any]:
    """Run the missing rows and write ``results``/<name>.json.

    Earlier rows are kept if their configuration, the budget, the number of test rows, the data and the frozen classifiers are
    the same.

    Args:
        folder: of the data, see ``dataset.load``.
        out: contains one folder per run, and the frozen classifiers.
        command: the command line, for the results file.

    Returns:
        the content of the results file. ``rows`` has one entry per model or variant and seed, with ``status`` done, failed (and
        ``error``) or missing. ``models`` has mean and standard deviation over the finished seeds; the deviation of one seed is
        None.

    Raises:
        ConfigError: the frozen classifiers could not be fitted, or ``Plan.validate`` fails.
    """
    plan.validate()
    file = results / f"{plan.name}.json"
    header = {
        "name": plan.name,
        "command": command,
        "code_revision": code_revision(),
        "config_sha256": plan.config_for(DEFAULT_MODEL, plan.config.seed).sha256,
        "budget": {
            "rows_per_epoch": plan.rows_per_epoch or plan.config.data.rows_per_epoch,
            "epochs": plan.config.epochs,
            "reduced": plan.rows_per_epoch is not None,
        },
        "test_rows": plan.test_rows,
        "held_out": plan.held_out,
        "beta": plan.config.objective.beta,
        "frechet_features": frechet.FEATURES,
    }
    rows = _earlier_rows(plan, file, header)
    requested = [(name, seed) for seed, name in itertools.product(plan.seeds, plan.names)]
    for name, seed in requested:
        rows[name, seed] = {**plan.row_header(name, seed), "status": "missing"}
    classifiers = [out / classifier_file(m) for m in plan.config.modalities if isinstance(m, ImageModality | AudioModality)]
    if not all(file.exists() for file in classifiers) and (
        error := _run_in_subprocess(_fit_classifiers, out, plan.config, folder, plan.held_out)
    ):
        raise ConfigError(f"the frozen classifiers could not be fitted: {error}")
    for done, (name, seed) in enumerate(requested, start=1):
        progress.say(f"{name}, seed {seed}: {done} of {len(requested)}")
        rows[name, seed] = {**_row(plan, name, seed, folder, out), **plan.row_header(name, seed)}
        shared = {field: _shared(field, rows, requested) for field in SHARED}
        content = {**header, **shared, "rows": list(rows.values()), "models": summary(list(rows.values()))}
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1) + "\n")
    _copy_grids(plan, out, results)
    return content


def compare_by_row(plan: Plan, folder: Path | None, out: Path, results: Path, progress: Progress) -> dict[Key, str | None]:
    """Run the missing models, variants and seeds of data with ``pairing = "row"``, without frozen classifiers.

    Writes ``results``/<name>/<model or variant>-<seed>.json, the figures of ``evaluate``. The first run that is done has the
    linear baselines too, which need no seed: if it was evaluated without them, it is evaluated again, and not trained again.

    Args:
        folder: of the data, see ``dataset.load``.
        out: contains one folder per run.

    Returns:
        the error of each run, None for one that is done.

    Raises:
        ConfigError: ``Plan.validate`` fails.
    """
    plan.validate()
    target = results / plan.name
    target.mkdir(parents=True, exist_ok=True)
    requested = [(name, seed) for seed, name in itertools.product(plan.seeds, plan.names)]
    errors: dict[Key, str | None] = {}
    for done, (name, seed) in enumerate(requested, start=1):
        progress.say(f"{name}, seed {seed}: {done} of {len(requested)}")
        path, baselines = out / f"{name}-{seed}", all(errors.values())
        errors[name, seed] = _run_in_subprocess(
            _fit_and_evaluate, path, plan.config_for(name, seed), folder, plan.held_out, plan.test_rows, baselines
        )
        if not errors[name, seed]:
            shutil.copyfile(path / EVALUATION, target / f"{name}-{seed}.json")
    return errors


def _fit_and_evaluate(
    path: Path, config: Config, folder: Path | None, held_out: int | None, test_rows: int, baselines: bool
) -> None:
    """Train and evaluate one model, unless its folder has the evaluation already.

    Args:
        test_rows: of the figures of refinement.
        baselines: whether the evaluation needs the linear baselines.
    """
    with RunLock(path, "a comparison") as lock, full_disk_reported(path):
        lock.acquire()
        run, progress = Run(path, config), Progress()
        if (path / EVALUATION).exists() and (not baselines or "linear" in run.read(EVALUATION)):
            return
        train, test = dataset.load_both(config, folder, held_out)
        keep_run_data(run, RunData.from_data(train, test))
        model = load(config, train.modalities, run) or fit(config, train, run, progress)
        device = resolve_device(config.device)
        train, test = train.to(device), test.to(device)
        with EvaluationDevice(device):
            figures = evaluate(config, model, train, test, progress, refined_rows=test_rows, baselines=baselines)
        run.write(EVALUATION, {**figures, "training": run.cost()})


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {model or variant: {seeds, mean, std}} over the rows with status done."""
    summaries: dict[str, Any] = {}
    for name in dict.fromkeys(map(row_name, rows)):
        done = [row for row in rows if row_name(row) == name and row["status"] == "done"]
        metrics = [{key: row.get(key) for key in SUMMARISED} | {key: row[key] for key in ADDED if key in row} for row in done]
        if metrics:
            std = _aggregate(metrics, lambda values: statistics.stdev(values) if len(values) > 1 else None)
            summaries[name] = {"seeds": len(metrics), "mean": _aggregate(metrics, statistics.fmean), "std": std}
    return summaries


def _aggregate(values: Sequence[Any], statistic: Callable[[Sequence[float]], float | None]) -> Any:
    """Apply a statistic to the numbers at the same position of nested dicts and lists. None if a row lacks the number."""
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        return {key: _aggregate([value.get(key) for value in values], statistic) for key in first}
    if all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [_aggregate(part, statistic) for part in zip(*values, strict=True)]
    return statistic(values) if all(isinstance(value, int | float) for value in values) else None


def _earlier_rows(plan: Plan, file: Path, header: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """Return the rows of the results file that a new run would not change.

    Variants that are not in the plan are kept if the configuration of the comparison is the same.
    """
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    if any(content.get(field) != header[field] for field in ("budget", "test_rows")):
        return {}
    same_config: bool = content.get("config_sha256") == header["config_sha256"]
    rows = {(row_name(row), row["seed"]): rename_old_keys(row) for row in content["rows"]}

    def is_current(name: str, row: dict[str, Any]) -> bool:
        if "variant" in row and name not in plan.names:
            return same_config
        row_config: str | None = row.get("config_sha256")  # missing in rows that did not finish
        return same_config if row_config is None else row_config == plan.config_for(name, row["seed"]).sha256

    return {(name, seed): row for (name, seed), row in rows.items() if is_current(name, row)}


def _copy_grids(plan: Plan, out: Path, results: Path) -> None:
    """Copy the sample grid of every model's first seed to the results."""
    for model in plan.models:
        if (grid := out / f"{model}-{plan.seeds[0]}" / GRID).exists():
            shutil.copyfile(grid, results / f"{plan.name}-grid-{model}.png")


def _shared(field: str, rows: dict[Key, dict[str, Any]], requested: Sequence[Key]) -> Any:
    """Return the value of a field of ``SHARED`` that all rows have in common.

    Rows with another value cannot be compared: a requested row gets the status failed, an earlier row is removed.
    """
    shared = None
    for key in sorted(rows, key=lambda key: key not in requested):
        row = rows[key]
        shared = shared or row.get(field)
        if row.get(field, shared) == shared:
            continue
        if key in requested:
            row.update(status="failed", error=f"was run with {SHARED[field]}: remove its folder to run it again")
        else:
            del rows[key]
    return shared


def _row(plan: Plan, name: str, seed: int, folder: Path | None, out: Path) -> dict[str, Any]:
    """Return the row of a run from its folder. Run it if the row is missing or of another configuration."""
    config, path = plan.config_for(name, seed), out / f"{name}-{seed}"
    file = path / ROW
    expected = {"config_sha256": config.sha256, "test_rows": plan.test_rows}
    if file.exists():
        row = rename_old_keys(json.loads(file.read_text()))
        if all(row[key] == value for key, value in expected.items()):
            return row
    if error := _run_in_subprocess(_run, path, config, plan, folder, out):
        return {"status": "failed", "error": error}
    return dict(json.loads(file.read_text()))


def _run(path: Path, config: Config, plan: Plan, folder: Path | None, out: Path) -> None:
    """Train and evaluate one model, and write its row and its sample grid."""
    with RunLock(path, "a comparison") as lock:
        lock.acquire()
        train, test = dataset.load_both(config, folder, plan.held_out)
        with full_disk_reported(path):
            _train_and_evaluate(path, config, plan, train, test, folder, out)


def _train_and_evaluate(
    path: Path, config: Config, plan: Plan, train: Dataset, test: Dataset, folder: Path | None, out: Path
) -> None:
    run, progress = Run(path, config), Progress()
    keep_run_data(run, RunData.from_data(train, test))
    model = load(config, train.modalities, run) or fit(config, train, run, progress)
    # The frozen classifiers have the full budget, also if the run has a reduced one.
    full_train = train if config.data == plan.config.data else dataset.load_both(plan.config, folder, plan.held_out)[0]
    device = resolve_device(config.device)
    train, test, full_train = train.to(device), test.to(device), full_train.to(device)
    with EvaluationDevice(device):
        classifiers = frozen_classifiers(plan.config, full_train, out, progress)
        metrics = evaluate(config, model, train, test, progress, refined_rows=plan.test_rows, classifiers=classifiers)
        bounds = plan.held_out is None
        metrics |= evaluate_comparison(config, model, test, classifiers, plan.test_rows, progress, bounds=bounds)
        render_grid(model, *select_examples(test)).save(path / GRID, optimize=True)
    cost = run.cost()
    run.write(
        ROW,
        {
            "model": config.model,
            "seed": config.seed,
            "status": "done",
            "config_sha256": config.sha256,
            "code_revision": code_revision(),
            "data": [source.model_dump() for source in (*train.sources, *test.sources)],
            "parameters": sum(p.numel() for p in model.parameters()),
            **metrics,
            "test_rows": plan.test_rows,  # replaces the number of all test rows, which the probe uses
            "seconds": cost["seconds"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
        },
    )


def _fit_classifiers(out: Path, config: Config, folder: Path | None, held_out: int | None) -> None:
    device = resolve_device(config.device)
    with EvaluationDevice(device):
        train, _ = dataset.load_both(config, folder, held_out)
        frozen_classifiers(config, train.to(device), out, Progress())


def _run_in_subprocess(function: Callable[..., None], path: Path, *arguments: Any) -> str | None:
    """Call ``function(path, *arguments)`` in a new process. Return an error message, or None.

    The peak memory of a run is then that of its process, and a crash does not end the comparison.
    """
    path.mkdir(parents=True, exist_ok=True)
    failure = path / FAILURE
    failure.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(function, path, *arguments), daemon=True)
    process.start()
    process.join()
    if process.exitcode == 0:
        return None
    return failure.read_text() if failure.exists() else f"the process ended with exit code {process.exitcode}"


def _call(function: Callable[..., None], path: Path, *arguments: Any) -> None:
    """Call the function, and write an exception to ``path``/failure.txt."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        function(path, *arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        logging.exception("%s failed", path)
        write_atomically(path / FAILURE, f"{type(error).__name__}: {error}")
        sys.exit(1)
