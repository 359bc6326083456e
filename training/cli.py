"""Command-line arguments of the training commands. ``commands`` implements them and is imported when a command runs."""

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ParamSpec, get_args

import typer

from concord.model.bundle import BundleError
from concord.model.installation import not_installed
from concord.training.config import Model
from concord.training.errors import TrainingError

RESULTS = Path("training/results")


_TORCH_CPU = "https://download.pytorch.org/whl/cpu"
"""Package index of PyTorch without CUDA."""


def _missing_torch() -> str | None:
    """How to install what training needs. None: PyTorch is installed."""
    if find_spec("torch"):
        return None
    extras = "train" if find_spec("onnxruntime") else "cpu,train"  # [gpu] may be installed, which excludes [cpu]
    return f"{not_installed('PyTorch', 'Training', extras)} (without a GPU, add --extra-index-url {_TORCH_CPU}: much smaller)"


_EPILOG = _missing_torch()

Configuration = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, for example training/configs/digits.toml.")]
Folder = Annotated[
    Path | None,
    typer.Option("--data", envvar="CONCORD_DATA", help="Folder of the data. Default: data.folder of the configuration."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/<name of the configuration>.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Overrides the seed of the configuration. Runs of other seeds need separate folders.")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Overrides the epochs of every stage, for a shorter or longer run.")]
RowsPerEpoch = Annotated[
    int | None, typer.Option(min=1, help="Overrides data.rows_per_epoch: training rows of each epoch, sampled anew for each.")
]

Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu, cuda, cuda:N or mps. Overrides the device of the configuration.", metavar="DEVICE"),
]

