"""The command ``concord``, also as ``python -m concord.service``."""

import sys
from importlib.metadata import entry_points

from concord.model.installation import not_installed


def main() -> None:
    """Run the command line, or name the extra to install where the base install, which is the client alone, was taken.

    A command of an entry point does not load the service, whose packages would take 60 MB of memory during a training.
    """
    words = sys.argv[1:]
    points = entry_points(group="concord.commands", name=words[0]) if words else ()
    try:
        if points:
            app = next(iter(points)).load()
        else:
            from concord.service.cli import add_commands, app  # noqa: PLC0415 - its packages come with an extra

            add_commands(words)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "concord":
            raise
        extras, what = ("cpu,train", "Training") if points else ("cpu", "The server")
        sys.exit(f"concord: {not_installed(str(error.name), what, extras)} (or gpu instead of cpu)")
    app(prog_name="concord")


if __name__ == "__main__":
    main()
