"""The commands of ``concord``: its own, and those that other packages offer as entry points ``concord.commands``."""

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, NoReturn

import orjson
import structlog
import typer
from fastapi import FastAPI
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from concord.model.bundle import BundleError
from concord.model.installation import not_installed
from concord.model.runtime import Runtime
from concord.model.runtime.device import cuda_is_installed, gpu_is_visible
from concord.service.app import create
from concord.service.http.acceptor import ConnectionCounts
from concord.service.http.api_keys import ApiKeysError
from concord.service.http.server import Server, bind
from concord.service.http.shared_quotas import SharedLevels
from concord.service.settings import PREFIX, Settings, explain
from concord.service.telemetry.logs import configure_logging
from concord.service.telemetry.tracing import TracingError
from concord.service.workers.link import SupervisorLink
from concord.service.workers.shares import worker_count, worker_settings
from concord.service.workers.supervisor import Supervisor

BAD_USAGE = 2
FAILED = 1
LARGE_BYTES = 4 << 20
"""A block of memory of this size or more returns to the system as soon as it is freed."""
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h

Bundle = Annotated[str | None, typer.Option(help="Name of a built-in bundle, or path of a bundle's folder.")]


app = typer.Typer(
    help="One embedding from any subset of modalities, and the missing ones generated from it: serve a bundle, or train one.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def add_commands(words: Sequence[str]) -> None:
    """Add the commands of the entry points, unless one of the service's own is called: serving does not wait for imports.

    Args:
        words: of the command line, the program's name not among them.
    """
    own = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    if not own & set(words[:1]):
        for point in {point.value: point for point in entry_points(group="concord.commands")}.values():
            app.add_typer(point.load())


_EPILOG = (
    f"Every setting is an environment variable {PREFIX}<NAME>: "
    + ", ".join(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)
    + ". Options take precedence."
)


@app.command(epilog=_EPILOG)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 listens on every interface.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one, which the log names.")] = None,
    bundle: Bundle = None,
    workers: Annotated[str | None, typer.Option(help="Processes that share the port: a number, or auto.")] = None,
) -> None:
    """Serve a bundle over HTTP: POST /embed, POST /cross-generate, GET /readyz, GET /openapi.json.

    Try it: curl -F word=seven localhost:8000/embed
    """
    settings = _settings(host=host, port=port, bundle=bundle, workers=workers)
    set_up_process(settings)
    listener = _listen(settings.host, settings.port, "--port")
    operators = _listen(settings.host, settings.admin_port, f"{PREFIX}ADMIN_PORT") if settings.admin_port is not None else None
    cores = len(os.sched_getaffinity(0))
    gpu = settings.device.startswith("cuda") or (settings.device == "auto" and cuda_is_installed() and gpu_is_visible())
    count = worker_count(settings, cores=cores, gpu=gpu)
    address, number = listener.getsockname()[:2]
    log = structlog.get_logger("concord.service").bind(
        host=address, port=number, admin_port=operators and operators.getsockname()[1]
    )
    if count == 1:
        service = create_app(settings, operators)
        log.info("serving", models=[model.label for model in service.state.registry.all()])
        server = Server(service, settings)
        freeze_heap()
    else:
        log.info("serving", workers=count)
    try:
        if count == 1:
            server.run(sockets=[listener])
            status = 0 if server.started else FAILED
        else:
            share = worker_settings(settings, count, cores=cores, gpu=gpu)
            shared = {"quotas": SharedLevels.create().descriptor, "connections": ConnectionCounts.create(count)}
            counts = ConnectionCounts(shared["connections"])
            status = asyncio.run(Supervisor(settings, share, count, listener, operators, shared, counts).run())
    finally:
        with contextlib.suppress(OSError):  # the reader of the pipe may be gone, which is no failure of the service
            sys.stdout.close()
    if status:
        raise typer.Exit(status)


@app.command()
def openapi(bundle: Bundle = None) -> None:
    """Print the OpenAPI document of the bundle's API."""
    document = create_app(_settings(bundle=bundle)).openapi()
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")


