"""BentoML: a service class. With BATCH > 1 the API is ``batchable``, and BentoML's adaptive dispatcher forms the batches."""

import os

import bentoml  # type: ignore[import-not-found]

from tests.benchmarks.competitors.digits import DigitsEncoder

BATCH = int(os.environ["BATCH"])


@bentoml.service(
    workers=int(os.environ["WORKERS"]),
    traffic={"timeout": 60, "max_concurrency": 10_000},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Embed:
    def __init__(self) -> None:
        self.encoder = DigitsEncoder()

    @bentoml.api(  # type: ignore[untyped-decorator]
        route="/embed", batchable=BATCH > 1, max_batch_size=max(BATCH, 2), max_latency_ms=60_000
    )
    def embed(self, inputs: list[dict[str, str]]) -> list[list[float]]:
        embeddings: list[list[float]] = self.encoder.encode([self.encoder.parse(item) for item in inputs]).tolist()
        return embeddings
