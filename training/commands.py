"""Implementation of the training commands of ``concord``: init, check, fit, evaluate, export, tune, compare, report."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, cast, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from concord.model.bundle import DEFAULT_BUNDLE, SOUND_BUNDLE, builtin, read
from concord.model.modality import MAX_MODALITIES, Modality
from concord.training import config_file, distributed
from concord.training.checkpoint import CONFIG_FILE, Run, remove_run
from concord.training.config import DEVICES, Config, Model
from concord.training.config_template import render
from concord.training.data.dataset import Dataset, load_shard
from concord.training.data.dataset import load as load_data
from concord.training.data.infer_schema import infer_schema, limit_modalities, propose_encoders
from concord.training.data.sources import open_table
from concord.training.data.tables import PARQUET_SUFFIXES
from concord.training.data.validate import subsets_table, validate
from concord.training.device import EvaluationDevice, resolve_device
from concord.training.encoders.find import installed as installed_encoders
from concord.training.errors import ConfigError, DataError, RunError
from concord.training.estimate import estimate
from concord.training.evaluation.evaluate import evaluate as figures_of
from concord.training.evaluation.generative import evaluate_generation
from concord.training.evaluation.metrics.frozen_classifier import frozen_classifiers
from concord.training.evaluation.requests import STEPS, recommendation, request_scores
from concord.training.export import FILE as EXPORT_FILE
from concord.training.export import ExportInputs
from concord.training.export import export as export_run
from concord.training.fit import fit as train
from concord.training.fit import load
from concord.training.forecast import Forecast, duration
from concord.training.gallery import describe as describe_galleries
from concord.training.gallery import read_galleries
from concord.training.loggers import logging_to
from concord.training.machine import full_disk_reported
from concord.training.models import MODELS
from concord.training.progress import Progress
from concord.training.reports.compare import EVALUATION, GRID, Plan, compare_by_row
from concord.training.reports.compare import compare as run_comparison
from concord.training.reports.config_reference import config_reference
from concord.training.reports.effects import write_effects, write_regimes
from concord.training.reports.held_out import write_choices
from concord.training.reports.sample_grid import grid_caption, render_grid, select_examples
from concord.training.reports.summary import row_name
from concord.training.reports.tables import (
    results_table,
    summary_table,
    write_comparisons,
    write_methods,
    write_requests,
    write_rows,
    write_section,
    write_sentences,
    write_teachers,
)
from concord.training.run_data import RunData, keep_run_data
from concord.training.run_lock import RunLock
from concord.training.trainable import TrainableModel
from concord.training.tune import BEST, PICTURE, write_results
from concord.training.tune import tune as run_search

P = ParamSpec("P")

SENTENCES = ("birds-captions", "flickr8k-captions", "fashion-titles")
"""Folders of results of models that generate sentences."""
METHODS = ("birds-features-contrast", "birds-encoded", "flickr8k", "fashion", "fashion-encoded")
"""Folders of results that compare models on retrieval and prediction, each with a section of its name.

The first word is the page.
"""
REQUESTS = (*METHODS, *SENTENCES, "ablations/birds-features-contrast")
"""Folders of results whose models were refined at request time. (Other runs of a method can lack these figures.)"""
REGIMES_FILE = "digits-version-4-2000.json"
"""Results with and without refinement of the teacher in several regimes."""
GENERATED_ROWS = 2000
"""Test rows of the figures of generation in ``evaluate``."""
REFINED_ROWS = 2000
"""Test rows of the figures of refinement in ``evaluate``. All rows of a large test split could take longer than training."""
CHECK_SECONDS, FIT_SECONDS = 5.0, 3.0
"""Time of the steps from which ``check`` and ``fit`` estimate the training time."""


class Overrides(NamedTuple):
    """Options that replace values of the configuration, as if they were written there."""

    seed: int | None = None
    epochs: int | None = None
    rows_per_epoch: int | None = None
    device: str | None = None

    def read(self, configuration: Path) -> Config:
        """Read a configuration and replace its values."""
        settings = config_file.read(configuration).override(**self._asdict())
        if self.device is not None and not re.fullmatch(DEVICES, self.device):
            raise ConfigError(f"--device: received {self.device!r}, expected auto, cpu, cuda, cuda:N or mps")
        return settings

    def options(self) -> str:
        """Return the options of the command line."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())


