"""The service with batches that run to completion, for comparison: what is refined together ends before more is let in."""

from service import engine
from service.__main__ import cli
from service.scheduler import Row, Scheduler


class ToCompletion(Scheduler):
    def step(self) -> list[Row]:
        done: list[Row] = []
        while self.active:
            done += super().step()
        return done


if __name__ == "__main__":
    engine.Scheduler = ToCompletion  # type: ignore[misc]
    cli()
