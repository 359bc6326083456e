"""The command line: ``python -m service`` serves, ``python -m service openapi`` prints the contract."""

import signal
import socket
import sys
from typing import Annotated, Any, NoReturn

import orjson
import structlog
import typer
import uvicorn
from pydantic import ValidationError

from model.bundle import BundleError
from model.runtime import Runtime
from service.app import create
from service.keys import KeysError
from service.server import bind, configure
from service.settings import PREFIX, Settings, explain
from service.telemetry import configure_logging

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
    app = create(_open(context.obj), context.obj)
    sys.stdout.buffer.write(orjson.dumps(app.openapi(), option=orjson.OPT_INDENT_2) + b"\n")


def _serve(settings: Settings) -> None:
    configure_logging(settings)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn drains first and then raises them again
        signal.signal(number, lambda *_: sys.exit(0))
    listener = _listen(settings.host, settings.port, "--port")
    operators = _listen(settings.host, settings.admin_port, f"{PREFIX}ADMIN_PORT") if settings.admin_port is not None else None
    runtime = _open(settings)
    try:
        app = create(runtime, settings, operators)
    except KeysError as error:
        _stop(str(error), FAILED)
    host, port = listener.getsockname()[:2]
    manifest = runtime.bundle.manifest
    structlog.get_logger("service").info(
        "serving",
        host=host,
        port=port,
        admin_port=operators and operators.getsockname()[1],
        bundle=f"{manifest.name}@{manifest.version}",
        device=runtime.device,
    )
    server = uvicorn.Server(configure(app, settings))
    server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(FAILED)


def _listen(host: str, port: int, option: str) -> socket.socket:
    try:
        return bind(host, port)
    except OSError as error:
        told = f"cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or choose another {option}"
        _stop(told, FAILED)


def _open(settings: Settings) -> Runtime:
    try:
        return Runtime.load(settings.bundle_path(), device=settings.device, threads=settings.threads)
    except BundleError as error:
        _stop(str(error), FAILED)


def _stop(message: str, status: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    cli(prog_name="python -m service")
