"""Progress of long operations: a bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table

from concord.training.forecast import duration

LINE_SECONDS = 10.0
"""Least time between two plain lines."""

Figures = Mapping[str, float | str]
Advance = Callable[[int, Figures], None]
"""Called with the number of steps done and figures to show. Without figures, a plain line shows the time that is left."""


class Progress:
    """Prints to standard error, so that results on standard output can be piped.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        self._console.print(table)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show the progress of ``total`` steps, ``done`` of which are complete. Yields the function that reports progress."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            figures_column = TextColumn("{task.fields[figures]}")
            with ProgressBars(*columns, TimeRemainingColumn(), figures_column, console=self._console) as bars:
                task = bars.add_task(name, total=total, completed=done, figures="")
                yield lambda step, figures: bars.update(task, completed=step, figures=_format(figures))
            return
        self.say(f"{name}: step {done} of {total}")
        began = last = time.monotonic()
        is_first = True

        def print_line(step: int, figures: Figures) -> None:
            nonlocal last, is_first
            if is_first or step == total or time.monotonic() - last >= LINE_SECONDS:
                last, is_first = time.monotonic(), False
                if not figures and done < step < total:
                    figures = {"left": duration((last - began) / (step - done) * (total - step))}
                self.say(f"{name}: step {step} of {total}  {_format(figures)}")

        yield print_line


def _format(figures: Figures) -> str:
    return "  ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in figures.items())