@app.command()
def doctor(
    bundle: Bundle = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Check this machine, its device and the bundle: one line each, with a remedy. Exit status 1 if a check fails."""
    from concord.service import doctor as checks  # noqa: PLC0415 - only this command needs it

    findings = []
    for finding in checks.examine(_settings(bundle=bundle)):
        findings.append(finding)
        if not json:
            typer.echo(str(finding))
    report = checks.report(findings)
    if json:
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    if not report["ok"]:
        raise typer.Exit(FAILED)


@app.command("embed-dataset")
def embed_dataset(
    source: Annotated[str, typer.Argument(help="A Parquet file, or a folder of them; a path or a URI.")],
    output: Annotated[str, typer.Argument(help="Folder for the results. The same command continues where it stopped.")],
    column: Annotated[
        list[str],
        typer.Option(help="MODALITY=COLUMN: what to embed. Once for each modality; COLUMN,COLUMN for several of numbers."),
    ],
    bundle: Bundle = None,
    generate: Annotated[list[str] | None, typer.Option(help="MODALITY to generate. Once for each.")] = None,
    refine_steps: Annotated[int, typer.Option(min=0, help="Refinement steps.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the refinement's noise.")] = 0,
    class_names: Annotated[
        list[str] | None,
        typer.Option(help="MODALITY=NAME,NAME: names of the class numbers in its column. Default: those in the file."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder where relative paths of pictures start. Default: that of the Parquet file.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one a GPU, else one a core of this machine.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: run on this machine.")] = None,
) -> None:
    """Add embeddings, and what is generated from them, to the rows of Parquet files.

    Example: embed-dataset photos.parquet embedded --column photo=image --generate word
    """
    settings = _settings(bundle=bundle)
    try:
        from concord.service.batch import dataset, ray_job  # noqa: PLC0415 - a separate extra
    except ImportError as error:
        _stop(not_installed(str(error.name), "embed-dataset", "bulk"), FAILED)
    threads = settings.threads or 1
    try:
        job = dataset.BatchJob(
            settings.bundle_path().absolute(),
            dataset.columns_from_options(column),
            tuple(generate or ()),
            refine_steps,
            seed,
            {**settings.runtime_options(), "threads": threads},
            settings.max_batch,
            settings.max_pixels,
            dataset.class_names_from_options(class_names or ()),
            data,
        )
        parts, total = dataset.plan(job, source, output)
        results = ray_job.run(job, parts, source, output, workers=workers, address=address) if parts else ()
        done = list(track(results, "embedding", total=len(parts), console=Console(stderr=True), disable=not parts))
    except (BundleError, dataset.JobError) as error:
        _stop(str(error), FAILED)
    typer.echo(dataset.summary(done, total))
    if reason := dataset.reason_of_failure(done):
        _stop(reason, FAILED)


def _settings(**options: Any) -> Settings:
    """The environment's settings, with the options that were given in their place."""
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        _stop(explain(error), BAD_USAGE)


def set_up_process(settings: Settings, worker: int | None = None) -> None:
    """Log and handle signals as a process that serves does.

    Args:
        worker: number of this process, if there are several.
    """
    if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        os.set_blocking(sys.stdout.fileno(), False)  # a pipe that is not read loses log lines and does not block requests
    configure_logging(settings, worker)
    bound_heap()
    for number in (signal.SIGTERM, signal.SIGINT):  # the server finishes its requests first and then raises them again
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload


def bound_heap() -> None:
    """Keep one heap for all threads, and large blocks outside of it. Otherwise each thread has a heap, and the blocks that
    loading a bundle takes and frees leave gaps in it. No effect without the GNU C library."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)
        set_option(_M_MMAP_THRESHOLD, LARGE_BYTES)


def freeze_heap() -> None:
    """Requests leave little garbage, and a collection over the whole heap takes a twentieth of a second. What loading the
    bundles took and freed returns to the system."""
    gc.collect()
    gc.freeze()  # objects made so far are never scanned again
    gc.set_threshold(20_000, 20, 20)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _listen(host: str, port: int, option: str) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror}"
        _stop(f"{reason}. Stop the process that listens there, or choose another {option}", FAILED)


def create_app(
    settings: Settings,
    operators: socket.socket | None = None,
    link: SupervisorLink | None = None,
    quotas: SharedLevels | None = None,
) -> FastAPI:
    """The app, as ``concord.service.app.create`` makes it. Ends the process with a message if it cannot be made."""
    try:
        folders = settings.bundle_folders()
        opened = [Runtime.load(folder, **settings.runtime_options()) for folder in folders]
        return create(opened, settings, operators, link, quotas)
    except (BundleError, ApiKeysError, TracingError) as error:
        _stop(str(error), FAILED)


def _stop(message: str, status: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(status)
