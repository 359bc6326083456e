"""The built-in bundle as every competitor serves it: Concord's ONNX encode graph and codec, without Concord's server."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from concord.model import bundle, codec
from concord.model.modality import collate

Row = dict[str, NDArray[Any]]


class DigitsEncoder:
    """Parser and encoder. Each worker process of a competitor has one."""

    def __init__(self) -> None:
        opened = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE))
        self.modalities = tuple(opened.manifest.modalities)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        graph = opened.path / opened.manifest.graphs.encode
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for rows in (1, 32):  # the first run of a batch size allocates memory
            self.encode([self.parse({"word": "seven"})] * rows)

    def parse(self, item: Mapping[str, str]) -> Row:
        """Return the arrays of one item by modality.

        Args:
            item: JSON values by modality.
        """
        return {m.name: np.asarray(codec.parse(m, item[m.name])) for m in self.modalities if m.name in item}

    def encode(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Return embeddings (rows, latent)."""
        inputs, present = collate(self.modalities, rows)
        mean: NDArray[np.float32] = self.session.run(["mean"], {**inputs, "present": present})[0]
        return mean
