"""What a person sees of long work: a bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

LINE_SECONDS = 10.0

Advance = Callable[[int, Mapping[str, float]], None]


class Progress:
    """Reports to standard error, so that results can be piped.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """A table."""
        self._console.print(table)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Follow ``total`` steps, of which ``done`` are already taken. Yields a function of the steps taken and the figures."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Bars(*columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=self._console) as bars:
                task = bars.add_task(name, total=total, completed=done, figures="")
                yield lambda step, figures: bars.update(task, completed=step, figures=_words(figures))
            return
        last = -LINE_SECONDS

        def line(step: int, figures: Mapping[str, float]) -> None:
            nonlocal last
            if step == total or time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.say(f"{name}: step {step} of {total}  {_words(figures)}")

        yield line


def _words(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
