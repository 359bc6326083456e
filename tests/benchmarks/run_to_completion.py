"""The service with run-to-completion batches, as a baseline of its scheduler.

A batch under refinement finishes all its steps before other rows are admitted.
"""

from concord.service.cli import app
from concord.service.inference import engine
from concord.service.inference.scheduler import Row, Scheduler


class RunToCompletion(Scheduler):
    def step(self) -> list[Row]:
        """Run all refinement steps of the active rows, and return the finished rows."""
        finished: list[Row] = []
        while self.active:
            finished += super().step()
        return finished


if __name__ == "__main__":
    engine.Scheduler = RunToCompletion  # type: ignore[attr-defined]
    app()
