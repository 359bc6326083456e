"""MLServer: a custom runtime, spoken to by the V2 protocol; its settings as files, which is how it takes them.

Run as a program it writes these files and becomes the server.
"""

import json
import os
import tempfile
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from tests.benchmarks.peers.digits import Digits


class Embed(MLModel):
    async def load(self) -> bool:
        self.digits = Digits()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        columns = {given.name: StringCodec.decode_input(given) for given in payload.inputs}
        rows = [self.digits.decode(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("embedding", self.digits.encode(rows))]
        )


def main() -> None:
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
        "implementation": "tests.benchmarks.peers.mlserver.Embed",
        "max_batch_size": int(os.environ["BATCH"]),
        "max_batch_time": float(os.environ["WINDOW_MS"]) / 1000,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.execvp("mlserver", ["mlserver", "start", str(folder)])


if __name__ == "__main__":
    main()
