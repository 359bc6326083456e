"""LitServe: decoding and batching in a worker process, as its documentation recommends for models that batch."""

import os

import litserve
from numpy.typing import NDArray

from tests.benchmarks.peers.digits import Digits, Row


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.digits = Digits()

    def decode_request(self, request: dict[str, str]) -> Row:
        return self.digits.decode(request)

    def encode_response(self, output: NDArray) -> dict[str, list[float]]:
        return {"embedding": output.tolist()}


class EmbedOne(Embed):
    def predict(self, x: Row) -> NDArray:
        return self.digits.encode([x])[0]


class EmbedTogether(Embed):
    def batch(self, inputs: list[Row]) -> list[Row]:
        return inputs

    def predict(self, x: list[Row]) -> NDArray:
        return self.digits.encode(x)

    def unbatch(self, output: NDArray) -> list[NDArray]:
        return list(output)


def main() -> None:
    batch = int(os.environ["BATCH"])
    api = EmbedTogether(batch, float(os.environ["WINDOW_MS"]) / 1000) if batch > 1 else EmbedOne()
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
