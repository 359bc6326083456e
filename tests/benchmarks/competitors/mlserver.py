"""MLServer: a custom runtime behind the V2 inference protocol.

MLServer reads its settings from files. Run as a program, this module writes the files and becomes the server.
"""

import json
import os
import tempfile
from pathlib import Path

from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]

from tests.benchmarks.competitors.digits import DigitsEncoder


class Embed(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.encoder = DigitsEncoder()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        columns = {tensor.name: StringCodec.decode_input(tensor) for tensor in payload.inputs}
        rows = [self.encoder.parse(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("embedding", self.encoder.encode(rows))]
        )


def main() -> None:
    """Serve with the settings of the environment: BATCH, WINDOW_MS (milliseconds), WORKERS, PORT, PORT_2, PORT_3."""
    folder = Path(tempfile.mkdtemp(prefix="mlserver-"))
    settings = {
        "host": "127.0.0.1",
        "http_port": int(os.environ["PORT"]),
        "grpc_port": int(os.environ["PORT_2"]),
        "metrics_port": int(os.environ["PORT_3"]),
        "metrics_endpoint": None,
        "parallel_workers": int(os.environ["WORKERS"]),
        "debug": False,
    }
    model = {
        "name": "digits",
        "implementation": "tests.benchmarks.competitors.mlserver.Embed",
        "max_batch_size": int(os.environ["BATCH"]),
        "max_batch_time": float(os.environ["WINDOW_MS"]) / 1000,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.execvp("mlserver", ["mlserver", "start", str(folder)])


if __name__ == "__main__":
    main()