P = ParamSpec("P")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _command(name: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a command. Errors that the user can correct, and errors of the disk, print a message and exit with code 2."""

    def register(command: Callable[P, None]) -> Callable[P, None]:
        @app.command(name, epilog=_EPILOG)
        @wraps(command)
        def reporting(*args: P.args, **kwargs: P.kwargs) -> None:
            # Under torchrun, only rank zero logs.
            level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
            logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
            try:
                command(*args, **kwargs)
            except (TrainingError, BundleError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(2) from error
            except ModuleNotFoundError as error:
                if not (missing := _missing_torch()):
                    raise
                print(f"error: {missing}", file=sys.stderr)
                raise typer.Exit(2) from error
            except KeyboardInterrupt:
                print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
                raise typer.Exit(130) from None

        return reporting

    return register


@_command()
def init(
    file: Annotated[Path, typer.Argument(metavar="PARQUET", help="Your data: one row per sample, null for missing values.")],
    out: Annotated[Path | None, typer.Option(help="Configuration file to write. Default: the file's name with .toml.")] = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="Frozen encoder of photographs. Default: of an installed package, or none.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Frozen encoder of sentences. Default: of an installed package, or none.")
    ] = None,
) -> None:
    """Infer the modalities of a Parquet file and write a configuration for it."""
    from concord.training import commands

    given = {kind: name for kind, name in (("image", image_encoder), ("text", text_encoder)) if name is not None}
    commands.init(file, out, given)


@_command()
def check(
    configuration: Configuration,
    folder: Folder = None,
    epochs: Epochs = None,
    rows_per_epoch: RowsPerEpoch = None,
    device: Device = None,
) -> None:
    """Read all rows of a configuration and report their content, and how long training would take, from a few timed steps.

    Exit code 2 if fit would reject the rows.
    """
    from concord.training import commands

    commands.check(configuration, folder, commands.Overrides(epochs=epochs, rows_per_epoch=rows_per_epoch, device=device))


@_command()
def fit(
    configuration: Configuration,
    folder: Folder = None,
    out: Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the folder of the run first, and start over.")] = False,
    seed: Seed = None,
    epochs: Epochs = None,
    rows_per_epoch: RowsPerEpoch = None,
    device: Device = None,
    log: Annotated[str | None, typer.Option(help="Show figures in tensorboard, wandb or mlflow too. Install it first.")] = None,
) -> None:
    """Train all stages, then evaluate.

    After any interruption, even SIGKILL, the same command continues from the last checkpoint and gives the same numbers. There
    is a checkpoint at least every minute. A run whose configuration or data has changed does not continue.

    Progress goes to stderr, figures to stdout. The folder of the run holds metrics.jsonl, checkpoint.pt, evaluation.json,
    export.npz (the input of export) and grid.png (samples from each subset).

    Several processes can train together. Each computes a part of every batch, and the result is the same up to rounding:
    torchrun --nproc-per-node 2 -m concord.service fit CONFIG. Another number of processes can continue the run. Batches that
    exceed the memory can be split into micro-batches: accumulate = 4 in a stage of the configuration.
    """
    from concord.training import commands

    overrides = commands.Overrides(seed, epochs, rows_per_epoch, device)
    commands.fit(configuration, folder, out, fresh=fresh, overrides=overrides, log=log)


@_command()
def evaluate(
    configuration: Configuration,
    folder: Folder = None,
    out: Out = None,
    seed: Seed = None,
    epochs: Epochs = None,
    rows_per_epoch: RowsPerEpoch = None,
    device: Device = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Fit linear baselines to the training rows too, which can take minutes.")
    ] = False,
) -> None:
    """Evaluate a finished run on the test split and print its figures.

    With --baselines, for data with pairing = "row": canonical correlation analysis for retrieval, logistic regression for
    classes, and ridge regression for attributes and numbers, on histograms of images, on words, and on numbers as they are.
    """
    from concord.training import commands

    overrides = commands.Overrides(seed, epochs, rows_per_epoch, device)
    commands.evaluate(configuration, folder, out, overrides, baselines=baselines)


@_command()
def export(
    configuration: Configuration,
    folder: Folder = None,
    out: Out = None,
    seed: Seed = None,
    epochs: Epochs = None,
    rows_per_epoch: RowsPerEpoch = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the bundle. Default: bundle/ in the folder of the run.")] = None,
) -> None:
    """Write a finished and evaluated run as a bundle that the service can serve.

    Needs no data: fit and evaluate keep what the bundle takes from it. The graphs are compared with the model before the bundle
    is written. An existing bundle is replaced atomically.
    """
    from concord.training import commands

    commands.export(configuration, folder, out, commands.Overrides(seed, epochs, rows_per_epoch), to)


@_command()
def tune(
    configuration: Configuration,
    runs: Annotated[int, typer.Option(min=1, help="Number of runs, in all calls together.")] = 20,
    folder: Folder = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the search. Default: runs/tune-<name>.")] = None,
    seed: Seed = None,
    epochs: Epochs = None,
    rows_per_epoch: RowsPerEpoch = None,
    device: Device = None,
) -> None:
    """Search for learning rate, beta and the weights of the alignment. Needs Optuna: pip install 'concord-mvae[tune]'.

    Runs are compared by held-out training rows: how well each single modality predicts the others. Test rows are not read. An
    interrupted search continues with the same command. Prints a table of the runs, and writes tune.png and best.toml, a
    configuration with the best settings. Use --epochs and --rows-per-epoch for shorter runs.
    """
    from concord.training import commands

    commands.tune(configuration, folder, out, runs, commands.Overrides(seed, epochs, rows_per_epoch, device))


@_command()
def report(
    root: Annotated[Path, typer.Option(help="Checkout whose documents are rewritten.")] = Path(),
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle. Default: the built-in bundle.")] = None,
    results: Annotated[Path, typer.Option(help="Folder with the results of compare.")] = RESULTS,
) -> None:
    """Rewrite the generated tables of the documents: figures of the built-in bundle and of all results files, with charts."""
    from concord.training import commands

    commands.report(root, bundle, results)


@_command()
def compare(
    configuration: Configuration,
    variants: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[VARIANT]...", help="Configurations with other settings of training."),
    ] = None,
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = ",".join(get_args(Model)),
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    rows_per_epoch: Annotated[
        int | None, typer.Option(help="Training rows per epoch: a reduced budget, noted in the results.", min=1)
    ] = None,
    test_rows: Annotated[
        int, typer.Option(help="Test rows of all figures but probe, retrieval and predictions.", min=2)
    ] = 2000,
    held_out: Annotated[
        int | None,
        typer.Option(
            help="So many training rows replace the test rows, to choose settings. They are not trained on. Gap and log p(X) "
            "are not measured.",
            min=2,
        ),
    ] = None,
    folder: Folder = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/compare-<name>.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the results file.")] = RESULTS,
    device: Device = None,
) -> None:
    """Train and evaluate several models, and variants of a configuration, with several seeds, and write one results file.

    All runs have the same data and number of epochs. An interrupted run continues, and an evaluated run is not repeated. For
    data with pairing = "row", the results are a folder with the figures of evaluate for each model and seed; the first run that
    is done has those of --baselines too. `report` renders the results.
    """
    from concord.training import commands

    commands.compare(
        configuration, variants or [], models, seeds, rows_per_epoch, test_rows, held_out, folder, out, results, device
    )
