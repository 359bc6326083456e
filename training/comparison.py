"""The comparison of models, and of variants of a configuration, over seeds: every run in a process of its own, one row of
results for each, resumable.

A row that failed says why, one that was not run yet says so; neither stops the others. Rows are kept in the runs' folders, the
results file is rewritten after every row.
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

from model.modality import ImageModality
from training import data
from training.checkpoint import Run, write_atomically
from training.config import Config, ConfigError, Model
from training.evaluate import evaluate
from training.export import code_revision
from training.fit import fit, load
from training.grid import draw_grid, examples
from training.measure import measure
from training.metrics import frechet
from training.metrics.judge import judges
from training.progress import Progress
from training.scores import name_of

ROW, FAILURE, GRID = "row.json", "failure.txt", "grid.png"
FIGURES = (
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


class Plan(NamedTuple):
    """What is compared."""

    config: Config
    """With the model and the seed of the file."""
    models: Sequence[Model]
    seeds: Sequence[int]
    rows_per_epoch: int | None
    """A reduced budget of updates, the same for all. None: the configuration's."""
    test_rows: int
    variants: Sequence[Config] = ()
    """Configurations that differ in how the model is trained: rows of their own names beside the models'."""

    def settings(self, name: str, seed: int) -> Config:
        """The configuration of one run, of a model or a variant."""
        variant = next((variant for variant in self.variants if variant.name == name), None)
        changes: dict[str, Any] = {"seed": seed} if variant else {"model": name, "seed": seed}
        if self.rows_per_epoch is not None:
            changes["data"] = self.config.data.model_copy(update={"rows_per_epoch": self.rows_per_epoch})
        return (variant or self.config).model_copy(update=changes)

    def head(self, name: str, seed: int) -> dict[str, Any]:
        """What a row says of itself before it is run."""
        told: dict[str, Any] = {"model": self.settings(name, seed).model, "seed": seed}
        return {"variant": name, **told} if name in self.names[len(self.models) :] else told

    @property
    def names(self) -> list[str]:
        """Of the models, then of the variants."""
        return [*self.models, *(variant.name for variant in self.variants)]

    def check(self) -> None:
        """Variants must be told apart, and be judged on equal terms.

        Raises:
            ConfigError: two rows would have the same name, or a variant has other data, modalities or epochs.
        """
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"each row needs a name of its own, received {', '.join(self.names)}")
        for variant in self.variants:
            for what in ("modalities", "data"):
                if getattr(variant, what) != getattr(self.config, what):
                    raise ConfigError(f"{variant.name}: its {what} are not those of {self.config.name}: compare it on its own")
            if variant.epochs != self.config.epochs:
                raise ConfigError(
                    f"{variant.name}: trains {variant.epochs} epochs, {self.config.name} {self.config.epochs}: equalise them"
                )

    @property
    def name(self) -> str:
        """Of the results: a reduced budget never overwrites the whole one."""
        return self.config.name + (f"-{self.rows_per_epoch}" if self.rows_per_epoch is not None else "")


def compare(plan: Plan, folder: Path | None, out: Path, results: Path, command: str, progress: Progress) -> dict[str, Any]:
    """Run what is missing and write ``results``/<name>.json; returns its content.

    ``rows`` has one entry a model or variant and seed, with ``status`` done, failed (and ``error``) or missing; ``models`` the
    mean and the standard deviation of the figures over the seeds that are done, of one seed no deviation. Other rows stay
    where their configuration, the budget, the number of test rows, the data and the judges are the same.

    Args:
        folder: of the data, see ``data.load``.
        out: a folder for each run, and the judges.
        command: as typed, for the record.

    Raises:
        ConfigError: the judges could not be fitted, or ``Plan.check`` fails.
    """
    plan.check()
    file = results / f"{plan.name}.json"
    head = {
        "name": plan.name,
        "command": command,
        "code_revision": code_revision(),
        "config_sha256": plan.settings("concord", plan.config.seed).sha256,
        "budget": {
            "rows_per_epoch": plan.rows_per_epoch or plan.config.data.rows_per_epoch,
            "epochs": plan.config.epochs,
            "reduced": plan.rows_per_epoch is not None,
        },
        "test_rows": plan.test_rows,
        "frechet_features": frechet.FEATURES,
    }
    rows = _kept(plan, file, head)
    asked = [(name, seed) for seed, name in itertools.product(plan.seeds, plan.names)]
    for name, seed in asked:
        rows[name, seed] = {**plan.head(name, seed), "status": "missing"}
    images = [out / f"judge-{m.name}.pt" for m in plan.config.modalities if isinstance(m, ImageModality)]
    if not all(file.exists() for file in images) and (error := _isolated(_fit_judges, out, plan.config, folder)):
        raise ConfigError(f"the judges could not be fitted: {error}")
    for done, (name, seed) in enumerate(asked, start=1):
        progress.say(f"{name}, seed {seed}: {done} of {len(asked)}")
        rows[name, seed] = {**_row(plan, name, seed, folder, out), **plan.head(name, seed)}
        shared = {what: _shared(what, rows, asked) for what in ("data", "judges")}
        content = {**head, **shared, "rows": list(rows.values()), "models": summary(list(rows.values()))}
        results.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1) + "\n")
    _publish_grids(plan, out, results)
    return content


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{model or variant: {seeds, mean, std}} over the rows that are done."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(map(name_of, rows)):
        figures = [{key: row.get(key) for key in FIGURES} for row in rows if name_of(row) == name and row["status"] == "done"]
        if figures:
            spread = _aggregate(figures, lambda v: statistics.stdev(v) if len(v) > 1 else None)
            found[name] = {"seeds": len(figures), "mean": _aggregate(figures, statistics.fmean), "std": spread}
    return found


