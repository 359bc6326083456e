"""The command line: ``python -m service`` serves; ``openapi`` prints the contract, ``embed-dataset`` does bulk work."""

import contextlib
import gc
import os
import signal
import socket
import stat
import sys
from typing import Annotated, Any, NoReturn

import orjson
import structlog
import typer
from fastapi import FastAPI
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from model.bundle import BundleError
from model.runtime import Runtime
from service.app import create
from service.keys import KeysError
from service.server import Server, bind
from service.settings import PREFIX, Settings, explain
from service.telemetry import configure_logging
from service.tracing import TracingError

BAD_USAGE = 2
FAILED = 1

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_EPILOG = (
    f"Every setting is an environment variable {PREFIX}<NAME>: "
    + ", ".join(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
    + ". Options overrule them."
)


@cli.callback(invoke_without_command=True, epilog=_EPILOG)
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 listens to the whole network.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one, which the log names.")] = None,
    bundle: Annotated[str | None, typer.Option(help="Name of a built-in bundle, or path of a bundle's folder.")] = None,
) -> None:
    """Serve a bundle over HTTP: POST /embed, POST /cross-generate, GET /readyz, GET /openapi.json.

    Try it: curl -F word=seven localhost:8000/embed
    """
    given: dict[str, Any] = {
        name: value for name, value in (("host", host), ("port", port), ("bundle", bundle)) if value is not None
    }
    try:
        settings = Settings(**given)
    except ValidationError as error:
        _stop(explain(error), BAD_USAGE)
    context.obj = settings
    if context.invoked_subcommand is None:
        _serve(settings)


@cli.command()
def openapi(context: typer.Context) -> None:
    """Print the OpenAPI document of the bundle's API."""
    app = _create(context.obj)
    sys.stdout.buffer.write(orjson.dumps(app.openapi(), option=orjson.OPT_INDENT_2) + b"\n")


@cli.command("embed-dataset")
def embed_dataset(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A Parquet file, or a folder of them; a path or a URI.")],
    output: Annotated[str, typer.Argument(help="Folder for the results. The same command goes on where it was.")],
    column: Annotated[list[str], typer.Option(help="MODALITY=COLUMN: what to embed. Once for each modality.")],
    generate: Annotated[list[str] | None, typer.Option(help="MODALITY to generate. Once for each.")] = None,
    refine_steps: Annotated[int, typer.Option(min=0, help="Refinement steps.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the refinement's noise.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core of this machine.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: run on this machine.")] = None,
) -> None:
    """Add embeddings, and what is generated from them, to the rows of Parquet files.

    Example: embed-dataset photos.parquet embedded --column photo=image --generate word
    """
    settings: Settings = context.obj
    try:
        from service import bulk, dataset  # noqa: PLC0415 - an extra of its own
    except ImportError as error:
        _stop(f"{error.name} is not installed: pip install 'concord[cpu,bulk]'", FAILED)
    columns = dict(pair.partition("=")[::2] for pair in column)
    threads = settings.threads or 1
    try:
        job = dataset.Job(
            settings.bundle_path().absolute(),
            columns,
            tuple(generate or ()),
            refine_steps,
            seed,
            settings.device,
            threads,
            settings.max_batch,
            settings.max_pixels,
        )
        parts, total = dataset.plan(job, source, output)
        workers = workers or max(1, len(os.sched_getaffinity(0)) // threads)
        results = bulk.run(job, parts, source, output, workers=workers, address=address) if parts else ()
        done = list(track(results, "embedding", total=len(parts), console=Console(stderr=True), disable=not parts))
    except (BundleError, dataset.JobError) as error:
        _stop(str(error), FAILED)
    rows, failed = (sum(numbers) for numbers in zip(*done, strict=True)) if done else (0, 0)
    typer.echo(f"{rows} rows in {len(parts)} files, {failed} without embedding; {total - len(parts)} files were there already")


def _serve(settings: Settings) -> None:
    if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        os.set_blocking(sys.stdout.fileno(), False)  # lines are lost rather than requests held up when nobody reads them
    configure_logging(settings)
    for number in (signal.SIGTERM, signal.SIGINT):  # the server ends its work first and then raises them again
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    listener = _listen(settings.host, settings.port, "--port")
    operators = _listen(settings.host, settings.admin_port, f"{PREFIX}ADMIN_PORT") if settings.admin_port is not None else None
    app = _create(settings, operators)
    host, port = listener.getsockname()[:2]
    structlog.get_logger("service").info(
        "serving",
        host=host,
        port=port,
        admin_port=operators and operators.getsockname()[1],
        models=[serving.label for serving in app.state.bundles.all()],
    )
    server = Server(app, settings)
    _rest_the_collector()
    try:
        server.run(sockets=[listener])
    finally:
        with contextlib.suppress(OSError):  # whoever read it may be gone: that is no failure of ours
            sys.stdout.close()
    if not server.started:
        raise typer.Exit(FAILED)


def _rest_the_collector() -> None:
    """Little of what requests leave is for the garbage collector to find, and a full heap takes it a twentieth of a second."""
    gc.collect()
    gc.freeze()  # what is here now stays
    gc.set_threshold(20_000, 20, 20)


def _listen(host: str, port: int, option: str) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        told = f"cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or choose another {option}"
        _stop(told, FAILED)


def _create(settings: Settings, operators: socket.socket | None = None) -> FastAPI:
    try:
        folders = settings.bundle_folders()
        opened = [Runtime.load(folder, device=settings.device, threads=settings.threads) for folder in folders]
        return create(opened, settings, operators)
    except (BundleError, KeysError, TracingError) as error:
        _stop(str(error), FAILED)


def _stop(message: str, status: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    cli(prog_name="python -m service")