def _single_process(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command that cannot run under torchrun: all but ``fit``."""

    @wraps(command)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if distributed.world_size() > 1:
            raise ConfigError(
                "torchrun started several processes, but only fit supports that: run this command without torchrun"
            )
        command(*args, **kwargs)

    return checked


@_single_process
def init(file: Path, out: Path | None, encoders: Mapping[str, str]) -> None:
    """Infer the modalities of a Parquet file and write a configuration for it.

    Args:
        encoders: frozen encoders by kind. Kinds that are left out have those of installed packages.
    """
    if file.suffix.lower() not in PARQUET_SUFFIXES:
        allowed = " or ".join(PARQUET_SUFFIXES)
        raise DataError(f"{file}: a Parquet file is expected, which ends in {allowed}. pandas writes one with to_parquet")
    target = out or Path(f"{file.stem}.toml")
    if target.exists():
        raise ConfigError(f"{target}: already exists. Name another file with --out")
    rows = open_table(file.name, file.parent)
    schemas = limit_modalities(rows, infer_schema(rows, file.parent), MAX_MODALITIES)
    schemas = propose_encoders(schemas, {**dict(installed_encoders()), **encoders})
    text = render(file, len(rows), schemas)
    target.write_text(text, encoding="utf-8")
    table = Table(title=f"{file}: {len(rows):,} rows", title_justify="left")
    for head in ("columns", "role", "absent", "content"):
        table.add_column(head, justify="right" if head == "absent" else "left")
    for schema in schemas:
        columns = ", ".join(schema.columns[:3]) + (f" and {len(schema.columns) - 3} more" if schema.columns[3:] else "")
        table.add_row(escape(columns), schema.role, f"{schema.nulls:,}", escape(schema.note))
    Console(highlight=False).print(table)
    print(f"{target} is written. Review it, then run: concord check {target}")


@_single_process
def check(configuration: Path, folder: Path | None, overrides: Overrides) -> None:
    """Report the content of the rows of a configuration, and how long training would take.

    Raises:
        DataError: ``fit`` would stop at unreadable values.
    """
    settings = overrides.read(configuration)
    if (training := validate(settings, folder, Console(highlight=False))) is None:
        raise DataError(
            f"{configuration}: some values cannot be read, the first are shown above. Correct them, or set "
            'bad_values = "absent" under [data]'
        )
    print(f"training takes about {_time_of(estimate(settings, training, CHECK_SECONDS), settings)}")
    print(f"{configuration} is valid. Train it with: concord fit {configuration}{overrides.options()}")


def _time_of(forecast: Forecast, settings: Config) -> str:
    threads = settings.thread_count
    return f"{duration(forecast.seconds)} with {threads} thread{'s' if threads > 1 else ''}; evaluation follows"


def fit(
    configuration: Path, folder: Path | None, out: Path | None, *, fresh: bool, overrides: Overrides, log: str | None = None
) -> None:
    """Train all stages, then evaluate."""
    settings = overrides.read(configuration)
    path = out or Path("runs") / settings.name
    with RunLock(path, "a fit") as lock:
        with distributed.process_group(resolve_device(settings.device)) as group:
            group.validate(settings)
            progress = Progress(quiet=not group.is_rank_zero)
            if group.is_rank_zero and _is_run(path):
                lock.acquire()  # before the data is read, which can take minutes
            test = None
            if settings.data.shards and group.size > 1:
                progress.say("reading the training rows, each process those of its row groups")
                training = load_shard(settings, folder, group)
                data = RunData(training.modalities, tuple(training.sources))
            else:
                training, test, data = _load_splits(settings, folder, progress)
            with full_disk_reported(path):
                if group.is_rank_zero:
                    keep_run_data(_create_run(path, settings, lock, fresh=fresh), data)
                group.barrier()
                run = Run(path, settings)
                keep_run_data(run, data)  # each process read the data itself
                progress.show(subsets_table(training))
                model = load(settings, training.modalities, run)
                if model is None:
                    forecast = estimate(settings, training, FIT_SECONDS, group)
                    progress.say(f"training takes about {_time_of(forecast, settings)}")
                    with logging_to(log if group.is_rank_zero else None, run, settings):
                        model = train(settings, training, run, progress, group, forecast)
        if group.is_rank_zero and test is None:
            options = (f" --out {out}" if out else "") + overrides.options()
            print(f"\nno process has all training rows. Evaluate in one: concord evaluate {configuration}{options}")
        elif group.is_rank_zero and test is not None:
            with full_disk_reported(path):
                _evaluate(settings, model, training, test, run, progress)
            if model.exportable:
                options = (f" --out {out}" if out else "") + overrides.options()
                print(f"\nexport it with: concord export {configuration}{options}")


def _load_splits(settings: Config, folder: Path | None, progress: Progress) -> tuple[Dataset, Dataset, RunData]:
    """Return the training rows, the test rows, and what a run records of both."""
    progress.say("reading the training rows")
    training = load_data(settings, "train", folder)
    progress.say(f"reading the test rows, after {len(training):,} training rows")
    test = load_data(settings, "test", folder, training)
    return training, test, RunData.from_data(training, test)


def _is_run(path: Path) -> bool:
    return (path / CONFIG_FILE).exists()


def _create_run(path: Path, settings: Config, lock: RunLock, *, fresh: bool) -> Run:
    """Create the run's folder. Called after configuration and data are read, so that an error there leaves no folder behind."""
    if fresh and path.exists() and not _is_run(path):
        raise RunError(f"{path}: is not the folder of a run, so --fresh does not remove it")
    lock.acquire()
    if fresh:
        remove_run(path)
    return Run(path, settings)


@_single_process
def evaluate(
    configuration: Path, folder: Path | None, out: Path | None, overrides: Overrides, *, baselines: bool = False
) -> None:
    """Measure a finished run on the test split and print its figures."""
    settings, progress = overrides.read(configuration), Progress()
    run = _open_run(settings, out)
    with RunLock(run.path, "an evaluation") as lock:
        lock.acquire()
        training, test, data = _load_splits(settings, folder, progress)
        with full_disk_reported(run.path):
            keep_run_data(run, data)
            model = _load_finished(settings, training.modalities, run)
            _evaluate(settings, model, training, test, run, progress, baselines=baselines)


@_single_process
def export(configuration: Path, folder: Path | None, out: Path | None, overrides: Overrides, to: Path | None) -> None:
    """Write a finished and evaluated run as a bundle. Graphs are traced and compared with the model on the CPU."""
    settings = overrides._replace(device="cpu").read(configuration)
    run = _open_run(settings, out)
    if not MODELS[settings.model].exportable:
        allowed = " or ".join(f'"{name}"' for name, model in MODELS.items() if model.exportable)
        raise ConfigError(f'{configuration}: model is "{settings.model}"; only model = {allowed} can be exported')
    inputs = ExportInputs.read(run)
    if inputs is None and not (run.path / EVALUATION).exists():
        raise RunError(f"{run.path}: the run has not finished. Run fit again, it continues")
    if inputs is None:
        model, inputs = _inputs_from_data(settings, folder, run)
    else:
        model = _load_finished(settings, inputs.modalities, run)
    images = {grid: grid_caption(settings.modalities)} if (grid := run.path / GRID).exists() else {}
    path = to or run.path / "bundle"
    galleries = {}
    if settings.gallery:
        Progress().say("reading the training rows of the gallery")
        network = model.bundle_model()
        galleries = read_galleries(settings, network, inputs.modalities, inputs.encoders, inputs.sources, folder)
    with full_disk_reported(path, Path(tempfile.gettempdir())):
        bundle = export_run(settings, model.bundle_model(), inputs, run.read(EVALUATION), path, images, galleries)
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    print(f"{bundle.path}: {bundle.manifest.name} {bundle.manifest.version}, {size / 1e6:.1f} MB, sha256 {bundle.sha256[:16]}")
    for line in describe_galleries(galleries):
        print(f"it contains training data: {line}")
    print(f"serve it with: CONCORD_BUNDLE={bundle.path} concord serve")


@_single_process
def tune(configuration: Path, folder: Path | None, out: Path | None, runs: int, overrides: Overrides) -> None:
    """Search for better settings, print the runs and write the best ones as a configuration."""
    settings, progress = overrides.read(configuration), Progress()
    path = out or Path("runs") / f"tune-{settings.name}"
    training = load_data(settings, "train", folder)
    with RunLock(path, "a search") as lock, full_disk_reported(path):
        lock.acquire()
        found = run_search(settings, training, path, runs, progress)
        write_results(found, configuration, settings, path)
    table = Table(title="runs, the best first", title_justify="left")
    for head in ("run", "score", *found[0].settings):
        table.add_column(head, justify="right")
    for run in found:
        score = "diverged" if run.score is None else f"{run.score:,.2f}"
        table.add_row(str(run.number), score, *(f"{value:.3g}" for value in run.settings.values()))
    Console(highlight=False).print(table)
    print(f"{path / PICTURE}\ntrain with the best settings: concord fit {path / BEST}")


@_single_process
def report(root: Path, bundle: Path | None, results: Path) -> None:
    """Rewrite the generated tables of the documents."""
    manifest = read(bundle or builtin(DEFAULT_BUNDLE)).manifest
    write_section(root / "training" / "README.md", "configuration", config_reference())
    if (comparison := results / f"{manifest.name}.json").exists():
        write_section(root / "README.md", "results", summary_table(json.loads(comparison.read_text(encoding="utf-8"))))
    digits, birds, refinement = (results / f"{page}.md" for page in ("digits", "birds", "refinement"))
    write_section(digits, "bundle", results_table(manifest))
    write_section(digits, "bundle-sound", results_table(read(builtin(SOUND_BUNDLE)).manifest))
    write_rows(birds, results / "birds")
    write_teachers(birds, results / "birds-features")
    for name in METHODS:
        write_methods(results / f"{name.partition('-')[0]}.md", results / name)
    write_sentences(results / "generation.md", [results / name for name in SENTENCES])
    write_choices(digits, results / "held-out")
    write_effects(refinement, results / "ablations")
    write_regimes(refinement, results / "ablations" / REGIMES_FILE)
    write_requests(refinement, [results / name for name in REQUESTS])
    charts = write_comparisons(digits, results) + write_comparisons(digits, results / "ablations", "ablations")
    for chart in charts:
        print(chart)


@_single_process
def compare(
    configuration: Path,
    variants: Sequence[Path],
    models: str,
    seeds: str,
    rows_per_epoch: int | None,
    test_rows: int,
    held_out: int | None,
    folder: Path | None,
    out: Path | None,
    results: Path,
    device: str | None = None,
) -> None:
    """Train and measure several models and variants over several seeds."""
    overrides = Overrides(device=device)
    settings, variant_settings = overrides.read(configuration), [overrides.read(variant) for variant in variants]
    plan = Plan(settings, _models(models), _seeds(seeds), rows_per_epoch, test_rows, variant_settings, held_out)
    files = " ".join(map(str, [configuration, *variants]))
    command = f"concord compare {files} --models {models} --seeds {seeds} --test-rows {test_rows}"
    command += f" --rows-per-epoch {rows_per_epoch}" if rows_per_epoch else ""
    command += f" --held-out {held_out}" if held_out else ""
    out = out or Path("runs") / f"compare-{plan.name}"
    if held_out:  # other training rows: no run and no classifier of all training rows is continued
        out = out / f"held-out-{held_out}"
    if settings.data.pairing == "row":
        for (name, seed), error in compare_by_row(plan, folder, out, results, Progress()).items():
            print(f"{name}, seed {seed}: {f'failed: {error}' if error else 'done'}")
        print(results / plan.name)
        return
    content = run_comparison(plan, folder, out, results, command, Progress())
    for row in content["rows"]:
        print(f"{row_name(row)}, seed {row['seed']}: {row['status']}{': ' + row['error'] if row.get('error') else ''}")
    print(f"{results / plan.name}.json")


def _models(text: str) -> tuple[Model, ...]:
    allowed = get_args(Model)
    if unknown := [name for name in text.split(",") if name not in allowed]:
        raise ConfigError(
            f"--models: unknown {', '.join(map(repr, unknown))}. Allowed: {', '.join(allowed)}, separated by commas"
        )
    return cast(tuple[Model, ...], tuple(text.split(",")))


def _seeds(text: str) -> tuple[int, ...]:
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds: received {text!r}, expected integers of at least 0, separated by commas, such as 0,1,2")
    return tuple(int(part) for part in text.split(","))


def _open_run(settings: Config, out: Path | None) -> Run:
    """Return the existing run of a configuration."""
    path = out or Path("runs") / settings.name
    if not path.exists():
        raise RunError(f"{path}: no such run. Run fit first, or name its folder with --out")
    return Run(path, settings)


def _load_finished(settings: Config, modalities: Sequence[Modality], run: Run) -> TrainableModel:
    """Return the trained model of a run that has finished."""
    model = load(settings, modalities, run)
    if model is None:
        raise RunError(f"{run.path}: the run has not finished. Run fit again, it continues")
    return model


def _inputs_from_data(settings: Config, folder: Path | None, run: Run) -> tuple[TrainableModel, ExportInputs]:
    """Return the model and the export inputs of a run without export.npz, from the data.

    Raises:
        RunError: the data cannot be read.
    """
    file = run.path / EXPORT_FILE
    Progress().say(f"{file}: does not exist. fit and evaluate write it since version 0.2. Reading the data instead")
    try:
        training, test, data = _load_splits(settings, folder, Progress())
    except DataError as error:
        raise RunError(
            f"{file}: does not exist, and the data cannot be read instead ({error}). Name the folder of the data with --data, "
            "or run evaluate where the data is: it writes the file"
        ) from error
    keep_run_data(run, data)
    model = _load_finished(settings, training.modalities, run)
    return model, ExportInputs.from_data(model.bundle_model(), training, test)


def _evaluate(
    settings: Config,
    model: TrainableModel,
    training: Dataset,
    test: Dataset,
    run: Run,
    progress: Progress,
    *,
    baselines: bool = False,
) -> None:
    if model.exportable:  # before evaluation.json, which marks the evaluation as complete
        ExportInputs.from_data(model.bundle_model(), training, test).write(run)
    device = resolve_device(settings.device)
    model, training, test = model.to(device), training.to(device), test.to(device)
    with EvaluationDevice(device):
        can_classify = settings.data.pairing == "class" and training.class_names
        classifiers = frozen_classifiers(settings, training, run.path, progress) if can_classify else {}
        figures = figures_of(
            settings,
            model,
            training,
            test,
            progress,
            refined_rows=REFINED_ROWS,
            baselines=baselines,
            classifiers=classifiers,
        )
        if classifiers:
            figures |= evaluate_generation(settings, model, test, classifiers, GENERATED_ROWS, progress)
        figures["training"] = run.cost()
        run.write(EVALUATION, figures)
        render_grid(model, *select_examples(test)).save(run.path / GRID, optimize=True)
    _print_figures(figures)


def _print_figures(figures: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if "probe" in figures:
        table = Table(title="linear probe on posterior means", title_justify="left")
        table.add_column("embedding of")
        table.add_column("accuracy", justify="right")
        for name, accuracy in figures["probe"].items():
            table.add_row(name, f"{accuracy:.4f}")
        console.print(table)
    for line in _cross_modal_lines(figures):
        console.print(line, markup=False)
    if coherence := figures.get("coherence"):
        for source, targets in coherence["cross"].items():
            shares = "  ".join(f"{target} {share:.3f}" for target, share in targets.items())
            console.print(f"coherence of samples from {source}: {shares}", markup=False)
    if refinement := figures.get("refinement"):
        console.print(
            f"refinement, {refinement['steps']} steps: ELBO {refinement['elbo_before']:.2f} -> {refinement['elbo_after']:.2f} "
            f"weighted nats; it rises for {refinement['raised']:.2%} of rows, with independent evaluation noise for "
            f"{refinement['raised_fresh_noise']:.2%}"
        )
    for title, by_step in request_scores(figures).items():
        values = "  ".join(f"{value:.3f}" for value in by_step)
        console.print(f"requests after {', '.join(map(str, STEPS))} steps, {title}: {values}", markup=False)
    if sentence := recommendation(figures):
        console.print(f"refinement of requests. {sentence}")
    for name, shares in figures.get("coverage", {}).items():
        covered = ", ".join(f"{share:.3f} in its {float(level):.0%} interval" for level, share in shares.items())
        console.print(f"refined posterior by that of {name}: {covered}", markup=False)
    for target, sources in figures.get("texts", {}).items():
        for source, values in sources.items():
            console.print(f"{target} from {source}: {_text_scores(values)}", markup=False)
    cost = figures["training"]
    memory = f"{cost['peak_memory_bytes'] / 2**20:.0f} MiB"
    console.print(f"training: {cost['seconds']:.0f} s, peak memory of the process: {memory}")


def _cross_modal_lines(figures: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each pair of modalities, with the figure of the linear baseline."""
    linear = figures.get("linear", {})

    def baseline(kind: str, one: str, other: str, metric: str, name: str) -> str:
        values = linear.get(kind, {}).get(one, {}).get(other)
        return f"; {name} {values[metric]:.3f}" if values else ""

    for query, galleries in figures.get("retrieval", {}).items():
        for gallery, values in galleries.items():
            recalls = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if name.startswith("recall"))
            by_cca = baseline("retrieval", query, gallery, "recall@10", "CCA: recall@10")
            rank = f"median rank {values['median_rank']:.0f}"
            yield f"retrieval of {gallery} by {query}, {values['rows']:,} rows: {recalls}  {rank}{by_cca}"
    for kind, metric in (("attributes", "map"), ("classes", "accuracy"), ("numbers", "r2")):
        for target, sources in figures.get(kind, {}).items():
            for source, values in sources.items():
                name = "logistic regression" if kind == "classes" else "ridge regression"
                other = baseline(kind, target, source, metric, name)
                yield f"{target} from {source}, {values['rows']:,} rows: {_scores(kind, values)}{other}"


def _text_scores(values: dict[str, Any]) -> str:
    parts = []
    if "rows" in values:
        known = (
            "none has two tokens" if values["known_pairs"] is None else f"{values['known_pairs']:.3f} of pairs of tokens known"
        )
        parts.append(f"{values['rows']:,} texts, {known}, {values['distinct']:.3f} distinct")
    if "nats" in values:
        parts.append(f"{values['nats']:.2f} nats a token, {values['nats_shuffled']:.2f} with the z of another row")
    if "cider" in values:
        nearest = f", of the nearest training text {values['cider_nearest']:.2f}" if "cider_nearest" in values else ""
        parts.append(f"CIDEr-D {values['cider']:.2f}, with the mean of z {values['of_mean']['cider']:.2f}{nearest}")
    for name, found in values.get("classes", {}).items():
        parts.append(f"{name} right in {found['accuracy']:.3f}, as generated in {found['agreement']:.3f}")
    return "; ".join(parts)


def _scores(kind: str, values: dict[str, Any]) -> str:
    if kind == "attributes":
        scores = f"mean average precision {values['map']:.3f}, by chance {values['chance']:.3f}; "
        return scores + f"F1 {values['f1']:.3f}, by chance {values['f1_chance']:.3f}"
    if kind == "classes":
        scores = f"accuracy {values['accuracy']:.3f}, of the most frequent class {values['majority']:.3f}"
        return scores + f"; calibration error {values['calibration_error']:.3f}"
    return f"R2 {values['r2']:.3f}"
