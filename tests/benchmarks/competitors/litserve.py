"""LitServe: a worker process parses requests and forms batches, as its documentation recommends for models that batch."""

import os
from typing import Any

import litserve  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.competitors.digits import DigitsEncoder, Row

Embeddings = NDArray[np.float32]


class Embed(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.encoder = DigitsEncoder()

    def decode_request(self, request: dict[str, str]) -> Row:
        return self.encoder.parse(request)

    def encode_response(self, output: Embeddings) -> dict[str, Any]:
        return {"embedding": output.tolist()}


class SingleEmbed(Embed):
    def predict(self, x: Row) -> Embeddings:
        embedding: Embeddings = self.encoder.encode([x])[0]
        return embedding


class BatchedEmbed(Embed):
    def batch(self, inputs: list[Row]) -> list[Row]:
        return inputs

    def predict(self, x: list[Row]) -> Embeddings:
        return self.encoder.encode(x)

    def unbatch(self, output: Embeddings) -> list[Embeddings]:
        return list(output)


def main() -> None:
    """Serve with the settings of the environment: BATCH, WINDOW_MS (milliseconds), WORKERS, FAST_QUEUE, PORT."""
    batch = int(os.environ["BATCH"])
    api = BatchedEmbed(batch, float(os.environ["WINDOW_MS"]) / 1000) if batch > 1 else SingleEmbed()
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ["WORKERS"]),
        fast_queue=bool(int(os.environ["FAST_QUEUE"])),
        timeout=60,
    )
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), num_api_servers=1, log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
