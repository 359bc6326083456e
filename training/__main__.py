"""``python -m training``: init, check, fit, evaluate, export, report."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.bundle import DEFAULT_BUNDLE, BundleError, builtin, read
from model.vae.export import ExportError
from model.vae.generative import Generative
from model.vae.multimodal import MultimodalVAE
from training import config_file, data, parallel
from training.check import check, subsets_table
from training.checkpoint import Run, RunError
from training.comparison import Plan
from training.comparison import compare as run_comparison
from training.config import Config, ConfigError, Model
from training.draft import draft
from training.evaluate import evaluate as figures_of
from training.export import export as export_run
from training.fit import DivergenceError, load
from training.fit import fit as train
from training.grid import draw_grid, examples
from training.guess import guess
from training.measure import generation
from training.metrics.judge import judges
from training.progress import Progress
from training.report import write_comparisons, write_results, write_rows, write_teachers
from training.scores import name_of
from training.sources import open_place

app = typer.Typer(
    help="Make a bundle from data, offline: fit a configuration, evaluate the result, export it. "
    "A run lives in a folder of its own; every command continues what it finds there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
EVALUATION, GRID = "evaluation.json", "grid.png"
GENERATED_ROWS = 2000  # test rows that something is generated from when a run is evaluated
RESULTS = Path("training/results")

Configuration = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, such as training/configs/digits.toml.")]
Folder = Annotated[
    Path | None,
    typer.Option("--data", envvar="CONCORD_DATA", help="Where the configuration's files lie. Default: its data.folder."),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<name of the configuration>.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Instead of the configuration's; give runs of other seeds folders of their own.")
]

P = ParamSpec("P")


def _explained(command: Callable[P, None]) -> Callable[P, None]:
    """Errors that a user can mend, the disk's among them, end with their message and exit code 2, without a traceback."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            if parallel.started() > 1 and command.__name__ != "fit":
                raise ConfigError("several processes share a fit alone: start the other commands without torchrun")
            command(*args, **kwargs)
        except (ConfigError, data.DataError, RunError, DivergenceError, ExportError, BundleError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapper


@app.command("init")
@_explained
def begin(
    file: Annotated[
        Path, typer.Argument(metavar="PARQUET", help="Your data: a row for each sample, null where something lacks.")
    ],
    out: Annotated[Path | None, typer.Option(help="The configuration. Default: named like the file, with .toml.")] = None,
) -> None:
    """Look through a Parquet file and draft a configuration for it."""
    if file.suffix != ".parquet":
        raise data.DataError(f"{file}: a .parquet file is expected. pandas writes one with to_parquet")
    target = out or Path(f"{file.stem}.toml")
    if target.exists():
        raise ConfigError(f"{target}: is there already. Name another file with --out")
    rows = open_place(file.name, file.parent)
    guesses = guess(rows)
    text = draft(file, len(rows), guesses)
    target.write_text(text, encoding="utf-8")
    table = Table(title=f"{file}: {len(rows):,} rows", title_justify="left")
    for head in ("columns", "taken for", "absent", "what it holds"):
        table.add_column(head, justify="right" if head == "absent" else "left")
    for found in guesses:
        shown = ", ".join(found.columns[:3]) + (f" and {len(found.columns) - 3} more" if found.columns[3:] else "")
        table.add_row(escape(shown), found.role, f"{found.nulls:,}", escape(found.note))
    Console(highlight=False).print(table)
    print(f"{target} is written. Look through it, then: python -m training check {target}")


@app.command("check")
@_explained
def look(configuration: Configuration, folder: Folder = None) -> None:
    """Read all rows of a configuration and tell what they hold, without training. Exit code 2 where fit would not begin."""
    settings = config_file.read(configuration)
    if not check(settings, folder, Console(highlight=False)):
        raise data.DataError(
            f"{configuration}: some values cannot be read, the first are shown above. Repair them, or say "
            'bad_values = "absent" under [data]'
        )
    print(f"{configuration} is fine. Train it with: python -m training fit {configuration}")


@app.command()
@_explained
def fit(
    configuration: Configuration,
    folder: Folder = None,
    out: Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run's folder first, and start over.")] = False,
    seed: Seed = None,
) -> None:
    """Train all stages, then evaluate.

    Stopped at any moment, even by SIGKILL, the same command continues from the last checkpoint and ends with the same numbers.
    Progress goes to stderr, figures to stdout; the run's folder keeps metrics.jsonl, checkpoint.pt, evaluation.json
    and grid.png, what is generated from each subset.

    Several processes train together, each on its share of every batch, with the same result but for rounding:
    torchrun --nproc-per-node 2 -m training fit CONFIG. Any number of them continues what any other began. A batch that does
    not fit into memory goes through in passes: accumulate = 4 in the configuration's stage.
    """
    settings = _settings(configuration, seed)
    path = out or Path("runs") / settings.name
    with parallel.team() as team:
        team.check(settings)
        training, test = data.load(settings, "train", folder), data.load(settings, "test", folder)
        if team.leads:
            _prepare(path, settings, fresh=fresh)
        team.wait()
        run, progress = Run(path, settings), Progress(quiet=not team.leads)
        progress.show(subsets_table(training))
        vae = load(settings, training, run) or train(settings, training, run, progress, team)
    if team.leads:
        _evaluate(settings, vae, training, test, run, progress)
        options = (f" --out {out}" if out else "") + (f" --seed {seed}" if seed is not None else "")
        print(f"\nexport it with: python -m training export {configuration}{options}")


def _settings(configuration: Path, seed: int | None) -> Config:
    settings = config_file.read(configuration)
    return settings if seed is None else settings.model_copy(update={"seed": seed})


def _prepare(path: Path, settings: Config, *, fresh: bool) -> None:
    """Make the run's folder, now that all else is known to be there."""
    if fresh and path.exists():
        if not (path / "config.json").exists():
            raise RunError(f"{path}: is no run's folder, and is not removed")
        shutil.rmtree(path)
    Run(path, settings)


@app.command()
@_explained
def evaluate(configuration: Configuration, folder: Folder = None, out: Out = None, seed: Seed = None) -> None:
    """Measure a finished run on the test split and print its figures."""
    with _finished(configuration, folder, out, seed) as (settings, vae, training, test, run):
        _evaluate(settings, vae, training, test, run, Progress())


@app.command()
@_explained
def export(
    configuration: Configuration,
    folder: Folder = None,
    out: Out = None,
    seed: Seed = None,
    to: Annotated[Path | None, typer.Option(help="The bundle's folder. Default: bundle/ in the run's folder.")] = None,
) -> None:
    """Write a finished and evaluated run as a bundle that the service can serve.

    The graphs are checked against the model before anything is written; a bundle already there is replaced in one step.
    """
    with _finished(configuration, folder, out, seed) as (settings, vae, training, test, run):
        if not isinstance(vae, MultimodalVAE):
            raise ConfigError(f'{configuration}: model is "{settings.model}"; a bundle holds a "concord" alone')
        grid = [picture] if (picture := run.path / GRID).exists() else []
        bundle = export_run(settings, vae, training, test, run.read(EVALUATION), to or run.path / "bundle", grid)
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    print(f"{bundle.path}: {bundle.manifest.name} {bundle.manifest.version}, {size / 1e6:.1f} MB, sha256 {bundle.sha256[:16]}")
    print(f"serve it with: CONCORD_BUNDLE={bundle.path} python -m service")


@app.command()
@_explained
def report(
    readme: Annotated[Path, typer.Option(help="File whose results section is rewritten.")] = Path("README.md"),
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle. Default: the built-in one.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the results files of compare.")] = RESULTS,
) -> None:
    """Write the README's tables: of the figures that a bundle carries, and of every results file, with its charts beside it."""
    write_results(readme, read(bundle or builtin(DEFAULT_BUNDLE)).manifest)
    write_rows(readme, results / "birds")
    write_teachers(readme, results / "birds-features")
    charts = write_comparisons(readme, results) + write_comparisons(readme, results / "ablations", "ablations")
    for chart in charts:
        print(chart)


@app.command()
@_explained
def compare(
    configuration: Configuration,
    variants: Annotated[
        list[Path] | None, typer.Argument(metavar="[VARIANT]...", help="Configurations that differ in how they are trained.")
    ] = None,
    models: Annotated[str, typer.Option(help="Models, joined by commas.")] = ",".join(get_args(Model)),
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "0,1,2",
    rows_per_epoch: Annotated[
        int | None, typer.Option(help="Training rows an epoch: a reduced budget, reported as such.", min=1)
    ] = None,
    test_rows: Annotated[int, typer.Option(help="Test rows of all figures but the probe's, which takes all.", min=2)] = 2000,
    folder: Folder = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs live. Default: runs/compare-<name>.")] = None,
    results: Annotated[Path, typer.Option(help="Where the results file goes.")] = RESULTS,
) -> None:
    """Train and measure several models, and variants of a configuration, over several seeds on equal terms, and write one
    results file.

    Every run continues where it stopped, and is not run again once it is measured. `report` shows the results.
    """
    others = variants or []
    settings, varied = config_file.read(configuration), [config_file.read(other) for other in others]
    plan = Plan(settings, _models(models), _seeds(seeds), rows_per_epoch, test_rows, varied)
    files = " ".join(map(str, [configuration, *others]))
    typed = f"python -m training compare {files} --models {models} --seeds {seeds} --test-rows {test_rows}"
    typed += f" --rows-per-epoch {rows_per_epoch}" if rows_per_epoch else ""
    content = run_comparison(plan, folder, out or Path("runs") / f"compare-{plan.name}", results, typed, Progress())
    for row in content["rows"]:
        print(f"{name_of(row)}, seed {row['seed']}: {row['status']}{': ' + row['error'] if row.get('error') else ''}")
    print(f"{results / plan.name}.json")


def _models(text: str) -> tuple[Model, ...]:
    known = get_args(Model)
    if unknown := [name for name in text.split(",") if name not in known]:
        raise ConfigError(f"--models: {', '.join(map(repr, unknown))} is not among {', '.join(known)}")
    return cast(tuple[Model, ...], tuple(text.split(",")))


def _seeds(text: str) -> tuple[int, ...]:
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds: {text!r}: whole numbers from 0, joined by commas, such as 0,1,2")
    return tuple(int(part) for part in text.split(","))


@contextmanager
def _finished(
    configuration: Path, folder: Path | None, out: Path | None, seed: int | None
) -> Iterator[tuple[Config, Generative, data.Dataset, data.Dataset, Run]]:
    settings = _settings(configuration, seed)
    path = out or Path("runs") / settings.name
    if not path.exists():
        raise RunError(f"{path}: no such run. Run fit first, or name its folder with --out")
    run = Run(path, settings)
    training, test = data.load(settings, "train", folder), data.load(settings, "test", folder)
    vae = load(settings, training, run)
    if vae is None:
        raise RunError(f"{path}: the run has not finished. Run fit again, it continues")
    yield settings, vae, training, test, run


def _evaluate(
    settings: Config, vae: Generative, training: data.Dataset, test: data.Dataset, run: Run, progress: Progress
) -> None:
    figures = figures_of(settings, vae, training, test, progress)
    if settings.data.pairing == "class" and training.class_names:  # then what is generated has a class to show
        who = judges(settings, training, run.path, progress)
        figures |= generation(settings, vae, test, who, GENERATED_ROWS, progress)
    figures["training"] = run.cost()
    run.write(EVALUATION, figures)
    draw_grid(vae, examples(test)).save(run.path / GRID, optimize=True)
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
    for query, galleries in figures.get("retrieval", {}).items():
        for gallery, found in galleries.items():
            recalls = "  ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "rows")
            console.print(f"{query} finds its {gallery} among {found['rows']:,}: {recalls}", markup=False)
    for name, sources in figures.get("attributes", {}).items():
        for source, found in sources.items():
            told = f"mean average precision {found['map']:.3f}, by chance {found['chance']:.3f}; "
            told += f"F1 {found['f1']:.3f}, by chance {found['f1_chance']:.3f}; {found['rows']:,} rows"
            console.print(f"{name} from {source}: {told}", markup=False)
    if coherence := figures.get("coherence"):
        for source, targets in coherence["cross"].items():
            shown = "  ".join(f"{target} {share:.3f}" for target, share in targets.items())
            console.print(f"coherence of a sample from {source}: {shown}", markup=False)
    if refinement := figures.get("refinement"):
        console.print(
            f"refinement, {refinement['steps']} steps: ELBO {refinement['elbo_before']:.2f} -> {refinement['elbo_after']:.2f} "
            f"weighted nats; raised for {refinement['raised']:.2%} of rows, judged with fresh noise "
            f"{refinement['raised_fresh_noise']:.2%}"
        )
    cost = figures["training"]
    console.print(f"training: {cost['seconds']:.0f} s, peak memory {cost['peak_memory_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    level = logging.INFO if parallel.first() else logging.ERROR  # one of several processes speaks for all
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    app()