def _aggregate(values: Sequence[Any], statistic: Callable[[Sequence[float]], float | None]) -> Any:
    """The statistic of every number, at its place among dictionaries and lists; None where a row has none."""
    first = values[0]
    if all(isinstance(value, dict) for value in values):
        return {key: _aggregate([value.get(key) for value in values], statistic) for key in first}
    if all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [_aggregate(part, statistic) for part in zip(*values, strict=True)]
    return statistic(values) if all(isinstance(value, int | float) for value in values) else None


def _kept(plan: Plan, file: Path, head: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows that running them again would not change; of variants outside the plan, those beside the same configuration."""
    if not file.exists():
        return {}
    content = json.loads(file.read_text())
    if any(content.get(key) != head[key] for key in ("budget", "test_rows")):
        return {}
    same: bool = content.get("config_sha256") == head["config_sha256"]
    rows = {(name_of(row), row["seed"]): row for row in content["rows"]}

    def stays(name: str, row: dict[str, Any]) -> bool:
        if "variant" in row and name not in plan.names:
            return same
        ran: str | None = row.get("config_sha256")  # of a row that did not end there is none
        return same if ran is None else ran == plan.settings(name, row["seed"]).sha256

    return {(name, seed): row for (name, seed), row in rows.items() if stays(name, row)}


def _publish_grids(plan: Plan, out: Path, results: Path) -> None:
    """Of every model's first seed, beside the results."""
    for model in plan.models:
        if (grid := out / f"{model}-{plan.seeds[0]}" / GRID).exists():
            shutil.copyfile(grid, results / f"{plan.name}-grid-{model}.png")


def _shared(what: str, rows: dict[tuple[str, int], dict[str, Any]], asked: Sequence[tuple[str, int]]) -> Any:
    """What the rows have in common: the data, or what the judges make of the real rows. Figures of others cannot be held
    against theirs: a row that was asked for counts as failed, one that was only kept is left out."""
    found = None
    for key in sorted(rows, key=lambda key: key not in asked):
        row = rows[key]
        found = found or row.get(what)
        if row.get(what, found) == found:
            continue
        if key in asked:
            row.update(status="failed", error=f"was run with other {what}: remove its folder to run it again")
        else:
            del rows[key]
    return found


def _row(plan: Plan, name: str, seed: int, folder: Path | None, out: Path) -> dict[str, Any]:
    settings, path = plan.settings(name, seed), out / f"{name}-{seed}"
    file = path / ROW
    told = {"config_sha256": settings.sha256, "test_rows": plan.test_rows}
    if file.exists():
        row: dict[str, Any] = json.loads(file.read_text())
        if all(row[key] == value for key, value in told.items()):
            return row
    if error := _isolated(_run, path, settings, plan.config, folder, out, plan.test_rows):
        return {"status": "failed", "error": error}
    return dict(json.loads(file.read_text()))


def _run(path: Path, settings: Config, whole: Config, folder: Path | None, out: Path, test_rows: int) -> None:
    train, test = data.load(settings, "train", folder), data.load(settings, "test", folder)
    run, progress = Run(path, settings), Progress()
    model = load(settings, train, run) or fit(settings, train, run, progress)
    everything = train if settings.data == whole.data else data.load(whole, "train", folder)
    who = judges(whole, everything, out, progress)  # fitted already, whatever the budget of the run
    figures = evaluate(settings, model, train, test, progress, refined_rows=test_rows)
    figures |= measure(settings, model, test, who, test_rows, progress)
    draw_grid(model, examples(test)).save(path / GRID, optimize=True)
    cost = run.cost()
    run.write(
        ROW,
        {
            "model": settings.model,
            "seed": settings.seed,
            "status": "done",
            "config_sha256": settings.sha256,
            "code_revision": code_revision(),
            "data": [source.model_dump() for source in (*train.sources, *test.sources)],
            "parameters": sum(p.numel() for p in model.parameters()),
            **figures,
            "test_rows": test_rows,  # those asked for; the probe's are all there are
            "seconds": cost["seconds"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
        },
    )


def _fit_judges(out: Path, config: Config, folder: Path | None) -> None:
    judges(config, data.load(config, "train", folder), out, Progress())


def _isolated(work: Callable[..., None], path: Path, *arguments: Any) -> str | None:
    """Run in a process of its own, whose memory is its own figure and whose death is survived. Returns what went wrong."""
    path.mkdir(parents=True, exist_ok=True)
    failure = path / FAILURE
    failure.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_guarded, args=(work, path, *arguments), daemon=True)
    process.start()
    process.join()
    if process.exitcode == 0:
        return None
    return failure.read_text() if failure.exists() else f"the process ended with exit code {process.exitcode}"


def _guarded(work: Callable[..., None], path: Path, *arguments: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        work(path, *arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        logging.exception("%s failed", path)
        write_atomically(path / FAILURE, f"{type(error).__name__}: {error}")
        sys.exit(1)
