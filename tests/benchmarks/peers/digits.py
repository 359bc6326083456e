"""The built-in bundle as every rival serves it: its ONNX encode graph, and the codec that decodes requests, as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model import bundle, codec
from model.modality import collate

Row = dict[str, NDArray[Any]]


class Digits:
    """Made once in each process that answers."""

    def __init__(self) -> None:
        opened = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE))
        self.modalities = tuple(opened.manifest.modalities)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        graph = opened.path / opened.manifest.graphs.encode
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for rows in (1, 32):  # the first run of a size allocates
            self.encode([self.decode({"word": "seven"})] * rows)

    def decode(self, item: Mapping[str, str]) -> Row:
        """One sample, from values as they stand in JSON."""
        return {m.name: np.asarray(codec.decode(m, item[m.name])) for m in self.modalities if m.name in item}

    def encode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Embeddings, (rows, latent)."""
        inputs, present = collate(self.modalities, rows)
        mean: NDArray[np.float32] = self.session.run(["mean"], {**inputs, "present": present})[0]
        return mean
