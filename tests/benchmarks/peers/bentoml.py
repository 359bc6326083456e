"""BentoML: a service of its own class; ``batchable`` where batches form by its adaptive dispatcher."""

import os

import bentoml

from tests.benchmarks.peers.digits import Digits

BATCH = int(os.environ["BATCH"])


@bentoml.service(
    workers=int(os.environ["WORKERS"]),
    traffic={"timeout": 60, "max_concurrency": 10_000},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Embed:
    def __init__(self) -> None:
        self.digits = Digits()

    @bentoml.api(route="/embed", batchable=BATCH > 1, max_batch_size=max(BATCH, 2), max_latency_ms=60_000)
    def embed(self, inputs: list[dict[str, str]]) -> list[list[float]]:
        return self.digits.encode([self.digits.decode(item) for item in inputs]).tolist()
